"""A linear layer with packed weights, of 8 bits where that is asked for, on x86 CPUs.

    Z = R + γ · GELU(X Wᵀ + b)      X = LN(X₀)      GELU(x) = x Φ(x)

LayerNorm before it, and GELU, LayerScale γ and residual R behind it, each where it is asked for. Layout is
(..., features). Nothing is kept for a backward: where a gradient is asked for, and under autocast, the layer
is PyTorch's own. W is packed once, in the order of the kernel that this processor has (:func:`pack_weight`).

**AMX** and **AVX512-BF16**, bfloat16: products of bfloat16 numbers added in float32, and all that follows in
float32; the result and a normalised X are rounded once. Numbers below the normal range are zero. W lies in
panels of 32 outputs, a part of 32 of the depth after the other, in two tiles of 16 outputs: row i of a tile
holds elements 2i and 2i + 1 of the depth of every output.

**int8**, where it is asked for, on AMX, AVX512-VNNI or AVX2: the weights of every output and the numbers of
every row of X are divided by a 127th of their largest magnitude and rounded, X as the calls come and after
LayerNorm in float32. Products are exact, and so bit by bit the same on all three; the scales come on in
float32, as all that follows. X and the result are float32, float16 or bfloat16. A row with an infinity or NaN
becomes NaN. A tile has four elements of the depth where bfloat16 has two.

**AVX512-FP16**: bfloat16 dot products are no faster than float32 arithmetic on CPUs without matrix
units, but float16 multiply-adds are, by two. The kernel runs on these: rows of X and columns of Wᵀ are scaled
by powers of two, so that nothing leaves the range of float16. Products are added in float16 in chains of 32
and groups of four such chains, and these in float32: the error, 2⁻¹⁰ of a typical result, is half of the
rounding of a bfloat16 result and four times that of a float16 result. A number of X or W is exact down to
2⁻²⁰ (float16: 2⁻¹⁷) of the largest finite one in its row, and below errs by 2⁻²⁸ of that at most. W lies in
panels of 48 outputs, float16. The depth goes by pairs of numbers; of 16 pairs the order is 0, 4, 8, 12, 1, 5,
…, which transposing X in registers gives. LayerNorm, LayerScale and residual are PyTorch's there.

**AVX2**, or AVX-512 with the same panels: float32 where this is faster than PyTorch's own product, float16
where there is no AVX512-FP16, bfloat16 where there is no AVX512-BF16 either. To such processors numbers of
half precision are for storage, and PyTorch multiplies them at a fifth of float32's rate (bfloat16 with
AVX-512 at two fifths). They become float32 on the way, and all is computed in float32: the result alone is
rounded. W lies in panels of 32 outputs, two times 16 of them after the other, in W's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels._autocast import autocast_dtype
from segvit_kernels.ops._autograd import differentiable, transformed
from segvit_kernels.ops._checks import flag, number

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_HALVES)
_KERNELS = {"avx2": "AVX2", "avx512_bf16": "AVX512-BF16", "avx512_fp16": "AVX512-FP16"}
_MOST_INT8 = 2**16  # of the depth: sums fit in 32 bits
_DEPTH = 32
_TOP = 3  # scaled numbers lie below 2^4

Norm = tuple[Tensor | None, Tensor | None, float]
"""Weight, bias and epsilon of a LayerNorm."""


@_library.exportable
class PackedWeight(NamedTuple):
    """A weight (N, K) for one of the kernels.

    Attributes:
        panels: AMX, AVX512-BF16: bfloat16, (⌈N/32⌉, ⌈K/32⌉, 2, 16, 32). int8: (⌈N/32⌉, ⌈K/64⌉, 2, 16, 64).
            AVX512-FP16: float16, (⌈N/48⌉, ⌈K/32⌉·16, 48, 2). AVX2: in W's dtype, (2·⌈N/32⌉, K, 16).
        factors: float32, of every output, padded as in ``panels``. int8: the scale of its weights.
            AVX512-FP16: e, where weights are 2^(e - 3) times those in ``panels``. Otherwise ``None``.
    """

    panels: Tensor
    factors: Tensor | None

    @property
    def isa(self) -> str:
        """The instruction set of its kernel, the least one."""
        return {3: "avx2", 4: "avx512_fp16", 5: "avx2" if self.int8 else "avx512_bf16"}[self.panels.ndim]

    @property
    def int8(self) -> bool:
        return self.panels.dtype == torch.int8

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the numbers that its kernel is for."""
        return _FLOATS if self.int8 else _HALVES if self.isa == "avx512_fp16" else (self.panels.dtype,)

    @property
    def exact(self) -> bool:
        """Whether the weight is in it as it was."""
        return not self.int8 and self.isa != "avx512_fp16"

    def unpacked(self, shape: Sequence[int]) -> Tensor:
        """The weight (N, K) of an exact order."""
        panels, (outputs, depth) = self.panels, shape
        if panels.ndim == 3:
            return panels.transpose(1, 2).flatten(0, 1)[:outputs]
        tiles = panels.unflatten(-1, (16, 2))  # panel, part, half, row, output, element
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)[:outputs, :depth]


@torch.no_grad()
def pack_weight(weight: Tensor, isa: str | None = None, *, int8: bool = False) -> PackedWeight:
    """A weight in a kernel's order, for the argument ``packed`` of :func:`linear`.

    Args:
        weight: (N, K), float32, float16 or bfloat16.
        isa: of the kernel, ``"amx"`` or ``"avx512_bf16"`` (bfloat16 alone, one order), ``"avx512_fp16"`` or
            ``"avx2"``; by default the fastest that runs here. int8 has one order for all.
        int8: round to 8 bits; a depth of 65536 at most.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or instruction set.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS:
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {found}; expected {_names(_FLOATS)}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (outputs, inputs), at least one of both"
        )
    known = ("amx", "avx512", "avx2") if int8 else _sets(weight.dtype)
    if isa is None:
        isa = "avx2" if int8 else next(filter(_library.runs_isa, known), known[-1])
    if isa not in known:
        expected = " or ".join(", ".join(map(repr, part)) for part in (known[:-1], known[-1:]) if part)
        raise ValueError(f"isa is {isa!r}, weight {weight.dtype}; expected {expected}")
    if int8 and weight.shape[1] > _MOST_INT8:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected at most {_MOST_INT8} inputs in int8"
        )
    if int8:
        return _tiles(*_rounded(weight), 64)
    if isa in ("amx", "avx512_bf16"):
        return _tiles(weight, None, 32)
    if isa == "avx2":
        rest = -weight.shape[0] % 32
        halves = (F.pad(weight, (0, 0, 0, rest)) if rest else weight).unflatten(0, (-1, 16))
        return PackedWeight(halves.transpose(1, 2).contiguous(), None)
    panel, (outputs, depth) = 48, weight.shape
    panels, groups = -(-outputs // panel), -(-depth // _DEPTH)
    padding = (0, groups * _DEPTH - depth, 0, panels * panel - outputs)
    values = weight.float()
    largest = values.abs().nan_to_num(posinf=0).amax(1)
    exponents = torch.where(largest > 0, torch.frexp(largest).exponent - 1, 0)
    # In float64, which holds the power of two for the smallest numbers too.
    values = (values.double() * torch.exp2(_TOP - exponents.double())[:, None]).half()
    values = F.pad(values, padding).contiguous()
    pairs = values.view(torch.int32).view(panels, panel, groups, 4, 4).permute(0, 2, 4, 3, 1).contiguous()
    return PackedWeight(
        pairs.view(torch.float16).view(panels, groups * _DEPTH // 2, panel, 2),
        F.pad(exponents.float(), (0, panels * panel - outputs)),
    )


def _sets(dtype: torch.dtype) -> tuple[str, ...]:
    """Whose kernels there are for numbers of a dtype, the fastest first."""
    if dtype == torch.bfloat16:
        return ("amx", "avx512_fp16", "avx512_bf16", "avx2")
    return ("avx512_fp16", "avx2") if dtype == torch.float16 else ("avx2",)


def _best(dtype: torch.dtype) -> str | None:
    """The set whose kernel is faster here than PyTorch's own product."""
    # Of float32 PyTorch has AVX2's alone on AMD's (Zen 4 and later); on Intel's with AVX-512 it has a product
    # that the kernel has not been measured against.
    amd = _library.runs_isa("avx512_bf16") and not _library.runs_isa("avx512_fp16")
    if dtype == torch.float32 and _library.runs_isa("avx512") and not amd:
        return None
    return next(filter(_library.runs_isa, _sets(dtype)), None)


def _tiles(weight: Tensor, factors: Tensor | None, part: int) -> PackedWeight:
    """A weight in tiles of 16 outputs, a part of the depth each."""
    outputs, depth = weight.shape
    panels, groups = -(-outputs // 32), -(-depth // part)
    more = (0, panels * 32 - outputs)
    weight = F.pad(weight, (0, groups * part - depth, *more))
    tiles = weight.view(panels, 2, 16, groups, 16, part // 16)  # half, output; part, row, element
    tiles = tiles.permute(0, 3, 1, 4, 2, 5).reshape(panels, groups, 2, 16, part)
    return PackedWeight(tiles, None if factors is None else F.pad(factors, more))


def _names(kinds: tuple[torch.dtype, ...]) -> str:
    *most, last = (str(kind).removeprefix("torch.") for kind in kinds)
    return f"{', '.join(most)} or {last}" if most else last


def _rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in int8, and their scales: a 127th of the largest magnitude, NaN where one is not finite."""
    values = values.float()
    scales = values.abs().amax(-1) / 127 + (values * 0).sum(-1)
    return (values / scales[..., None]).round().nan_to_num(0).to(torch.int8), scales


def linear_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The meaning of :func:`linear` in ordinary PyTorch."""
    output = F.linear(_normalised(input, norm), weight, bias)
    return _finished(F.gelu(output) if gelu else output, scale, residual)


def _normalised(input: Tensor, norm: Norm | None) -> Tensor:
    return input if norm is None else F.layer_norm(input, input.shape[-1:], *norm)


def _finished(output: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    output = output if scale is None else output * scale
    return output if residual is None else residual + output


def _eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    factors: Tensor | None,
    gelu: bool,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    norm = None if norm_weight is None else (norm_weight, norm_bias, norm_eps)
    weight = whole_weight(weight, None if panels is None else PackedWeight(panels, factors))
    output = linear_reference(input, weight, bias, gelu=gelu, norm=norm, scale=scale, residual=residual)
    return output.contiguous()  # a residual's layout would be that of the sum


def _fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _macs(input: tuple[int, ...], weight: tuple[int, ...], *_: Any) -> int:
    return torch.Size(input).numel() * weight[0]


def _refuse(backend: str, input: Tensor, weight: Tensor, bias: Any, panels: Any, *_: Any) -> Exception | None:
    if input.dtype not in _FLOATS:
        return TypeError(f"backend {backend!r} takes {_names(_FLOATS)}; input is {input.dtype}")
    if panels is None:
        return ValueError(f"backend {backend!r} takes packed weights; packed is None: see pack_weight")
    packed = PackedWeight(panels, None)
    if input.dtype not in packed.dtypes:
        return _other_numbers(packed, input)
    if not _library.runs_isa(packed.isa):
        return ValueError(f"packed is for {_KERNELS[packed.isa]}, and the CPU code in use is not")
    return None


def _other_numbers(packed: PackedWeight, input: Tensor) -> TypeError:
    kinds = "half-precision" if len(packed.dtypes) == 2 else _names(packed.dtypes)
    return TypeError(f"packed is for {_KERNELS[packed.isa]}, of {kinds} numbers; input is {input.dtype}")


_linear = _library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? panels, Tensor? factors, bool gelu, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=0.0, Tensor? scale=None, "
    "Tensor? residual=None) -> Tensor output",
    eager=_eager,
    fake=_fake,
    macs=_macs,
    refuse=_refuse,
    backends=("cpu",),
    isa="avx2",
)


def why_not_packed(weight: Tensor, *, int8: bool = False) -> str | None:
    """Why packing a weight (to 8 bits) would gain nothing here: PyTorch's own layer would run; ``None`` if it
    gains."""
    if weight.dtype not in _FLOATS:
        return f"{'int8' if int8 else 'packed'} weights are for {_names(_FLOATS)}, not {weight.dtype}"
    if weight.device.type != "cpu":
        return f"packed weights are for the CPU, not {weight.device.type}"
    if weight.numel() == 0:
        return "the weight is empty"
    if int8 and weight.ndim == 2 and weight.shape[1] > _MOST_INT8:
        return f"int8 weights have at most {_MOST_INT8} inputs, not {weight.shape[1]}"
    reason = _library.why_not_operator("linear", "cpu", weight.device)
    if reason is None and not _library.runs_isa("avx2"):
        reason = "linear needs avx2 for packed weights"
    elif reason is None and not int8 and _best(weight.dtype) is None:
        return f"PyTorch's own product of {weight.dtype} is the faster one here"
    if reason and int8:
        return f"int8 weights need a CPU with AVX2 and the native library ({reason})"
    return reason


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    packed: PackedWeight | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.linear`` with what stands around it in a transformer, in one pass where there are packed weights.

    Packed weights are used on x86 CPUs with AVX2, in half precision with AVX512-FP16 or AMX and in int8 with
    AVX512-VNNI or AMX too, without autograd and without autocast; in all other cases, and on the backend
    ``eager``, this is PyTorch's own layer. How it is computed, and how exactly, stands at the top of
    this module.

    Args:
        input: (..., K), float16, bfloat16, float32 or float64.
        weight: (N, K), dtype of ``input``.
        bias: (N,), dtype of ``input``, or ``None``.
        packed: of :func:`pack_weight`, made from this very weight.
        gelu: apply the exact (erf) GELU.
        norm: weight and bias, (K,) or ``None``, and epsilon of a LayerNorm of the input, which comes first;
            rows that spread beyond 1e19 as in :func:`segvit_kernels.subsample_layer_norm`.
        scale: (N,), what the result is multiplied by, after the GELU.
        residual: (..., N), what is added in the end.
        backend: ``"eager"`` or ``"cpu"``; chosen by device unless given.

    Returns:
        (..., N), dtype of ``input``.

    Raises:
        TypeError: dtypes differ or are not supported.
        ValueError: shapes or devices disagree, ``packed`` is not of this weight's shape, or the backend is
            unknown.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    around: dict[str, Any] = {"norm": norm, "scale": scale, "residual": residual}
    _check_kinds(norm, input=input, weight=weight, bias=bias, scale=scale, residual=residual)
    flag("gelu", gelu)
    autograd = transformed(backend) or differentiable(input, weight, bias, *(norm or ())[:2], scale, residual)
    autocast = autocast_dtype(input.device) is not None
    if packed is not None:
        _check_packed(packed)
    plain = packed is None or (
        input.dtype not in packed.dtypes and torch.float32 in (input.dtype, packed.panels.dtype)
    )
    if backend is None and (plain or autograd or autocast):
        _validate(input, weight, bias, None, **around, alike=not autocast)  # which makes dtypes alike
        return linear_reference(input, whole_weight(weight, packed), bias, gelu=gelu, **around)
    _validate(input, weight, bias, packed, **around)
    if autograd and backend == "eager":
        return linear_reference(input, whole_weight(weight, packed), bias, gelu=gelu, **around)
    if autograd and backend in _library.BACKENDS:
        raise _library.BackendUnavailableError(
            f"segvit::linear: backend {backend!r} has no derivative: use eager, or torch.no_grad()"
        )
    if norm is not None and norm[0] is None:  # to the operator no weight is no norm
        norm = (input.new_ones(input.shape[-1]), *norm[1:])
    nothing, packing = (None, None, 0.0), packed or (None, None)
    if packed is not None and packed.isa == "avx512_fp16":  # whose kernel knows nothing of what is around
        input = _normalised(input, norm)
        output = _linear(input, weight, bias, *packing, gelu, *nothing, None, None, backend)
        return _finished(output, scale, residual)
    return _linear(input, weight, bias, *packing, gelu, *(norm or nothing), scale, residual, backend)


def whole_weight(weight: Tensor, packed: PackedWeight | None) -> Tensor:
    """A weight; of one that is a shape alone (:meth:`segvit_kernels.PackedLinear.release`) what is packed.

    Raises:
        RuntimeError: that is not exact.
    """
    if packed is None or weight.stride() != (0, 0):
        return weight
    if not packed.exact:
        raise RuntimeError(
            "a weight was left out that its packed numbers do not give back; expected a call that reads these"
        )
    return packed.unpacked(weight.shape)


def _check_packed(packed: PackedWeight) -> None:
    """Raise TypeError for what `pack_weight` does not give."""
    panels, factors = packed if isinstance(packed, PackedWeight) else (None, None)
    ranks = {torch.float32: (3,), torch.float16: (3, 4), torch.bfloat16: (3, 5), torch.int8: (5,)}
    if not isinstance(panels, Tensor) or panels.dtype not in ranks:
        found = panels.dtype if isinstance(panels, Tensor) else type(packed).__name__
        raise TypeError(f"packed is {found}; expected what pack_weight gives")
    if panels.ndim not in ranks[panels.dtype]:
        shape = tuple(panels.shape)
        raise TypeError(
            f"packed has panels of shape {shape}, {panels.dtype}; expected what pack_weight gives"
        )
    if not isinstance(factors, Tensor) and (
        factors is not None or panels.ndim == 4 or panels.dtype == torch.int8
    ):
        raise TypeError(f"packed has factors {type(factors).__name__}; expected what pack_weight gives")


def _check_kinds(norm: Any, **tensors: Any) -> None:
    """Raise TypeError for what is no tensor, and no LayerNorm."""
    if norm is not None:
        if not isinstance(norm, tuple) or len(norm) != 3:
            raise TypeError("norm is no tuple of three; expected weight, bias and epsilon of a LayerNorm")
        tensors |= {"norm's weight": norm[0], "norm's bias": norm[1]}
        number("norm's epsilon", norm[2], 0)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("input", "weight")):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")


def _validate(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: PackedWeight | None,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
    alike: bool = True,
) -> None:
    if not input.is_floating_point():
        raise TypeError(f"input has dtype {input.dtype}; expected a floating dtype")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (outputs, inputs)")
    outputs, depth = weight.shape
    if input.ndim < 1 or input.shape[-1] != depth:
        raise ValueError(f"input has shape {tuple(input.shape)}; expected (..., {depth}), as weight has")
    norm_weight, norm_bias, _ = norm or (None, None, 0.0)
    for name, tensor, shape in (
        ("weight", weight, (outputs, depth)),
        ("bias", bias, (outputs,)),
        ("norm's weight", norm_weight, (depth,)),
        ("norm's bias", norm_bias, (depth,)),
        ("scale", scale, (outputs,)),
        ("residual", residual, (*input.shape[:-1], outputs)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if alike and tensor.dtype != input.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {input.dtype}, the dtype of input")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {input.device}, the device of input")
    if packed is None:
        return
    if input.dtype not in packed.dtypes:
        raise _other_numbers(packed, input)
    panels, panel = -(-outputs // 32), 32
    if packed.panels.ndim == 5:
        part = 64 if packed.int8 else 32
        expected: tuple[int, ...] = (panels, -(-depth // part), 2, 16, part)
    elif packed.panels.ndim == 3:
        expected = (2 * panels, depth, 16)
    else:
        panels, panel = -(-outputs // 48), 48
        expected = (panels, -(-depth // _DEPTH) * _DEPTH // 2, panel, 2)
    if tuple(packed.panels.shape) != expected:
        raise ValueError(
            f"packed has panels of shape {tuple(packed.panels.shape)}; expected {expected}, those of weight"
        )
    factors = packed.factors
    if factors is not None and (factors.shape != (panels * panel,) or factors.dtype != torch.float32):
        found = f"{tuple(factors.shape)}, {factors.dtype}"
        raise ValueError(f"packed has factors {found}; expected ({panels * panel},), torch.float32")
