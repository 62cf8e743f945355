"""`segvit export`: a checkpoint as a file that other runtimes run, from picture to label map."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from segvit.exporting import FORMATS, export, format_of, open_model
from segvit.exporting.compare import agreement, sample
from segvit.exporting.exported import ExportedModel
from segvit.exporting.graph import Plan
from segvit.model.checkpoint import find_checkpoint
from segvit.model.heads import load_model
from segvit.options import ExportConfig, InferenceOptions
from segvit.training.run_folder import meaning_of, share_of


def run(config: ExportConfig) -> int:
    """Write the file and print what it takes and gives. Returns 0.

    Raises:
        ValueError, OSError, ImportError: an option, the checkpoint or the file is wrong, or a package is not
            installed; one line that names it.
    """
    name = format_of(config.out, config.format)
    if len(config.size) > 2:
        raise ValueError(f"size: got {config.size}, expected height and width in pixels, or one side")
    if config.scores and config.logits:
        raise ValueError("logits: are in place of labels and scores; expected one of both options")
    size = (config.size[0], config.size[-1]) if config.size else None
    outputs = "logits" if config.logits else "scores" if config.scores else "labels"
    batch = None if config.batch == "any" else config.batch
    inference = InferenceOptions(**config.inference_fields())
    checkpoint = find_checkpoint(config.checkpoint)
    model = load_model(checkpoint)
    data = {"labels": meaning_of(checkpoint), "validation_share": share_of(checkpoint)}
    pictures: tuple[Tensor, ...] = ()
    if config.calibrate:
        plan = Plan(size, batch, options=inference)
        pictures = sample(config.calibrate, model.config, plan, config.calibration_pictures)
    export(
        model,
        config.out,
        format=name,
        size=size,
        batch=batch,
        channels_last=config.layout == "nhwc",
        outputs=outputs,
        dtype=config.dtype,
        options=inference,
        calibration=pictures,
        source=config.checkpoint,
        data=data,
    )
    files = [Path(config.out)] + ([Path(config.out).with_suffix(".bin")] if name == "openvino" else [])
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    sides = f"{size[1]}x{size[0]}" if size else "any size"
    print(
        f"{config.out}: {FORMATS[name].what}; {config.dtype}, pictures of {sides}, batch {config.batch}, "
        f"{config.layout}; {megabytes:.1f} MB"
    )
    if pictures:
        exported = open_model(config.out)
        assert isinstance(exported, ExportedModel)
        share = agreement(model, exported, pictures)
        print(f"labels as the checkpoint's: {100 * share:.2f} % of the pixels of {len(pictures)} pictures")
    return 0
