"""What a training starts with: model, augmentation, optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from segvit.config import PRESETS, SegViTConfig, decoder_of
from segvit.data.names import mirrored_classes
from segvit.data.transforms import Augment
from segvit.model.checkpoint import find_checkpoint, read_config
from segvit.model.heads import SegViT
from segvit.model.pretrained import open_pretrained
from segvit.model.shrunk import ShrunkDecoder
from segvit.options import TrainConfig
from segvit.system.text import shown
from segvit.training.init_from import init_from
from segvit.training.run_folder import Checkpoints
from segvit_kernels import FusedATM

# Fields of a model that `--model` does not set, and what does.
_GIVEN = {
    "num_classes": "the data give the number of classes",
    "name": "preset gives it",
    "backbone": "its own fields are named like those of the model, as in {'width': 192}",
}


def settled(config: TrainConfig) -> TrainConfig:
    """The options with what they leave open: as in the checkpoint that a run goes on or starts from, else the
    preset's. Pictures are read as that checkpoint's were, where no option says otherwise.

    Raises:
        ValueError, FileNotFoundError: no such checkpoint; an image size that is not square.
    """
    source = Checkpoints(config.out).newest() if config.resume else None
    if source is None and config.init_from:
        source = find_checkpoint(config.init_from)
    old = read_config(source) if source else None
    model: dict[str, Any] = dict(config.model)
    value_range: Sequence[float] | None = config.value_range
    given = model.get("value_range")
    if given is not None and not isinstance(given, (list, tuple)):
        raise ValueError(f"model: got value_range {shown(given)}, expected a list of numbers")
    if not given:
        model.pop("value_range", None)  # says nothing, and would stand in place of what training reads by
    elif value_range and list(value_range) != list(given):
        got = f"got {list(value_range)}, and model says {list(given)}"
        raise ValueError(f"value_range: {got}; expected one")
    else:
        value_range = list(given)
    if old and config.init_from:
        value_range = value_range or old.value_range
        if old.backbone.in_channels != 3:
            model.setdefault("in_channels", old.backbone.in_channels)
        if old.decoder != "atm" and config.head is None:
            model.setdefault("decoder", old.decoder)
    size: Any = old.image_size if old else PRESETS.get(config.preset, {}).get("image_size", 512)
    size = model.get("image_size", size)
    if isinstance(size, (list, tuple)) and size and all(side == size[0] for side in size):
        size = size[0]
    if config.image_size is None and not isinstance(size, int):
        raise ValueError(f"image_size: the model's is {shown(size)}; say it, for crops are square")
    if config.image_size is not None:
        if "image_size" in model and isinstance(size, int) and size != config.image_size:
            raise ValueError(f"image_size: got {config.image_size}, and model says {size}; expected one")
        size = config.image_size
    return dataclasses.replace(
        config,
        image_size=size,
        head=config.head or "segvit",
        model=model,
        value_range=list(value_range or ()),
    )


def build_model(config: TrainConfig, dataset: Any, say: Callable[[str], None] = lambda text: None) -> SegViT:
    """The model that a training starts from, for the classes of a dataset; resumed, without its weights.

    Args:
        say: told what pretrained weights brought along and what was changed in them.

    Raises:
        ValueError, FileNotFoundError: unknown preset or field; weights that do not fit.
    """
    config = settled(config)
    overrides = {"image_size": config.image_size, **config.model}
    for name, instead in _GIVEN.items():
        if name in config.model:
            raise ValueError(f"model: {name} is not a field to change; {instead}")
    overrides.setdefault("decoder", decoder_of(config.head))
    if config.head != "segvit" and overrides["decoder"] != config.head:
        raise ValueError(
            f"head: got {config.head}, and model says decoder {overrides['decoder']}; expected one"
        )
    overrides.setdefault("class_names", dataset.class_names)
    overrides.setdefault("palette", dataset.palette)
    overrides.setdefault("value_range", config.value_range or None)
    kept = Checkpoints(config.out).newest() if config.resume else None
    if kept:  # what it started from may be gone
        model = SegViT(read_config(kept))
    elif config.init_from:
        model, notes = init_from(config.init_from, dataset.num_classes, overrides)
        say(f"{config.init_from}: {'; '.join(notes)}")
        if config.shrunk and model.config.backbone.shrink_at is None:
            raise ValueError(f"shrunk: {config.init_from} is not")
    else:
        model = _start(config, dataset.num_classes, {"shrunk": config.shrunk, **overrides}, say)
    if config.freeze_backbone:
        model.freeze_backbone()
    model.set_shrink_after(config.shrink_after)
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    return model


# Of a backbone, what its weights decide where --model does not.
_OF_WEIGHTS = (
    "mlp", "mlp_ratio", "register_tokens", "qkv_bias", "pre_norm", "absolute_positions", "position_resize",
    "rotary", "attention_norm", "mlp_norm",
)  # fmt: skip


def _start(
    config: TrainConfig,
    num_classes: int,
    fields: dict[str, Any],
    say: Callable[[str], None],
) -> SegViT:
    """A model of the preset, its backbone's weights loaded."""
    try:
        model_config = SegViTConfig.preset(config.preset, num_classes, **fields)
    except TypeError as error:
        raise ValueError(f"model: {error}") from None
    weights = open_pretrained(config.backbone_weights) if config.backbone_weights else None
    if weights:
        told = {str(key): config.model[key] for key in ("heads", "mlp", "norm_eps") if key in config.model}
        weights = weights._replace(known={**told, **weights.known})
        own, theirs = model_config.backbone, weights.backbone_config()
        if (theirs.width, theirs.depth) == (own.width, own.depth):
            taken = {key: getattr(theirs, key) for key in _OF_WEIGHTS}
            taken |= {key: weights.known[key] for key in ("heads", "norm_eps") if key in weights.known}
            if own.rotary and theirs.rotary:  # the augmentation is the training's
                of_training = {name: getattr(own.rotary, name) for name in ("shift", "jitter", "rescale")}
                taken["rotary"] = dataclasses.replace(theirs.rotary, **of_training)
            if (own.layer_scale is None) != (theirs.layer_scale is None):
                taken["layer_scale"] = theirs.layer_scale
            # AugReg's is left out, as in the published models; others' blocks count on theirs.
            if theirs.register_tokens or theirs.pre_norm or theirs.layer_scale is not None:
                taken["class_token"] = theirs.class_token
            taken = {key: value for key, value in taken.items() if key not in config.model}
            backbone = dataclasses.replace(own, **taken)
            model_config = dataclasses.replace(model_config, backbone=backbone)
    model = SegViT(model_config)
    if weights:
        report = model.load_backbone(weights, statistics=not {"mean", "std"} & set(config.model))
        notes = [f"{report.loaded} tensors loaded", *report.changed]
        if "cls_token" in report.ignored:
            notes.append("the class token is not taken: --model.class_token true takes it")
        say(f"{weights.name}: {'; '.join(notes)}")
    with torch.no_grad():
        for module in model.decoder.modules():
            if isinstance(module, FusedATM):
                module.q.weight.mul_(config.similarity_gain)
                module.k.weight.mul_(config.similarity_gain)
    return model


def make_augmentation(config: TrainConfig, training: Any, model: SegViT) -> Augment:
    """Of the training data; padding has the model's mean colour."""
    size = config.image_size
    assert size is not None, "options are settled"
    return Augment(
        size,
        scale=config.scale,
        class_share=config.class_share,
        flip=config.flip,
        photometric=config.photometric,
        mean=model.config.mean,
        ignore_index=training.ignore_index,
        exchanged=mirrored_classes(training.class_names or model.config.class_names),
        seed=config.seed,
    )


def make_optimizer(config: TrainConfig, model: SegViT) -> torch.optim.AdamW:
    """AdamW on the model's groups, each with the learning rate of the schedule's peak as "peak_lr"."""
    groups = model.parameter_groups(
        config.lr, config.weight_decay, config.decoder_lr_scale, config.layer_decay
    )
    for group in groups:
        group["peak_lr"] = group["lr"]
    # Fused AdamW unscales by itself and then cannot clip.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=config.precision != "fp16")


@torch.no_grad()
def locate_queries(config: TrainConfig, model: SegViT, training: Any, augment: Augment) -> None:
    """Show the up-sampling queries of a fresh Shrunk model where they are: see `QueryUpsample.locate`."""
    wanted = isinstance(model.decoder, ShrunkDecoder) and config.locate_images
    if not wanted or (config.resume and Checkpoints(config.out).newest()):
        return
    if config.init_from and read_config(find_checkpoint(config.init_from)).decoder == model.config.decoder:
        return  # they are that model's
    count = min(config.locate_images, len(training))
    indices = [len(training) * i // count for i in range(count)]
    levels = []
    model.eval()
    for start in range(0, count, config.batch_size):
        part = indices[start : start + config.batch_size]
        items = [(training[i], i) for i in part]
        crops = [augment(item["image"], item["label"], 0, i)[0] for item, i in items]
        levels.append(model.backbone(model.preprocess(torch.stack(crops))))
    model.train()
    upsample: Any = model.decoder.upsample
    upsample.locate([torch.cat(level) for level in zip(*levels, strict=True)])
