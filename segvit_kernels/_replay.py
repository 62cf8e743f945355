"""A function's calls of operators, written down once and repeated without the Python between them.

What CUDA graphs do on GPUs: modules, checks of arguments and the choice of kernels cost a transformer some
ten milliseconds a call, which on a CPU are a share of a small model's time. What is repeated takes the same
kernels with the same arguments, so that results are the same bit by bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from segvit_kernels import _library, _native
from segvit_kernels._autocast import autocast_dtype

_Function = Callable[[Tensor], Tensor]


class Replay:
    """A function of one tensor on a CPU, repeated from its fourth call on.

    The first call is the function's own, the second is written down, the third is computed both ways and
    compared; a function that reads numbers out of tensors, or whose results differ, is called as before.
    So is every call with gradients, autocast, recorded backends, a mode, transform or tracer of PyTorch, or
    with another backend, shape, dtype or layout than the first.

    What the function reads but its argument (weights, its own attributes) stays as it is at the second call,
    but for changes in place. Threads may share it.

    Args:
        function: from a contiguous tensor to a tensor of its own.
    """

    def __init__(self, function: _Function) -> None:
        self.function = function
        self.repeats = False
        self._program: _Function | None = None
        self._kind: tuple[Any, ...] | None = None
        self._hopeless = False
        self._turn = threading.Lock()

    def __call__(self, input: Tensor) -> Tensor:
        if self._hopeless or not _alone(input):
            return self.function(input)
        if self.repeats and self._kind == _kind(input):
            return self._program(input)  # type: ignore[misc]
        if self.repeats or not self._turn.acquire(blocking=False):
            return self.function(input)
        try:
            return self._prepare(input)
        finally:
            self._turn.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: the function alone."""
        return Replay, (self.function,)

    def _prepare(self, input: Tensor) -> Tensor:
        kind = _kind(input)
        if self._kind is None:
            self._kind = kind
        elif self._kind == kind and self._program is None:
            try:
                output, self._program = _recorded(self.function, input)
                return output
            except Exception:  # the function's own, or of what cannot be written down: its own call says
                self._hopeless = True
        elif self._kind == kind:
            output = self.function(input)
            self.repeats = torch.equal(self._program(input), output)  # type: ignore[misc]
            self._hopeless = not self.repeats
            return output
        return self.function(input)


def _alone(input: Tensor) -> bool:
    """Whether a call is nothing but computing, of a tensor that is nothing but memory."""
    return not (
        torch.compiler.is_compiling()
        or _library.inside_modes()
        or torch.is_grad_enabled()
        or _library.backends_are_recorded()
        or input.device.type != "cpu"
        or autocast_dtype(input.device) is not None
        or not _library.nothing_but_memory([input])
        or not input.is_contiguous()
    )


def _kind(input: Tensor) -> tuple[Any, ...]:
    """What the calls of a function depend on."""
    return input.shape, input.dtype, _library.requested_backend()


class _UnrepeatableError(Exception):
    """A function's calls depend on more than its argument's shape."""


def _recorded(function: _Function, input: Tensor) -> tuple[Tensor, _Function]:
    """A call's result, and what repeats its operators."""
    recorder = _Recorder(input)
    with recorder:
        output = function(input)
    return output, recorder.program(output)


class _Recorder(TorchDispatchMode):
    """Writes down every operator below autograd, as a line of Python."""

    def __init__(self, input: Tensor) -> None:
        super().__init__()
        self.names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.names[input] = "input"
        self.known: dict[str, Any] = {}  # functions, constants
        self.steps: list[tuple[list[str], str, set[str]]] = []  # results, the call, the values that it takes
        self.results = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else the first operator imports torch's compiler, for seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == _native.NAMESPACE:
            operator, args, backend = _library.called(func, args, kwargs)
            device = _library.device_of(args)
            kernel = operator.select(device, args, backend)
            if kernel == "eager":
                with self:
                    return operator(args, backend)
            func, kwargs = operator.kernel(kernel, device), {}
        output = func(*args, **kwargs)
        self._write(func, args, kwargs, output)
        return output

    def _write(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        used: set[str] = set()
        given = [self._text(value, used) for value in args]
        given += [f"{name}={self._text(value, used)}" for name, value in kwargs.items()]
        call = f"{self._constant(func)}({', '.join(given)})"
        many = isinstance(output, (list, tuple))
        targets = []
        for value in output if many else (output,):
            if not isinstance(value, Tensor):
                if used:
                    raise _UnrepeatableError(f"{func} gives a {type(value).__name__}")
                return  # of dtypes alone
            self.results += 1
            self.names[value] = f"t{self.results}"
            targets.append(self.names[value])
        self.steps.append(
            (targets, f"[{', '.join(targets)}] = {call}" if many else f"{targets[0]} = {call}", used)
        )

    def _text(self, value: Any, used: set[str]) -> str:
        if isinstance(value, Tensor) and value in self.names:
            used.add(self.names[value])
            return self.names[value]
        if value is None or type(value) in (int, bool):
            return repr(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._text(item, used) for item in value)}]"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.known)}"
        self.known[name] = value
        return name

    def program(self, output: Tensor) -> _Function:
        """What does all of it again; values live until their last use."""
        if self.names.get(output, "input") == "input":
            raise _UnrepeatableError("the result is no operator's")
        lines, seen = [], {self.names[output], "input"}
        for targets, text, used in reversed(self.steps):
            over = sorted({*targets, *used} - seen)
            seen.update(over)
            lines += [f"del {', '.join(over)}"] * bool(over) + [text]
        body = "\n    ".join((*reversed(lines), f"return {self.names[output]}"))
        exec(compile(f"def program(input):\n    {body}\n", "<replay>", "exec"), self.known)
        return self.known["program"]
