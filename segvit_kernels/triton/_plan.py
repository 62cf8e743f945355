"""Launchers that remember what they did.

What a launcher allocates and launches follows from the shapes, strides, dtypes and alignment of its tensors,
from its flags and from the device. :func:`planned` keeps it under just that. The first call builds its
launches and runs them by way of Triton's JIT; a later one with the same key makes the same allocations anew
and hands the compiled kernels their arguments, with other addresses. That takes a tenth of the time, most of
which the JIT would take to find out that it has met these arguments before.

A call takes the long way, whatever is remembered, while Triton's hooks or debugging want to see launches, and
always under Triton's interpreter. Environment variables that change what Triton compiles count as they were
at the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from segvit_kernels.triton._launch import Launch, cdiv

Builder = Callable[..., tuple[Any, Sequence[Launch]]]
MOST = 1024
"""Plans of one launcher; beyond them the oldest goes."""

_ALIGNMENT = 16  # bytes: what the JIT specialises pointers on
_SCRATCH_ALIGNMENT = 256
_POINTER_RANGE = torch.version.hip is not None  # AMD's compiler also asks whether a tensor has 2 GiB
_STREAM = object()  # in its place among the arguments of CompiledKernel.run
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_ZEROS = {torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default}
# On the current device, in a third of the time of torch.empty_strided; no deterministic fill.
_EMPTY_STRIDED = {
    name: getattr(guards, f"_empty_strided_{name}")
    for name in ("cpu", "cuda")
    if hasattr(guards, f"_empty_strided_{name}")
}
_all_plans: list[dict[tuple, _Plan | None]] = []
_INTERPRETED = knobs.runtime.interpret  # as the kernels are, from their decoration on
_lock = threading.Lock()
_NUMBERS = frozenset((type(None), bool, int, float))


class _UnplannableError(Exception):
    """The builder did something that a plan cannot repeat."""


class _Recorder(TorchDispatchMode):
    """What is asked of torch, in order: function, arguments, result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


@dataclasses.dataclass(frozen=True)
class _Place:
    """An address: ``offset`` bytes into a tensor, one of the launcher's or, numbered on, of those it made."""

    slot: int
    offset: int = 0


@dataclasses.dataclass
class _Made:
    """A tensor that a builder made: empty, zeroed, or ``function`` of ``args``, where places are tensors."""

    tensor: Tensor
    zeroed: bool = False
    function: Callable[..., Tensor] | None = None
    args: tuple = ()

    def slots(self) -> tuple[int, ...]:
        """Of the tensors among ``args``."""
        return tuple(leaf.slot for leaf in tree_leaves(self.args) if isinstance(leaf, _Place))

    def maker(self) -> Callable[..., Tensor]:
        """Makes another such tensor; takes the tensors of ``slots``."""
        function, places = self.function, self.args  # without self, whose tensor would live as long as a plan
        if function is None:
            return _allocation(self.tensor.shape, self.tensor.stride(), self.tensor, self.zeroed)

        def compute(*given: Tensor) -> Tensor:
            rest = iter(given)
            args, kwargs = tree_map(lambda leaf: next(rest) if isinstance(leaf, _Place) else leaf, places)
            return function(*args, **kwargs)

        return compute


def _like(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _allocation(
    size: Sequence[int], stride: Sequence[int], like: Tensor, zeroed: bool, dtype: torch.dtype | None = None
) -> Callable[[], Tensor]:
    size, stride, dtype = tuple(size), tuple(stride), dtype or like.dtype
    if like.device.type in _EMPTY_STRIDED and not torch.are_deterministic_algorithms_enabled():
        empty = functools.partial(_EMPTY_STRIDED[like.device.type], size, stride, dtype)
    else:
        empty = functools.partial(torch.empty_strided, size, stride, dtype=dtype, device=like.device)
    return (lambda: empty().zero_()) if zeroed else empty


class _Trace:
    """Which tensors a builder made of those it was given, and the place of each that it could launch on."""

    def __init__(self, tensors: Sequence[Tensor], calls: Sequence[tuple[Any, tuple, dict, Any]]) -> None:
        self.first = len(tensors)
        self.made: list[_Made] = []
        self.places = {id(tensor): _Place(slot) for slot, tensor in enumerate(tensors)}
        self.whole = set(self.places)  # without views of a part, or of another shape
        for call in calls:
            self._add(*call)

    def place(self, tensor: Tensor) -> _Place:
        if id(tensor) not in self.places:
            raise _UnplannableError("a tensor comes from elsewhere")
        return self.places[id(tensor)]

    def _add(self, function: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise _UnplannableError(f"{function} does not give one tensor")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function is torch.ops.aten.zero_.default:
            index = self.place(out).slot - self.first
            if index < 0 or id(out) not in self.whole:
                raise _UnplannableError("zeroes part of a tensor, or one that it was given")
            self.made[index].zeroed = True
            return
        if function._schema.is_mutable:
            raise _UnplannableError(f"{function} writes")
        storage = out.untyped_storage()._cdata
        source = next((t for t in given if t.untyped_storage()._cdata == storage), None)
        if source is not None:
            there = self.place(source)
            offset = there.offset + out.data_ptr() - source.data_ptr()
            self.places[id(out)] = _Place(there.slot, offset)
            if id(source) in self.whole and _like(out, source):
                self.whole.add(id(out))
            return
        if out.data_ptr() % _ALIGNMENT:
            raise _UnplannableError("the allocator does not align")
        if function in _EMPTY or function in _ZEROS:
            made = _Made(out, zeroed=function in _ZEROS)
        else:
            if any(id(tensor) not in self.whole for tensor in given):
                raise _UnplannableError(f"{function} computes from a view")
            places = tree_map(
                lambda leaf: self.place(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
            )
            made = _Made(out, function=function, args=places)
        self.places[id(out)] = _Place(self.first + len(self.made))
        self.whole.add(id(out))
        self.made.append(made)


class _Plan(NamedTuple):
    """One call of a launcher, without its tensors.

    Args:
        makes: functions that make tensors, and the slots of the tensors that they take.
        shifted: addresses inside tensors: slot and offset.
        constants: of all launches.
        launches: ``run`` of a compiled kernel, and what takes its arguments from the list of the stream, the
            addresses of tensors, those inside tensors, and the constants.
        results: what takes the results from the list of tensors.
    """

    makes: tuple[tuple[Callable[..., Tensor], tuple[int, ...]], ...]
    shifted: tuple[tuple[int, int], ...]
    constants: tuple[Any, ...]
    launches: tuple[tuple[Callable, Callable], ...]
    results: Callable[[list[Tensor]], Any]

    def __call__(self, tensors: list[Tensor], addresses: list[int], stream: int) -> Any:
        for make, given in self.makes:
            tensor = make(*[tensors[slot] for slot in given]) if given else make()
            tensors.append(tensor)
            addresses.append(tensor.data_ptr())
        if self.shifted:
            addresses += [addresses[slot] + offset for slot, offset in self.shifted]
        values = (stream, *addresses, *self.constants)
        for run, arguments in self.launches:
            run(*arguments(values))
        return self.results(tensors)


def _plan(
    trace: _Trace,
    results: tuple[Tensor, ...] | list[Tensor],
    launches: Sequence[Launch],
    compiled: Sequence[Any],
) -> _Plan:
    """What a call did, to be done again."""
    if not all(isinstance(kernel, CompiledKernel) for kernel in compiled):
        raise _UnplannableError("not compiled: the interpreter, or a hook in place of the compiler")
    first, made = trace.first, trace.made
    kept = {trace.place(result).slot for result in results}.union(*(m.slots() for m in made))
    if any(id(result) not in trace.whole for result in results):
        raise _UnplannableError("a result is part of another tensor")
    makes, moved = [], {slot: _Place(slot) for slot in range(first)}
    for slot, m in enumerate(made, first):
        if slot in kept or m.function is not None:
            moved[slot] = _Place(first + len(makes))
            makes.append((m.maker(), tuple(moved[s].slot for s in m.slots())))
    # What is left is scratch memory: one allocation, and one more if some of it begins as zeros.
    for zeroed in (False, True):
        size, buffer = 0, first + len(makes)
        for slot, m in enumerate(made, first):
            if slot not in moved and m.zeroed == zeroed:
                moved[slot] = _Place(buffer, size)
                size += _SCRATCH_ALIGNMENT * cdiv(
                    max(1, m.tensor.untyped_storage().nbytes()), _SCRATCH_ALIGNMENT
                )
        if size:
            like = made[0].tensor
            makes.append((_allocation((size,), (1,), like, zeroed, torch.uint8), ()))

    def place(tensor: Tensor) -> tuple[int, int]:
        there = trace.place(tensor)
        return moved[there.slot].slot, moved[there.slot].offset + there.offset

    tensors = [v for launch in launches for v in launch.arguments.values() if isinstance(v, Tensor)]
    shifted = sorted({p for p in map(place, tensors) if p[1]})
    addresses = 1 + first + len(makes)
    constants: list[Any] = []

    def index(value: Any) -> int:
        """Where the value is found among those of a call."""
        if value is _STREAM:
            return 0
        if isinstance(value, Tensor):
            slot, offset = place(value)
            return addresses + shifted.index((slot, offset)) if offset else 1 + slot
        constants.append(value)
        return addresses + len(shifted) + len(constants) - 1

    runs = []
    for launch, kernel in zip(launches, compiled, strict=True):
        values = launch.arguments | launch.constants
        head = (launch.programs, 1, 1, _STREAM, kernel.function, kernel.packed_metadata, None, None, None)
        row = (*head, *(values[name] for name in launch.kernel.arg_names))
        runs.append((kernel.run, operator.itemgetter(*map(index, row))))
    kind, slots = type(results), [place(result)[0] for result in results]
    if kind is tuple and len(slots) > 1:
        take = operator.itemgetter(*slots)
    else:
        take = lambda tensors: kind([tensors[slot] for slot in slots])  # noqa: E731
    return _Plan(tuple(makes), tuple(shifted), tuple(constants), tuple(runs), take)


def _key(args: Sequence[Any], device: int) -> tuple[tuple, list[Tensor], list[int]]:
    """What a plan depends on, the tensors among the arguments (those in lists last) and their addresses."""
    key: list[Any] = [device, torch.are_deterministic_algorithms_enabled()]
    tensors: list[Tensor] = []
    addresses: list[int] = []
    rest = [*args]
    for value in rest:
        kind = type(value)
        if kind in _NUMBERS:
            key.append(value)
        elif kind is list or kind is tuple:
            key.append(len(value))
            rest += value
        elif isinstance(value, Tensor):
            address = value.data_ptr()
            tensors.append(value)
            addresses.append(address)
            key.append((value.shape, value.stride(), value.dtype, value.device, address % _ALIGNMENT))
            if _POINTER_RANGE:
                key.append(value.untyped_storage().nbytes() < 2**31)
        else:
            key.append(value)
    return tuple(key), tensors, addresses


def _watched() -> Any:
    """Whether launches are to go through Triton's JIT: under its interpreter, and while somebody looks."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        _INTERPRETED
        or getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or vars(knobs.compilation).get("instrumentation_mode")
    )


def _first(
    build: Callable[..., tuple[Any, Sequence[Launch]]], args: Sequence[Any]
) -> tuple[Any, _Plan | None]:
    """The results of a first call, and its plan."""
    # A tensor given twice is two arguments: the next call may give two tensors.
    args = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, args)
    with _Recorder() as recorder:
        results, launches = build(*args)
    compiled = [launch() for launch in launches]
    try:
        trace = _Trace(_key(args, 0)[1], recorder.calls)
        return results, _plan(trace, results, launches, compiled)
    except _UnplannableError:
        return results, None


def planned(build: Builder) -> Callable[..., Any]:
    """A launcher: runs the launches that ``build`` gives, returns its results, and remembers both.

    ``build`` takes tensors, lists of tensors or numbers, and numbers; it gives its results, tensors that it
    made, and the launches that fill them. What it does may depend on anything but what is in the tensors. The
    launcher takes the same arguments; with a keyword argument (``config``) nothing is remembered.
    """
    plans: dict[tuple, _Plan | None] = {}  # None where there can be none
    _all_plans.append(plans)

    @functools.wraps(build)
    def launcher(*args: Any, **options: Any) -> Any:
        if not options and not _watched():
            device = driver.active.get_current_device()
            key, tensors, addresses = _key(args, device)
            plan = plans.get(key, plans)
            if plan is plans:
                results, plan = _first(build, args)
                with _lock:
                    plans[key] = plan
                    if len(plans) > MOST:
                        del plans[next(iter(plans))]
                return results
            if plan is not None:
                return plan(tensors, addresses, driver.active.get_current_stream(device))
        results, launches = build(*args, **options)
        for launch in launches:
            launch()
        return results

    return launcher


def forget() -> None:
    """Drop all plans: what they were made from, the pinned parameters, has changed."""
    with _lock:
        for plans in _all_plans:
            plans.clear()
