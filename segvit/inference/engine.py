"""The inference engine: uint8 images of one size in, label maps out, one call without a host synchronisation.

A fused copy of the model whose constants are folded for one size and batch:

- normalisation: its scale goes into the patch embedding's weights; its shift is part of the conversion from
  uint8, so that 0, which is what padding adds, stays the mean colour;
- position embedding, and the up-sampling queries of a Shrunk model, resized to the size's grid;
- what `SegViT.fuse` folds (on that grid);
- class logits of the stages before the last one are left out: inference has no use for them.

On GPUs the whole call is captured in one CUDA graph, on CPUs written down and repeated without the Python
between its operators (:class:`segvit_kernels.Replay`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segvit.inference.passes import crops_of, passes, views_of
from segvit.inference.protocol import Foldable
from segvit.options import InferenceOptions
from segvit_kernels import (
    PackedLinear,
    Replay,
    freeze,
    pack_linears,
    requested_backend,
    runs_isa,
    unpack_linears,
    why_not_packed,
    without_autocast,
)

__all__ = ["METHODS", "InferenceEngine", "check_precision", "copy_of", "in_precision"]

METHODS = ("auto", "eager", "graph", "compile")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PIXEL = 1 / 128  # a step of uint8: exact in every dtype, and keeps the range of half precision
_WARM_UP = 3  # calls before capture: kernels are built, libraries take their workspaces


class InferenceEngine:
    """A model made ready for images of one size; see `SegViT.compile_for_inference`.

    Attributes:
        size, batch: height and width, and number, of the images of a call.
        device, dtype: where and in which precision the network runs.
        int8: whether the backbone's projections have 8 bits.
        method: "eager", "graph" or "compile".
        function: the module behind it, uint8 images to label maps, without graph or compilation, which do not
            see later changes of it.
    """

    def __init__(
        self,
        model: Foldable,
        size: int | tuple[int, int],
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        method: str = "auto",
        fp8: bool = False,
        int8: bool = False,
        options: InferenceOptions | None = None,
    ) -> None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(f"size: got {size}, expected height and width in pixels")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: got {batch}, expected at least 1")
        self.size, self.batch, self.device = sides, batch, model.mean.device
        self.channels = model.config.backbone.in_channels
        self.dtype, self.int8 = _dtype(model, dtype), int8
        self.method = _method(method, self.device, fp8)
        if fp8:
            _check_fp8(self.device, self.dtype)
        if int8:
            _check_int8(self.device, self.dtype, "int8")
        with torch.no_grad(), without_autocast(self.device):
            self.function = _LabelMaps(model, sides, batch, self.dtype, options or InferenceOptions(), int8)
            if fp8:
                _quantise_backbone(self.function.network)
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Compile and capture, as the method says."""
        self._run: Callable[[Tensor], Tensor] = self.function
        cuda = self.device.type == "cuda"
        if self.method == "compile":
            mode = "max-autotune-no-cudagraphs" if cuda else None  # the capture below is the graph
            self._run = torch.compile(_own(self.function), mode=mode, fullgraph=True, dynamic=False)
        if cuda and self.method != "eager":
            self._run = _Graph(self._run, (self.batch, self.channels, *self.size), self.device)
        elif self.method == "graph":
            self._run = Replay(self._run)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: what is compiled or captured is not in it."""
        return {name: value for name, value in vars(self).items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Label maps (B, H, W) of uint8 images (B, 3, H, W): uint8, int16 for more than 256 classes.

        The result is the caller's own; a later call does not change it. Threads and streams may share an
        engine: a CUDA graph has one set of buffers, at which they take turns.

        Raises:
            ValueError: images of another shape, dtype or device than the engine was made for.
        """
        expected = (self.batch, self.channels, *self.size)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise ValueError(
                f"images: got {getattr(images, 'dtype', type(images).__name__)}, expected torch.uint8"
            )
        if tuple(images.shape) != expected:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected {expected}")
        if images.device != self.device:
            raise ValueError(f"images: got device {images.device}, expected {self.device}")
        with without_autocast(self.device):  # the dtype is the engine's own
            return self._run(images)

    def __repr__(self) -> str:
        return (
            f"InferenceEngine(size={self.size}, batch={self.batch}, method={self.method!r}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )


class _LabelMaps(nn.Module):
    """From uint8 images of one size to label maps, as a function of the images alone."""

    def __init__(
        self,
        model: Foldable,
        size: tuple[int, int],
        batch: int,
        dtype: torch.dtype,
        options: InferenceOptions,
        int8: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.runs = passes(size, options, model.config.backbone.patch_size, model.config.class_names)
        self.network = copy_of(model).eval().unfuse().requires_grad_(False)
        shift, scale = self.network.fold_normalisation(_PIXEL)
        self.shift: Tensor
        self.scale: Tensor | None
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        crops = {run.crop for run in self.runs}
        if len(crops) == 1:  # else resized in each call, on the device
            self.network.fold_grid(*crops)
        self.to(dtype)
        self.network.fuse()
        if int8:
            _pack_int8(self.network)
        # Every stage classifies its tokens: here the last stage's alone, after the network.
        self.class_head = self.network.take_class_head()
        freeze(self)
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.release()
        grids = tuple(model.mask_grid(run.crop) for run in self.runs)
        self.views = views_of(batch, size, tuple(self.runs), grids, self.shift.device)

    def forward(self, images: Tensor) -> Tensor:
        images = torch.add(self.shift, images, alpha=_PIXEL)
        if self.scale is not None:
            images = images * self.scale
        outputs = [self.network(crops) for crops in crops_of(images, self.runs)]
        if self.class_head is not None:
            outputs = [out._replace(class_logits=self.class_head(out.class_logits)) for out in outputs]
        return self.network.labels(outputs, self.size, self.views)


_Model = TypeVar("_Model", bound=Any)


def in_precision(model: _Model, device: torch.device, dtype: str) -> _Model:
    """The model on a device, in evaluation mode and fused, for images of any size.

    Args:
        dtype: of the network, "float32" (a checkpoint in lower precision stays what it is), "float16" or
            "bfloat16", or "int8": the backbone's projections, and all else in the faster one of float32 and
            bfloat16.
    """
    kind: torch.dtype | None = None
    if dtype == "int8":
        kind = torch.bfloat16 if prefers_bfloat16(device) else torch.float32
    elif dtype != "float32":
        kind = getattr(torch, dtype)
    model.to(device, kind)
    model.eval().fuse()
    if dtype == "int8":
        _pack_int8(model)
    return model


def check_precision(device: torch.device, dtype: str, backend: str | None) -> None:
    """Raise ValueError where a precision has no kernels, on a device and the backend that is asked for."""
    if dtype != "int8":
        return
    if (asked := backend or requested_backend()) not in (None, "cpu"):
        raise ValueError(f"dtype: int8 is computed by the backend cpu, got {asked}")
    _check_int8(device, torch.float32, "dtype")


def _check_int8(device: torch.device, dtype: torch.dtype, argument: str) -> None:
    if reason := why_not_packed(torch.empty(1, 1, dtype=dtype, device=device), int8=True):
        raise ValueError(f"{argument}: {reason}")


def _pack_int8(network: Foldable) -> None:
    for block in network.plain_blocks():
        unpack_linears(block)
        pack_linears(block, int8=True)


def copy_of(model: Foldable) -> Foldable:
    """A deep copy, also where pruning or weight_norm keep weights that are no leaves of autograd's graph."""
    made = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in made})


def _own(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function under a code object of its own: torch.compile keeps no more than eight results for one."""

    def call(images: Tensor) -> Tensor:
        return function(images)

    call.__code__ = call.__code__.replace()
    return call


class _Graph:
    """A function of one tensor as a CUDA graph: copy in, replay, copy out.

    Its buffers are one caller's at a time: threads take turns, and a stream waits for the one before it.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device
    ) -> None:
        with torch.cuda.device(device), without_autocast(device):
            self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    function(self.images)
            current.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.labels = function(self.images)
            self.used = torch.cuda.current_stream().record_event()
        self.function = function  # the graph reads its weights where they are
        self.turn = threading.Lock()

    def __call__(self, images: Tensor) -> Tensor:
        with self.turn, torch.cuda.device(self.images.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.used)
            self.images.copy_(images)
            self.graph.replay()
            labels = self.labels.clone()
            self.used = stream.record_event()
            return labels


def _dtype(model: Foldable, asked: torch.dtype | None) -> torch.dtype:
    """The dtype asked for; else that of a model that was converted; else the faster one of its device."""
    if asked is not None:
        if asked not in _DTYPES:
            raise ValueError(f"dtype: got {asked}, expected one of {', '.join(map(str, _DTYPES))}")
        return asked
    own, device = model.mean.dtype, model.mean.device
    if own == torch.float32 and prefers_bfloat16(device):
        return torch.bfloat16
    return own


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are the faster ones of a device.

    On CPUs with AMX, and with the native library where `segvit_kernels.linear` has packed weights for
    AVX512-FP16, or where there is AVX512-BF16 and nothing above (Zen 4 and later, at twice float32's rate).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if torch.cpu.get_capabilities().get("amx_bf16", False):
        return True
    return runs_isa("avx512_bf16") and requested_backend() in (None, "cpu")


def _method(asked: str, device: torch.device, fp8: bool) -> str:
    if asked not in METHODS:
        raise ValueError(f"method: got {asked!r}, expected one of {', '.join(METHODS)}")
    known = device.type in ("cuda", "cpu")
    if asked == "graph" and not known:
        raise ValueError(f"method: got 'graph' for a model on {device.type}; expected cuda or cpu")
    if asked != "auto":
        return asked
    if fp8:
        return "compile"
    return "graph" if known else "eager"


def _check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    expected = "expected torchao and a GPU of compute capability 8.9 or more"
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"fp8: got a model on {device.type}; {expected}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(f"fp8: got a GPU of compute capability {capability[0]}.{capability[1]}; {expected}")
    if dtype != torch.bfloat16:
        raise ValueError(f"fp8: got dtype {dtype}, expected torch.bfloat16 for what is not in fp8")
    try:
        import_module("torchao.quantization")
    except ImportError as error:
        raise ValueError(
            f"fp8: torchao cannot be imported ({error}); {expected}: pip install torchao"
        ) from None


def _quantise_backbone(network: Foldable) -> None:
    """fp8 weights and, row by row as they come, activations in the blocks' projections."""
    torchao = import_module("torchao.quantization")
    config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    for block in network.plain_blocks():
        torchao.quantize_(block, config)
