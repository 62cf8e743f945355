"""Options of the command line, as plain dataclasses without heavy imports.

The classes are the groups of `--help`; `segvit.cli` turns each field into one option (`max_steps` becomes
`--max-steps`), and configuration files use the field names. Each number stands with the range it must lie in,
which is checked when the dataclass is made, by whatever command or program.
"""

# ruff: noqa: RUF009  (`option` makes a field, as `dataclasses.field` does)

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from segvit.config import plain

__all__ = [
    "BenchConfig",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "InferenceOptions",
    "PackConfig",
    "PredictConfig",
    "ServeConfig",
    "TrainConfig",
    "check_ranges",
]

Precision = Literal["32", "bf16", "fp16"]


@dataclass(frozen=True)
class Range:
    """The finite numbers from `at_least` or above `more_than` to `at_most` or below `less_than`."""

    at_least: float = -math.inf
    more_than: float = -math.inf
    at_most: float = math.inf
    less_than: float = math.inf

    def __contains__(self, value: float) -> bool:
        finite = abs(value) < 1 << 63 if isinstance(value, Integral) else math.isfinite(value)
        return finite and self.more_than < value < self.less_than and self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        limits = [
            f"{name.replace('_', ' ')} {value:,}"
            for name, value in dataclasses.asdict(self).items()
            if math.isfinite(value)
        ]
        return " and ".join(limits) or "a finite number"


def option(default: Any, help: str, *, positional: bool = False, **limits: float) -> Any:
    """A dataclass field with its help text; `...` as the default makes it required.

    `limits` are those of `Range`, for a number or each of several; a number without any must be finite.
    """
    metadata = {"help": help, "positional": positional, "range": Range(**limits)}
    if default is ...:
        return field(default=MISSING, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def _kinds(options: type) -> dict[str, tuple[type | None, tuple[Any, ...], bool]]:
    """Of each option: the type of its number or numbers, the words that it may be, whether it may be None."""
    kinds: dict[str, tuple[type | None, tuple[Any, ...], bool]] = {}
    for name, hint in typing.get_type_hints(options).items():
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        members = typing.get_args(hint) if union else (hint,)
        numbers: set[type] = set()
        words: list[Any] = []
        for member in members:
            origin, arguments = typing.get_origin(member), typing.get_args(member)
            if origin is Literal:
                words += arguments
            elif member is bool:
                words += (True, False)
            else:
                numbers |= {arguments[0] if origin in (list, tuple) else member} & {int, float}
        kinds[name] = numbers.pop() if numbers else None, tuple(words), type(None) in members
    return kinds


def check_ranges(options: Any) -> None:
    """Compare the numbers and the words of a choice among the options with what they may be.

    Raises:
        ValueError: one is out of range; TypeError: something else stands for a number. The option is named.
    """
    for item in dataclasses.fields(options):
        value, (number, words, optional) = getattr(options, item.name), _kinds(options.__class__)[item.name]
        if (value is None and optional) or not (number or words) or value in words:
            continue
        limits, several = item.metadata["range"], isinstance(value, (list, tuple))
        shown = tuple(value) if several else value
        choices = [*map(str, words), *([str(limits)] if number else []), *(["null"] if optional else [])]
        got, expected = f"{item.name}: got {shown!r}, expected", " or ".join(choices)
        for part in value if several else [value]:
            if number is None or (words and isinstance(part, str)):
                raise ValueError(f"{got} {expected}")
            if isinstance(part, bool) or not isinstance(part, Integral if number is int else Real):
                raise TypeError(f"{got} a {'whole ' if number is int else ''}number, {expected}")
            if part not in limits:
                raise ValueError(f"{got} {expected}")


class _Checked:
    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            setattr(self, item.name, plain(getattr(self, item.name)))
        check_ranges(self)


@dataclass(kw_only=True)
class LabelOptions(_Checked):
    """Files and labels"""

    names: str | None = option(
        None, "file of class names, one a line, in the order of the classes; perhaps 'name red green blue'"
    )
    reduce_zero_label: bool | Literal["auto"] = option(
        "auto",
        "label 0 means ignore and 1... become classes 0... (the ADE20K way), or with --no-... 0... are the "
        "classes; auto: as the label files say, or the choice is yours",
    )
    label_mapping: str | dict[int, int | None] | None = option(
        None,
        "label value -> class, as a JSON file, as JSON or in the config file; replaces reduce_zero_label",
    )
    ignore_index: int = option(
        255,
        "label of pixels without a class, which do not count in the mIoU; in the loss they are outside of "
        "every mask, as in published models, and nothing for the linear head",
    )
    image_pattern: str | None = option(
        None,
        "where the pictures are, e.g. 'images/{split}/**/*_rgb.png': {split} is the split's folder, * any "
        "part of a name, **/ any folders; a usual layout is found by itself",
    )
    label_pattern: str | None = option(None, "where the label maps are; its stars are those of the pictures")
    split_list: str | None = option(
        None, "files that list a split's pictures, e.g. 'lists/{split}.txt', one name a line"
    )
    validation_share: float = option(
        0.1,
        "share of the training pictures, chosen by their names, that is kept for validation where there is "
        "no such split",
        at_least=0,
        less_than=1,
    )
    value_range: list[float] = option(
        [],
        "stored values of pictures that become black and white, one pair or one for each channel; found "
        "picture by picture when not given, for other than 8-bit pictures",
    )


@dataclass(kw_only=True)
class DataOptions(LabelOptions):
    """Data"""

    data: str = option(
        ...,
        "folder of pictures and label maps in a usual layout, or a .zip of it; ade20k:FOLDER, "
        "pascal-context:, pascal-context-60:, coco-stuff:, coco-panoptic:, cityscapes:, voc: for these in "
        "their own files; shards, 'FOLDER/{00000..00123}.tar', also at an address (s3://..., extra remote); "
        "or 'synthetic'",
    )


@dataclass(kw_only=True)
class MachineOptions(_Checked):
    """Machine"""

    devices: int = option(1, "number of processes, one device each", at_least=1, at_most=4096)
    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    precision: Precision = option("32", "arithmetic: 32, or mixed with bf16 or fp16")
    workers: int = option(
        2, "data loading processes for each device; 0 loads in the main process", at_least=0, at_most=4096
    )
    backend: str | None = option(None, "kernel backend (eager, triton, ...); chosen by device when not given")


@dataclass(kw_only=True)
class InferenceOptions(_Checked):
    """Inference"""

    window: int | None = option(
        None,
        "side of the square sliding window in pixels; the whole image at once when not given",
        at_least=1,
    )
    stride: int | None = option(None, "step of the window; two thirds of it when not given", at_least=1)
    scales: list[float] = option(
        [1.0], "factors to which the image is resized; scores are averaged", more_than=0
    )
    flip: bool = option(
        False, "average with the scores of the mirrored image; not with classes 'left ...' and 'right ...'"
    )
    short_side: int | None = option(None, "resize the image to this short side first", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scales, (list, tuple)):
            raise TypeError(f"scales: got {self.scales!r}, expected a list of numbers")
        self.scales = list(self.scales)  # which is compared with those of exported files

    def inference_fields(self) -> dict[str, Any]:
        """These options by name, without those of the command that has them."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(InferenceOptions)}


@dataclass(kw_only=True)
class PrecisionOptions(_Checked):
    """Precision"""

    dtype: Literal["float32", "float16", "bfloat16", "int8"] = option(
        "float32",
        "precision of the network; int8: the backbone's projections, on x86 CPUs with AVX2",
    )


@dataclass(kw_only=True)
class ModelOptions(_Checked):
    """Model"""

    preset: str = option(
        "vit_small", "vit_tiny, vit_small, vit_base or vit_large; or dinov3_vits16 and others (docs/train.md)"
    )
    image_size: int | None = option(
        None,
        "side of the square training crop in pixels, a multiple of the patch size; that of init_from's "
        "checkpoint, else the preset's (mostly 512), when not given",
        at_least=1,
    )
    shrunk: bool = option(
        False,
        "the Shrunk structure: query-based down- and up-sampling, 40 % less compute; it learns much sooner "
        "with --model.key_positions true, which published models do not have",
    )
    shrink_after: float = option(
        0.0,
        "of a backbone that shrinks under a cascade (--model.shrink_at without --shrunk): share of the "
        "training that has all tokens still",
        at_least=0,
        at_most=1,
    )
    locate_images: int = option(
        64,
        "images that show a Shrunk model's queries where they are before the first step; 0: random queries",
        at_least=0,
    )
    similarity_gain: float = option(
        1.0,
        "start the class attention's queries and keys this many times wider than published; 3.5 learns masks "
        "sooner, which counts when training is short",
        more_than=0,
    )
    model: dict[str, Any] = option(
        {}, "changes to the preset's fields, e.g. {'patch_size': 14, 'class_token': true}"
    )
    head: Literal["segvit", "linear"] | None = option(
        None,
        "the SegViT decoder, or a linear layer as a baseline; --model.decoder has more; that of init_from's "
        "checkpoint, else segvit, when not given",
    )
    backbone_weights: str | None = option(
        None,
        "backbone weights: a .safetensors or .pth file, timm:NAME, hf:OWNER/NAME on the Hub, or a folder",
    )
    init_from: str | None = option(
        None,
        "start from this checkpoint (a run, a checkpoint's folder or owner/name on the Hub) in place of "
        "--preset and --backbone-weights, also with other classes, another image size or decoder",
    )
    freeze_backbone: bool = option(False, "train the head alone")


@dataclass(kw_only=True)
class OptimizerOptions(_Checked):
    """Optimization"""

    max_steps: int = option(20000, "length of training, in optimizer steps", at_least=1)
    max_minutes: float | None = option(
        None,
        "stop (evaluate, save) after this many minutes at the latest, those before --resume included",
        more_than=0,
    )
    batch_size: int = option(8, "images for each device and optimizer step", at_least=1)
    accumulate: int = option(1, "split each batch into this many smaller ones to save memory", at_least=1)
    gradient_checkpointing: bool = option(
        False, "compute the backbone's blocks again in the backward pass instead of keeping them in memory"
    )
    lr: float = option(1e-4, "peak learning rate of the backbone", more_than=0)
    decoder_lr_scale: float = option(10.0, "factor on lr for everything but the backbone", more_than=0)
    layer_decay: float = option(
        1.0,
        "factor on lr from each of the backbone's blocks to the one before; 0.65 to 0.9 is usual",
        more_than=0,
        at_most=1,
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999),
        "decay rates of AdamW's two moments; a second one of 0.98 soon forgets the large gradients of "
        "the first steps, which counts when training is short",
        at_least=0,
        less_than=1,
    )
    weight_decay: float = option(0.01, "AdamW weight decay (none on the backbone's norms)", at_least=0)
    warmup_steps: int = option(1500, "steps of linear warm-up", at_least=0)
    warmup_lr: float = option(1e-6, "learning rate of the first step", at_least=0)
    power: float = option(1.0, "power of the polynomial decay to 0", at_least=0)
    clip: float | None = option(35.0, "largest L2 norm of the gradient", more_than=0)
    ema: float | None = option(
        None,
        "decay of the moving average of the weights that is evaluated and saved; in step n at most "
        "(1 + n) / (10 + n)",
        more_than=0,
        less_than=1,
    )
    class_weights: Literal["inverse-sqrt"] | list[float] | None = option(
        None,
        "weights of the classes in the loss, [X,X,...] in their order, or inverse-sqrt: by 1 / sqrt(share of "
        "the training pixels)",
        at_least=0,
    )
    compile: bool = option(False, "use torch.compile on the model")
    seed: int = option(0, "seed of weights, order, augmentation and dropout", at_least=0)


@dataclass(kw_only=True)
class AugmentationOptions(_Checked):
    """Augmentation"""

    scale: tuple[float, float] = option(
        (0.5, 2.0),
        "range of the random resize; short side = scale * image_size",
        more_than=0,
        at_most=32,
    )
    flip: bool = option(
        True, "mirror half of the images; 'left arm' and 'right arm', and their like, are exchanged there"
    )
    photometric: bool = option(True, "vary brightness, contrast, saturation and hue")
    class_share: float = option(
        0.75, "try for crops in which no class fills more than this share", more_than=0, at_most=1
    )


@dataclass(kw_only=True)
class TrainConfig(DataOptions, ModelOptions, OptimizerOptions, AugmentationOptions, MachineOptions):
    """Training"""

    out: str = option(..., "folder of the run: config, log, checkpoints")
    strategy: Literal["ddp", "fsdp"] = option(
        "ddp",
        "of several processes: each has all weights, or (fsdp) a piece of each weight, gradient and moment",
    )
    resume: bool = option(False, "continue the run in the folder exactly where its last checkpoint was")
    evaluate_every: int = option(1000, "steps between evaluations; 0 evaluates at the end only", at_least=0)
    evaluate_window: int | None = option(
        None,
        "side of the square sliding window of these evaluations, as `segvit evaluate --window`; whole images "
        "when not given",
        at_least=1,
    )
    checkpoint_every: int | None = option(
        None, "steps between checkpoints; as evaluate_every when not given", at_least=1
    )
    keep_checkpoints: int | Literal["all"] = option(
        1, "newest checkpoints that are kept, besides the best: a number, or all", at_least=1
    )
    patience: int | None = option(
        None, "stop after this many evaluations in a row without a better mIoU", at_least=1
    )
    log_every: int = option(10, "steps between lines of the log", at_least=1)
    tensorboard: bool = option(False, "also write TensorBoard logs")
    progress: bool = option(True, "show a progress bar")
    synthetic_images: int = option(2048, "images in the synthetic training set", at_least=1)
    synthetic_validation: int = option(64, "images in the synthetic validation set", at_least=1)


@dataclass(kw_only=True)
class EvaluateConfig(DataOptions, PrecisionOptions, InferenceOptions, MachineOptions):
    """Evaluation"""

    checkpoint: str = option(
        ..., "a run's folder (its best), a checkpoint's, owner/name on the Hub, or a file of `segvit export`"
    )
    split: str = option("validation", "which split of the data")
    validation_share: float | None = option(  # type: ignore[assignment]
        None,
        "share of the training pictures, chosen by their names, that is the validation split where there is "
        "none; that of the checkpoint's training, else 0.1, when not given",
        at_least=0,
        less_than=1,
    )
    json: str | None = option(None, "also write the result, confusion matrix included, to this JSON file")
    csv: str | None = option(None, "also write a table of the classes to this CSV file")
    confusion: list[str] = option(
        [], "also write the confusion matrix: pixel counts to a .csv file, shares of a row to a .png picture"
    )
    progress: bool = option(True, "show a progress bar")
    synthetic_validation: int = option(64, "images in the synthetic validation set", at_least=1)


@dataclass(kw_only=True)
class PredictConfig(PrecisionOptions, InferenceOptions):
    """Prediction"""

    images: list[str] = option(
        ...,
        "image files, folders, tars and zips of them, lists (.txt) of such files, and videos (extra video)",
        positional=True,
    )
    checkpoint: str = option(
        ..., "a run's folder (its best), a checkpoint's, owner/name on the Hub, or a file of `segvit export`"
    )
    out: str = option("predictions", "folder for overlays and label maps")
    recursive: bool = option(False, "also take what lies in folders below those given, and keep their tree")
    frames: int = option(1, "of videos take every so manyth frame", at_least=1)
    overlay: bool = option(True, "write NAME_overlay.png")
    labels: Literal["png", "rle"] = option(
        "png", "label maps as NAME_labels.png, or as NAME_rle.json: each class in COCO's run lengths"
    )
    manifest: bool = option(
        False,
        "keep a record in the folder, a line of JSON for each picture with its size and the pixels of each "
        "class, and leave out what the record has: after a kill the same command goes on",
    )
    pack: int | None = option(
        None,
        "put the results of so many pictures into each of several tar files in place of single files; with "
        "such a record",
        at_least=1,
    )
    parquet: bool = option(
        False,
        "at the end also write that record, of --manifest or --pack, as Parquet files (extra parquet)",
    )
    batch: int = option(
        1,
        "pictures of one size that run together, where only label maps are asked for",
        at_least=1,
        at_most=4096,
    )
    threads: int = option(
        1,
        "threads that read pictures, and as many that write results, while the model works",
        at_least=1,
        at_most=64,
    )
    maps: list[str] = option([], "classes, by name or index, whose similarity maps are drawn stage by stage")
    scores: bool = option(
        False,
        "also write NAME_scores.npz: the score of every class at every pixel; the label has the largest",
    )
    probabilities: bool = option(
        False, "also write NAME_probabilities.npz: the scores as shares that add up to 1 at every pixel"
    )
    score_type: Literal["float16", "float32", "uint8"] = option(
        "float16", "how scores and probabilities are stored; uint8 (probabilities only): 255 is 1"
    )
    score_classes: list[str] = option(
        [], "classes, by name or index, to store in these files; all when not given"
    )
    region: list[int] = option(
        [],
        "left, top, width and height in pixels: store scores and probabilities of this part only",
        at_least=0,
    )
    alpha: float = option(0.55, "opacity of the overlay, 0 to 1", at_least=0, at_most=1)
    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    backend: str | None = option(None, "kernel backend (eager, triton, ...); chosen by device when not given")


@dataclass(kw_only=True)
class ServeConfig(PrecisionOptions, InferenceOptions):
    """Serving"""

    checkpoint: str = option(
        ..., "a run's folder (its best), a checkpoint's, or owner/name on the Hub", positional=True
    )
    host: str = option(
        "127.0.0.1",
        "address to listen on: the default is reached from this machine only, 0.0.0.0 from others",
    )
    port: int = option(8000, "port to listen on; 0 takes a free one", at_least=0, at_most=65535)
    batch: int = option(8, "waiting pictures of one size that run together, at most", at_least=1)
    queue: int = option(
        256, "requests at hand, at most; more are told to come back (503)", at_least=1, at_most=1 << 20
    )
    max_pixels: int = option(
        1 << 24,
        "pixels of a picture, at most, looked at before it is decoded; and of a batch",
        at_least=1,
        at_most=1 << 30,
    )
    max_bytes: int = option(1 << 25, "bytes of a picture as it is sent, at most", at_least=1, at_most=1 << 32)
    timeout: float = option(
        120.0, "seconds from a request to its answer, at most", more_than=0, at_most=86400
    )
    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    backend: str | None = option(None, "kernel backend (eager, triton, ...); chosen by device when not given")


@dataclass(kw_only=True)
class ConvertConfig(_Checked):
    """Conversion"""

    checkpoint: str = option(
        ...,
        "published checkpoint, or weights of a plain ViT (DINOv3, ...), .pth or .safetensors",
        positional=True,
    )
    out: str = option(..., "folder for model.safetensors and config.json", positional=True)
    model: dict[str, Any] = option(
        {},
        "fields that the shapes of an unpublished size do not tell, e.g. {'taps': [5, 7, 11], 'heads': 12}; "
        "a Shrunk one also needs 'shrink_at'; of a plain ViT heads, mlp and norm_eps",
    )


@dataclass(kw_only=True)
class ExportConfig(InferenceOptions):
    """Export"""

    checkpoint: str = option(
        ..., "a run's folder (its best), a checkpoint's, or owner/name on the Hub", positional=True
    )
    out: str = option(..., "the file: NAME.onnx, .xml (OpenVINO), .pt2 or .torchscript", positional=True)
    format: Literal["auto", "onnx", "openvino", "torchscript", "pt2"] = option(
        "auto", "of the file; by its name"
    )
    size: list[int] = option(
        [],
        "height and width of the pictures, or one side; pictures of any size when not given. Window, scales "
        "and flip need it, and a fixed size is faster",
        at_least=1,
    )
    batch: int | Literal["any"] = option(1, "pictures of a call: a number, or any", at_least=1)
    layout: Literal["nchw", "nhwc"] = option(
        "nchw", "pictures are (B, channels, H, W) or (B, H, W, channels)"
    )
    scores: bool = option(False, "also give the score of the winning class at every pixel")
    logits: bool = option(
        False, "give mask logits of the patch grid and class probabilities in place of labels"
    )
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = option(
        "float32", "precision of the network; int8: the backbone's projections, with --calibrate"
    )
    calibrate: str | None = option(
        None,
        "folder of pictures to calibrate int8 on; in every precision the share of equal labels on them is "
        "printed",
    )
    calibration_pictures: int = option(32, "how many of them", at_least=1)


@dataclass(kw_only=True)
class BenchConfig(_Checked):
    """Benchmark"""

    model: str = option(
        ...,
        "checkpoint folder, owner/name on the Hub, or a preset with random weights (vit_tiny, vit_small, "
        "vit_base, vit_large)",
        positional=True,
    )
    size: list[int] = option(
        [], "height and width of the images, or one side; the model's own if not given", at_least=1
    )
    batch: int = option(1, "images of a call", at_least=1)
    image: str | None = option(None, "picture to measure on, resized; random pixels when not given")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = option(
        "auto", "precision of the engine; int8: the backbone's projections"
    )
    method: Literal["auto", "eager", "graph", "compile"] = option(
        "auto",
        "how the engine runs: layer by layer, as one graph of calls, or through torch.compile (minutes)",
    )
    seconds: float = option(
        5.0, "time for each way of running the model, and for finding where it goes", more_than=0
    )
    alternatives: bool = option(True, "also measure what could be switched on")
    threads: int | None = option(None, "CPU threads; torch's choice when not given", at_least=1)
    shrunk: bool = option(False, "the Shrunk structure of a preset")
    classes: int | None = option(None, "classes of a preset, 150 when not given", at_least=1)
    json: str | None = option(None, "also write the result to this JSON file")
    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    backend: str | None = option(None, "kernel backend (eager, triton, ...); chosen by device when not given")


@dataclass(kw_only=True)
class DataConfig(LabelOptions):
    """Looking at data"""

    folder: str = option(
        ...,
        "folder of pictures and label maps, or a .zip of it; as --data of `segvit train`",
        positional=True,
    )
    sheet: str | None = option(
        "data-check.png", "contact sheet to write: pictures with their labels over them"
    )
    pictures: int = option(24, "pictures on the contact sheet", at_least=1, at_most=400)
    channels: int = option(
        3, "channels of the pictures: 3 for RGB, 1 for grey, or the number they have", at_least=1
    )
    progress: bool = option(True, "show a progress bar")


@dataclass(kw_only=True)
class PackConfig(LabelOptions):
    """Packing"""

    folder: str = option(
        ...,
        "folder of pictures and label maps, or a .zip of it; as --data of `segvit train`",
        positional=True,
    )
    out: str = option(..., "folder for the shards", positional=True)
    pictures: int = option(1000, "pictures of a shard, at most", at_least=1)
    channels: int = option(
        3, "channels of the pictures: 3 for RGB, 1 for grey, or the number they have", at_least=1
    )
    progress: bool = option(True, "show a progress bar")


@dataclass(kw_only=True)
class DemoConfig(_Checked):
    """Demo"""

    out: str = option(
        "segvit-demo", "folder for the report, the trained model and a few pictures to try it on"
    )
    steps: int = option(1000, "length of training", at_least=1)
    seed: int = option(0, "seed of data, weights and order", at_least=0)
    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
