"""The backends that an operator's battery runs on, in one table: a new backend is a line here.

A battery (``test_NAME.py``) says what every backend must do; a case that is for some of them names these.
What only one backend has, pinned launches or instruction sets, stays in a file of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from segvit_kernels import _library

SINGLE, HALVES = torch.float32, (torch.float16, torch.bfloat16)
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PTX = "SEGVIT_PTX" in os.environ  # what a GPU would execute, on a machine in place of it: see docs/ptx.md


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run every operator.

    Attributes:
        id: in the names of tests, for ``pytest -k``.
        name: as in ``backend=``.
        dtypes: of the inputs, that it is held to.
        device: where the inputs lie; on other than the CPU, tests are marked gpu.
        ptx: whether it runs with ``SEGVIT_PTX``, as compiled kernels on the PTX machine.
    """

    id: str
    name: str
    dtypes: tuple[torch.dtype, ...]
    device: str = "cpu"
    ptx: bool = False

    def why_not(self) -> str | None:
        """Why it cannot run here, with what mends it."""
        reason = _library.why_not(self.name, self.device)
        return reason and f"backend {self.name}: {reason}"

    def op(self, operator: str) -> Callable[..., Any]:
        """``torch.ops.segvit.<operator>`` by this backend."""
        return functools.partial(getattr(torch.ops.segvit, operator), backend=self.name)


BACKENDS = (
    Backend("eager", "eager", (torch.float64, SINGLE, *HALVES)),
    # In its interpreter, whose bfloat16 products are wrong; compiled kernels have all.
    Backend("triton", "triton", (SINGLE, *HALVES) if PTX else (SINGLE, torch.float16), ptx=True),
    Backend("cpu", "cpu", (SINGLE, *HALVES)),
    Backend("cuda", "cuda", (SINGLE, *HALVES), ptx=True),  # CUDA C++ in its emulator
    Backend("triton-gpu", "triton", (SINGLE, *HALVES), device="cuda"),
    Backend("cuda-gpu", "cuda", (SINGLE, *HALVES), device="cuda"),
)
BY_ID = {backend.id: backend for backend in BACKENDS}


def backend_of(item: Any) -> Any:
    """The ``backend`` that a test is for, of its parameters; ``None``: it has none. Without the conftest of
    pytest, since scripts of the PTX machine import the batteries."""
    call = getattr(item, "callspec", None)
    return call.params.get("backend") if call else None


def interpreted(backend: Any) -> bool:
    """Whether a test's ``backend`` is Triton in its interpreter, which is slow; ``None``: it has none."""
    return getattr(backend, "id", None) == "triton" and not PTX


@dataclasses.dataclass(frozen=True)
class Variant(Backend):
    """A row that one operator adds: a backend of which it has two implementations.

    Attributes:
        module, replaced: ``module.<name>`` is this while the operator runs.
    """

    module: ModuleType | None = None
    replaced: tuple[str, Any] = ("", None)

    def op(self, operator: str) -> Callable[..., Any]:
        call = super().op(operator)

        def run(*arguments: Any) -> Any:
            with mock.patch.object(self.module, *self.replaced):
                return call(*arguments)

        return run


@dataclasses.dataclass(frozen=True)
class Launchers:
    """Triton's launchers with launch parameters of the test's own, in the place of a `Backend`.

    Attributes:
        module: ``segvit_kernels.triton.NAME``.
        configs: by operator; those not named take the pinned ones.
    """

    module: ModuleType
    configs: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = "triton"
    device: str = "cpu"

    def op(self, operator: str) -> Callable[..., Any]:
        return functools.partial(getattr(self.module, operator), config=self.configs.get(operator))


def _rows(ids: tuple[str, ...], also: tuple[Backend, ...]) -> list[Backend]:
    unknown = set(ids) - set(BY_ID)
    assert not unknown, f"no such backend: {unknown}"
    return [b for b in (*BACKENDS, *also) if (b.id in ids or b in also or not ids) and (b.ptx or not PTX)]


def _mark(names: str, rows: list[tuple[Any, ...]], ids: list[str]) -> pytest.MarkDecorator:
    gpu = [[pytest.mark.gpu] if row[0].device != "cpu" else [] for row in rows]
    parameters = [pytest.param(*row, id=i, marks=m) for row, i, m in zip(rows, ids, gpu, strict=True)]
    return pytest.mark.parametrize(names, parameters, indirect=["backend"])


def each_backend(*ids: str, also: tuple[Backend, ...] = ()) -> pytest.MarkDecorator:
    """The test's ``backend`` is each of the table, or of these; and of those that the operator adds."""
    rows = _rows(ids, also)
    return _mark("backend", [(b,) for b in rows], [b.id for b in rows])


def each_dtype(
    *ids: str, also: tuple[Backend, ...] = (), dtypes: tuple[torch.dtype, ...] = tuple(NAMES)
) -> pytest.MarkDecorator:
    """As `each_backend`, and the test's ``dtype`` is each of the backend's that is among these."""
    rows = [(b, d) for b in _rows(ids, also) for d in b.dtypes if d in dtypes]
    return _mark("backend, dtype", rows, [f"{b.id}-{NAMES[d]}" for b, d in rows])


class Graphs(list):
    """For ``torch.compile(backend=…)``: runs graphs as they are, and keeps them."""

    def __call__(self, graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bitwise, for every name that is expected."""
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_strides_change_nothing(
    backend: Backend, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Bitwise; of eager's up to rounding: a library may add up in another order where strides differ."""
    if backend.name != "eager":
        return assert_same(found, expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def assert_threads_change_nothing(run: Callable[[], dict[str, torch.Tensor]]) -> None:
    """``run()`` by one, two and three threads: named results, bitwise the same."""
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
