"""What is measured whole: ways to run SegViT, decoders on one backbone, models of other libraries.

A subject makes a model with random weights and gives its label maps and, where it is trained, its loss. The
same seed gives every way of running a model the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segvit_kernels
from bench.subjects import counts, decoders, peers
from bench.subjects.operators import mask_loss
from bench.subjects.published import BY_FORMULA, Model
from segvit import SegViTConfig, SegViTLoss, SegViTOutput
from segvit.model.heads import make_loss
from segvit.model.linear_head import CrossEntropy
from segvit.model.shrunk import ShrunkDecoder

LabelMaps = Callable[[Tensor], Tensor]
_TORCH_ATTENTION = F.scaled_dot_product_attention


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and a way to run it.

    Attributes:
        name, what: for tables and for readers.
        build: the model of a size, in evaluation mode, on the default device.
        labels: label maps (B, H, W) from the model and images (B, 3, H, W) in uint8.
        loss: scalar loss from the model in training mode, images and labels (B, H, W); None: not trained.
        reference: as ``labels``; what its labels must agree with. None: nothing to compare with.
        context: entered around every call.
        compiled: mode of torch.compile, or None.
        prepare: makes the call from the model and an example of its images, in place of ``labels``.
        missing: why it cannot be measured here, if it cannot.
    """

    name: str
    what: str
    build: Callable[[Model], nn.Module]
    labels: Callable[[nn.Module, Tensor], Tensor]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    reference: Callable[[nn.Module, Tensor], Tensor] | None = None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    compiled: str | None = None
    prepare: Callable[[nn.Module, Tensor], LabelMaps] | None = None
    missing: Callable[[], str | None] = lambda: None

    def caller(self, model: nn.Module, images: Tensor) -> LabelMaps:
        """The call that is timed: images in uint8 to label maps."""
        run = self.prepare(model, images) if self.prepare else functools.partial(self.labels, model)
        if self.compiled:
            run = torch.compile(run, mode=self.compiled)

        def call(batch: Tensor) -> Tensor:
            with self.context():
                return run(batch)

        return call


# ---------------------------------------------------------------------------------------------- running one


def inputs(spec: Model, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise as images (B, 3, S, S) in uint8, and labels (B, S, S) in int64, a dozen patches of any class."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, spec.size, spec.size), dtype=torch.uint8, generator=generator)
    patches = torch.randint(0, spec.classes, (batch, 1, 3, 4), generator=generator)
    labels = F.interpolate(patches.float(), size=(spec.size, spec.size), mode="nearest")[:, 0]
    return images.to(device), labels.long().to(device)


def build(subject: Subject, spec: Model, device: torch.device | str) -> nn.Module:
    """The subject's model on a device, in float32, the same at every call; its weights are drawn there."""
    torch.manual_seed(0)
    with torch.device(device):
        return subject.build(spec).requires_grad_(False).to(device)


def inference(subject: Subject, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The call that is timed, with the model in ``dtype`` from now on: label maps (B, H, W)."""
    call = subject.caller(model.to(dtype), images)

    def run() -> Tensor:
        with torch.inference_mode():
            return call(images)

    return run


def training(
    subject: Subject, model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, Tensor]]:
    """One step as it is timed, forward, loss and backward: loss and norm of all gradients, which are freed.

    Another dtype than float32 is that of autocast. Batch norm keeps its statistics as they are for a single
    image, where pooled maps of one pixel have no variance.
    """
    model.train().requires_grad_(True)
    compute = torch.compile(subject.loss, mode=subject.compiled) if subject.compiled else subject.loss
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and len(images) == 1:
            module.eval()

    def run() -> tuple[Tensor, Tensor]:
        with subject.context(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = compute(model, images, labels)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return loss.detach(), norm

    return run


def macs(subject: Subject, spec: Model, device: torch.device | str = "cpu") -> tuple[float, int]:
    """Multiply-accumulates of one image to its label map, and parameters.

    Counted without computing anything, or on ``device`` for models that look at values.
    """
    for place in ("meta", device):
        with torch.device(place):
            model = subject.build(spec).requires_grad_(False)
            images = torch.zeros(1, 3, spec.size, spec.size, dtype=torch.uint8)
        call = dataclasses.replace(subject, compiled=None).caller(model, images)
        try:
            return counts.count_torch(call, images), sum(p.numel() for p in model.parameters())
        except RuntimeError:
            if place != "meta":
                raise
    raise AssertionError


# ---------------------------------------------------------------------------------------------- SegViT


def segvit(spec: Model) -> nn.Module:
    """SegViT whose label maps have something in them.

    With its initial weights one class wins every pixel, and any two label maps agree. Here each token favours
    its own class, and similarities are spread further: dozens of classes appear.

    Dropout and stochastic depth are off, so that two forms of a training step have the same loss.
    """
    model = spec.build(decoder_dropout=0.0, drop_path=0.0)
    decoder = model.decoder
    with torch.no_grad():
        tokens = decoder.class_tokens
        decoder.class_head.weight[:-1] = 6 / tokens.shape[1] * tokens
        for stage in decoder.stages:
            for layer in stage.layers:
                layer.atm.q.weight.mul_(4)
                layer.atm.k.weight.mul_(4)
    return model


def shrunk(spec: Model) -> nn.Module:
    return segvit(dataclasses.replace(spec, shrunk=True))


@contextlib.contextmanager
def _plain_but_attention():
    with counts.plain_operators(), mock.patch.object(F, "scaled_dot_product_attention", _TORCH_ATTENTION):
        yield


def _published_labels(model: nn.Module, images: Tensor) -> Tensor:
    return counts.EagerForm(model)(model.preprocess(images))[0].argmax(1)


def published_labels(model: nn.Module, images: Tensor) -> Tensor:
    """Label maps by the published formula in plain PyTorch: the reference of every way to run SegViT."""
    with counts.plain_operators():
        return _published_labels(model, images)


def _published_loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Every term in plain PyTorch; masks at full resolution for each pair of image and class present."""
    images = model.preprocess(images)
    grid = model._grid(images)
    stages = model.decoder(model.backbone(images), grid, accumulate=False)
    masks = [stage.mask_logits.unflatten(-1, stage.grid) for stage in stages]
    if not isinstance(model.decoder, ShrunkDecoder):
        masks = [sum(masks[: i + 1]) for i in range(len(masks))]
    classes = model.config.num_classes
    own = torch.full((len(targets), classes), classes, device=targets.device)
    for image, labels in enumerate(targets):
        present = labels.unique()
        own[image, present] = present
    weights = torch.ones(classes + 1, device=targets.device)
    weights[-1] = 0.1
    entropies = [
        F.cross_entropy(stage.class_logits.float().flatten(0, 1), own.flatten(), weights) for stage in stages
    ]
    leaves = {f"mask_logits {i}": entry for i, entry in enumerate(masks)}
    return sum(entropies) + mask_loss.plain({**leaves, "targets": targets})[0]


def _fused_loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    output: SegViTOutput = model(model.preprocess(images))
    return SegViTLoss(model.config.num_classes)(output, targets)["total"]


def _fused(model: nn.Module, images: Tensor) -> Tensor:
    return model.labels(model(model.preprocess(images)), tuple(images.shape[-2:]))


def _prepare_fused(model: nn.Module, images: Tensor) -> LabelMaps:
    return functools.partial(_fused, model.fuse())


def _engine(method: str) -> Callable[[nn.Module, Tensor], LabelMaps]:
    def prepare(model: nn.Module, images: Tensor) -> LabelMaps:
        if images.is_meta:  # where operations are counted: those of the fused form
            return _prepare_fused(model, images)
        size, dtype = tuple(images.shape[-2:]), model.mean.dtype
        return model.compile_for_inference(size, len(images), dtype=dtype, method=method)

    return prepare


PUBLISHED = Subject(
    "published",
    "the published formula, plain attention",
    segvit,
    _published_labels,
    _published_loss,
    published_labels,
    counts.plain_operators,
)
FUSED = Subject(
    "fused",
    "this project, the backend chosen by the device",
    segvit,
    _fused,
    _fused_loss,
    published_labels,
    prepare=_prepare_fused,
)


SDPA = dataclasses.replace(
    PUBLISHED, name="published, SDPA", what="the same with torch's attention", context=_plain_but_attention
)


def ways(device: torch.device, compiled: bool) -> list[Subject]:
    """All ways to run SegViT, the published formula first."""
    change = dataclasses.replace
    sdpa = change(SDPA, loss=None)
    found = [PUBLISHED, sdpa]
    modes = ("default", "max-autotune") if device.type == "cuda" else ("default",)
    for mode in modes if compiled else ():
        what = f"torch.compile of the same, mode {mode}"
        found.append(change(sdpa, name=f"published, compiled, {mode}", what=what, compiled=mode))
    eager = functools.partial(segvit_kernels.backend, "eager")
    found.append(change(FUSED, name="eager", what="this project, backend eager", loss=None, context=eager))
    found.append(FUSED)
    methods = ("graph", *(["compile"] if compiled and device.type == "cuda" else []))
    for method in methods:
        what = f"SegViT.compile_for_inference, method {method}"
        found.append(change(FUSED, name=f"engine, {method}", what=what, loss=None, prepare=_engine(method)))
    return found


def steps(compiled: bool) -> list[Subject]:
    """Ways of a training step, the published formula first."""
    change, what = dataclasses.replace, "torch.compile of the same, as far as it goes"
    found = [change(PUBLISHED, name="SegViT" + BY_FORMULA), SDPA]
    if compiled:
        found.append(change(SDPA, name="published, compiled", what=what, compiled="default"))
    return [*found, change(FUSED, name="SegViT")]


# ---------------------------------------------------------------------------------------------- decoders


def _decoder(name: str) -> Subject:
    def build(spec: Model) -> nn.Module:
        size = (spec.size, spec.size)
        config = SegViTConfig.preset(spec.preset, spec.classes, image_size=size, drop_path=0.0)
        return decoders.build(name, config)

    def labels(model: nn.Module, images: Tensor) -> Tensor:
        scores = model(model.preprocess(images))
        if scores.shape[-2:] != images.shape[-2:]:
            scores = F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return scores.argmax(1)

    def loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return CrossEntropy()(model(model.preprocess(images)), targets)["total"]

    return Subject(name, "cross-entropy on upsampled scores", build, labels, loss)


def _ours(decoder: str, name: str, what: str) -> Subject:
    """Another decoder of this package, as it is after a whole training."""

    def build(spec: Model) -> nn.Module:
        model = spec.build(decoder=decoder, decoder_dropout=0.0, drop_path=0.0)
        model.anneal(1.0)
        return model.eval()

    def loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return make_loss(model.config)(model(model.preprocess(images)), targets)["total"]

    return Subject(name, what, build, _fused, loss, prepare=_prepare_fused)


def on_one_backbone() -> list[Subject]:
    """SegViT as published and ours, Shrunk, our other decoders, and those of `bench.subjects.decoders`."""
    change = dataclasses.replace
    return [
        change(PUBLISHED, name="SegViT" + BY_FORMULA),
        change(FUSED, name="SegViT"),
        change(PUBLISHED, name="Shrunk SegViT" + BY_FORMULA, build=shrunk),
        change(FUSED, name="Shrunk SegViT", build=shrunk),
        _ours("segvitv2", "SegViTv2", "no class mixing, the backend chosen by the device"),
        _ours("eomt", "EoMT", "queries in the last blocks, the backend chosen by the device"),
        *map(_decoder, decoders.NAMES),
    ]


# ---------------------------------------------------------------------------------------------- libraries


def _normalised(model: nn.Module, images: Tensor) -> Tensor:
    return images.to(next(model.parameters()).dtype) / 127.5 - 1


def _peer(peer: peers.Peer) -> Subject:
    def on_images(labels: Callable[[nn.Module, Tensor], Tensor] | None) -> Any:
        return labels and (lambda model, images: labels(model, _normalised(model, images)))

    return Subject(
        peer.name,
        f"{peer.package}: {peer.what}",
        peer.build,
        on_images(peer.labels),
        reference=on_images(peer.reference),
        missing=lambda: peer.missing,
    )


def libraries(compiled: bool = False) -> list[Subject]:
    """The models of `bench.subjects.peers`, and each under torch.compile if asked for."""
    found = []
    for subject in map(_peer, peers.PEERS):
        found.append(subject)
        if compiled and subject.reference is None:
            what = f"{subject.what}, torch.compile"
            found.append(
                dataclasses.replace(subject, name=f"{subject.name}, compiled", what=what, compiled="default")
            )
    return found


def table(name: str, device: torch.device) -> list[Subject]:
    """The subjects of a table by its name: forms, ways, steps, decoders, libraries."""
    return {
        "forms": lambda: [PUBLISHED, FUSED],
        "ways": lambda: ways(device, compiled=True),
        "steps": lambda: steps(compiled=True),
        "decoders": on_one_backbone,
        "libraries": lambda: libraries(compiled=True),
    }[name]()
