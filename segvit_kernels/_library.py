"""Registration and dispatch of the operators: the only place that talks to ``torch.library``.

Every operator is one call to :func:`define` with its schema, its eager implementation, its shapes
(``fake``) and its multiply-accumulate count (``macs``). The dispatch to a backend happens *inside*
the operator, so that choosing another backend neither breaks nor recompiles a compiled graph.

============ ======================================================= ==============================
backend      where it lives                                          takes
============ ======================================================= ==============================
``eager``    ``segvit_kernels/ops/<stem>.py``, plain PyTorch         any device, float64 included
``triton``   ``segvit_kernels/triton/<stem>.py``                     CUDA and ROCm tensors; CPU tensors
                                                                     under Triton's interpreter
``cuda``     ``csrc/cuda/<stem>.*``, in the native library          CUDA tensors
``cpu``      ``csrc/cpu/<stem>.cpp``, in the native library          CPU tensors
============ ======================================================= ==============================

Without a choice a call takes the first of ``triton``, ``cuda``, ``cpu`` that can run it, else ``eager``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from segvit_kernels import _native
from segvit_kernels._autocast import without_autocast

BACKENDS = ("eager", "triton", "cuda", "cpu")
_PREFERRED = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}  # by type of device
_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_fp16", "amx")
ENVIRONMENT_VARIABLE = "SEGVIT_KERNELS_BACKEND"
_ENVIRONMENT_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)

_chosen: dict[object, str] = {}  # what each `with backend(...)` block asks for, the last to begin last
_operators: dict[str, Operator] = {}
_records: list[dict[str, set[str]]] = []  # of each `with record_backends()` block


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here; the message says why and what mends it."""


def _checked(name: str | None, origin: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def check_backend(argument: str | None) -> None:
    """Raises ValueError where the argument ``backend`` of an operator is none; its schema would say less."""
    _checked(argument, "argument 'backend'")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator of this package on backend ``name`` inside the ``with`` block.

    The choice is process wide, like ``torch.backends`` flags, so that the autograd thread sees it too.
    It outranks the environment variable ``SEGVIT_KERNELS_BACKEND`` and is outranked by the ``backend=``
    argument of a function. Of blocks of several threads the last to begin holds.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    _checked(name, "backend")
    block = object()
    _chosen[block] = name
    try:
        yield
    finally:
        del _chosen[block]


@contextlib.contextmanager
def record_backends() -> Iterator[dict[str, set[str]]]:
    """Collect, for every operator that runs inside the ``with`` block, the backends that it took.

    Process wide, like :func:`backend`; of blocks within each other the inner one. Yields a dict that fills:
    operator name -> names of backends.
    """
    record: dict[str, set[str]] = {}
    _records.append(record)
    try:
        yield record
    finally:
        del _records[next(i for i, one in enumerate(_records) if one is record)]


def backends_are_recorded() -> bool:
    """Whether some :func:`record_backends` block is open."""
    return bool(_records)


def requested_backend(argument: str | None = None) -> str | None:
    """The backend asked for by argument, context manager or environment, in that order; ``None`` if none."""
    if argument is not None:
        return _checked(argument, "argument 'backend'")
    if _chosen and (names := list(_chosen.values())):  # in one step, beside blocks of other threads
        return names[-1]
    try:
        # What os.environ.get does, without encoding the name at every call: a microsecond.
        if _ENVIRONMENT_KEY not in os.environ._data:  # type: ignore[attr-defined]
            return None
    except AttributeError:  # an ordinary dict in place of it
        pass
    return _checked(
        os.environ.get(ENVIRONMENT_VARIABLE) or None, f"environment variable {ENVIRONMENT_VARIABLE}"
    )


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _compute_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not(name: str, device: torch.device | str) -> str | None:
    """Why backend ``name`` cannot run on tensors of ``device``, with what mends it; ``None`` if it can.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    _checked(name, "backend")
    device = torch.device(device)
    if name == "eager":
        return None
    capability = None
    if device.type == "cuda":
        try:
            capability = _compute_capability(device.index or 0)
        except (RuntimeError, AssertionError) as error:  # no driver, no such GPU, or a torch without CUDA
            return f"there is no device {device}: {str(error).partition(chr(10))[0]}"
    if name != "triton":
        return _native.why_not(name, device, capability)
    if not _triton_installed():
        return "Triton is not installed: pip install triton"
    if device.type == "cuda":
        if torch.version.hip is None and capability is not None and capability < (8, 0):
            return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}: use eager"
        return None
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    return f"no Triton kernels for {device.type} tensors: use eager"


def runs_isa(isa: str) -> bool:
    """Whether the native CPU kernels in use are those of an instruction set or of a greater one.

    Args:
        isa: "portable", "avx2", "avx512", "avx512_bf16", "avx512_fp16" or "amx".

    Raises:
        ValueError: ``isa`` is none of these.
    """
    if isa not in _ISAS:
        raise ValueError(f"isa is {isa!r}; expected one of {', '.join(_ISAS)}")
    return _native.runs_isa(isa)


def device_of(args: Sequence[Any]) -> torch.device:
    """The device of the first tensor among arguments that are tensors, lists of them, or something else."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, Tensor):
            return first.device
    raise TypeError("no tensor among the arguments")


@functools.cache
def _type(device: torch.device) -> str:
    """``device.type``, which makes a new string every time."""
    return device.type


class Operator:
    """One operator, its implementations and how a call finds its backend."""

    def __init__(
        self,
        name: str,
        eager: Callable,
        macs: Callable,
        refuse: Callable | None,
        backends: tuple[str, ...],
        isa: str | None,
    ):
        self.name = name
        # ops/<stem>.py, or ops/_<stem>_eager.py where that is long.
        self.stem = eager.__module__.rpartition(".")[2].removeprefix("_").removesuffix("_eager")
        self.eager = eager
        self.macs = macs
        self.refuse = refuse
        self.backends = backends
        self.isa = isa
        self.arity = 0  # arguments without the backend
        self.kernels: dict[str, Callable] = {}  # by backend, filled at the first call
        self.defaults: dict[torch.device, str] = {}

    def why_not(self, name: str, device: torch.device) -> str | None:
        """Why this operator cannot run on backend ``name`` on a device; ``None`` if it can."""
        if name not in self.backends:
            return f"{self.name} has no kernel for it"
        reason = why_not(name, device)
        if reason is None and name in ("cuda", "cpu"):
            return _native.why_not_operator(name, self.name, device, self.isa)
        return reason

    def default(self, device: torch.device) -> str:
        """The backend of calls that ask for none."""
        if device not in self.defaults:
            names = _PREFERRED.get(device.type, ())
            self.defaults[device] = next((n for n in names if self.why_not(n, device) is None), "eager")
        return self.defaults[device]

    def select(self, device: torch.device, args: Sequence[Any], argument: str | None) -> str:
        """The backend of one call. An explicit choice that cannot be honoured raises; it never falls back."""
        asked = requested_backend(argument)
        name = asked or self.defaults.get(device) or self.default(device)
        if name == "eager":
            return name
        if asked and (reason := self.why_not(name, device)) is not None:
            raise BackendUnavailableError(f"segvit::{self.name}: backend {name!r} is not available: {reason}")
        error = self.refuse(name, *args) if self.refuse else None
        if error is None:
            return name
        if asked:
            raise error
        return "eager"

    def kernel(self, name: str, device: torch.device) -> Callable:
        """The implementation of a backend, imported or loaded when it is first needed."""
        if name not in self.kernels:
            if name == "triton":
                module = importlib.import_module(f"{__package__}.triton.{self.stem}")
                self.kernels[name] = getattr(module, self.name)
            else:
                self.kernels[name] = _native.implementation(name, self.name, device)
        return self.kernels[name]

    def __call__(self, args: Sequence[Any], argument: str | None) -> Any:
        device = device_of(args)
        name = self.select(device, args, argument)
        for record in _records[-1:]:
            record.setdefault(self.name, set()).add(name)
        if name != "eager":
            kernel = self.kernels.get(name) or self.kernel(name, device)
            if _type(device) != "cuda" or device.index == torch.cuda.current_device():
                return kernel(*args)
            with torch.cuda.device(device):
                return kernel(*args)
        with without_autocast(device):  # it is still active in here
            return self.eager(*args)


_NUMBERS = frozenset((type(None), bool, int, float))


def called(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Operator, list[Any], str | None]:
    """Of a call of one of these operators that reached PyTorch's dispatcher: operator, arguments, backend."""
    names = op._schema.arguments
    given = {**dict(zip((one.name for one in names), args, strict=False)), **kwargs}
    *values, backend = (given.get(one.name, one.default_value) for one in names)
    return _operators[op._schema.name.partition("::")[2]], values, backend


def nothing_but_memory(args: Sequence[Any]) -> bool:
    """Whether all tensors among the arguments are: no subclasses, no negatives to be, no zeros to be."""
    for value in args:
        kind = type(value)
        if kind in _NUMBERS:
            continue
        if kind is Tensor or kind is Parameter:
            if value.is_neg() or value._is_zerotensor():
                return False
        elif kind is list or kind is tuple:
            if not nothing_but_memory(value):
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def inside_modes() -> bool:
    """Whether a mode (a FLOP counter), a transform or a tracer would see what is called."""
    c = torch._C
    return bool(
        c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._are_functorch_transforms_active()
        or c._get_tracing_state() is not None
    )


def _dispatcher_is_idle(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would find nothing to do for a call but to come back to Python.

    It has something to do inside modes (transforms, tracers, FLOP counters, profilers) and for tensors that
    are not what they look like.
    """
    if inside_modes() or torch._C._autograd._profiler_enabled():
        return False
    return _type(device_of(args)) in _PREFERRED and nothing_but_memory(args)


def define(
    schema: str,
    *,
    eager: Callable,
    fake: Callable,
    macs: Callable,
    refuse: Callable | None = None,
    backends: tuple[str, ...] = BACKENDS,
    isa: str | None = None,
) -> Callable:
    """Register the operator ``segvit::<schema>`` and return a function that calls it.

    The function leaves out torch's dispatcher where that would do nothing but come back to Python. Autograd
    is the caller's: an ``autograd.Function`` that calls it.

    Args:
        schema: name, arguments and results in torch's schema language, without namespace; the
            argument ``str? backend=None`` is added at the end.
        eager: the implementation in PyTorch; takes the schema's arguments in order. The Triton launcher
            of the same name in ``segvit_kernels/triton/<stem>.py`` has the same signature.
        fake: the same signature on fake tensors; gives the shapes.
        macs: the same signature with shapes in place of tensors; gives the multiply-accumulates.
        refuse: takes the name of a backend other than eager, then the same arguments; gives an exception that
            says why its kernels cannot take these arguments, or ``None``.
        backends: those that have it; eager always does.
        isa: the instruction set that its CPU kernel is for, where there is only one.
    """
    name, _, rest = schema.partition("(")
    arguments, _, results = rest.partition(") -> ")
    qualname = f"{_native.NAMESPACE}::{name}"
    _native.SCHEMAS[name] = schema
    operator = _operators[name] = Operator(name, eager, macs, refuse, ("eager", *backends), isa)

    def implementation(*args: Any, backend: str | None = None) -> Any:
        # The dispatcher leaves out what stands at the end with its default.
        if len(args) == count:
            return operator(args[:-1], args[-1])
        return operator((*args, *defaults[len(args) :]), backend)

    torch.library.define(qualname, f"({arguments}, str? backend=None) -> {results}")
    packet = getattr(getattr(torch.ops, _native.NAMESPACE), name)
    op = packet.default
    count = len(op._schema.arguments)
    defaults = [argument.default_value for argument in op._schema.arguments[:-1]]
    operator.arity = count - 1

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _dispatcher_is_idle(args):
            return op(*args)
        return implementation(*args)

    torch.library.impl(qualname, "default", implementation)
    torch.library.register_fake(qualname, lambda *args, backend=None: fake(*args[: count - 1]))
    register_flop_formula(packet)(lambda *shapes, out_shape=None, **kwargs: 2 * macs(*shapes[: count - 1]))
    return call


def exportable(kind: type) -> type:
    """Class decorator: a named tuple that ``torch.export.save`` can write.

    The process that loads such a program must have imported the class's package.
    """
    pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return kind


def fvcore_handles() -> dict[str, Callable]:
    """Handles for ``fvcore.nn.FlopCountAnalysis(...).set_op_handle(**fvcore_handles())``.

    fvcore counts one per multiply-accumulate, and nothing at all for operators it does not know.
    """

    def shapes(value: Any) -> Any:
        if value.isCompleteTensor():
            return value.type().sizes()
        if value.node().kind() == "prim::ListConstruct":
            return [shapes(item) for item in value.node().inputs()]
        return value.toIValue()  # a constant, or None where there is none

    def handle(operator: Operator) -> Callable:
        def count(inputs: list, outputs: list) -> int:
            return operator.macs(*map(shapes, inputs[: operator.arity]))

        return count

    return {f"{_native.NAMESPACE}::{name}": handle(operator) for name, operator in _operators.items()}


def why_not_operator(operator: str, name: str, device: torch.device) -> str | None:
    """Why the operator of this name cannot run on backend ``name`` on a device; ``None`` if it can."""
    return _operators[operator].why_not(name, device)


def chosen_backend(operator: str, device: torch.device, argument: str | None) -> str:
    """The backend of a call of the operator of this name, before its kernels have seen the arguments."""
    return requested_backend(argument) or _operators[operator].default(device)


def operators() -> tuple[Operator, ...]:
    """All registered operators."""
    return tuple(_operators.values())


def operator_names() -> tuple[str, ...]:
    """Names of all registered operators, without namespace."""
    return tuple(_operators)
