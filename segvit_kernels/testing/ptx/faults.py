"""What can go wrong on the machine, by name and place."""

from __future__ import annotations

from typing import Any


class PTXError(Exception):
    """PTX that the machine does not read, or an instruction that it does not know."""


class Fault(Exception):  # noqa: N818
    """A kernel did what it must not do.

    Args:
        kind: one of :data:`KINDS`.
        detail: what happened.
        kernel: name of the kernel.
        line: number of the line in its PTX, from 1.
        text: that line.
        source: ``file:line`` that it was compiled from, ``""`` where PTX does not say.
        where: block and thread, where there is one.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        kernel: str = "",
        line: int = 0,
        text: str = "",
        source: str = "",
        where: str = "",
    ) -> None:
        assert kind in KINDS, kind
        self.kind, self.detail, self.kernel = kind, detail, kernel
        self.line, self.text, self.source, self.where = line, text, source, where
        place = f"{kernel}, PTX line {line}" + (f" ({source})" if source else "")
        super().__init__(f"{kind}: {detail}{f', {where}' if where else ''}\n  {place}: {text}")


KINDS = {
    "out of bounds": "an access outside the tensors of the launch, or outside shared memory",
    "misaligned": "an address that its access does not divide",
    "uninitialised register": "a register that nothing wrote",
    "uninitialised shared memory": "a read of shared memory that nothing wrote",
    "uninitialised local memory": "a read of local memory that its thread did not write",
    "division by zero": "an integer divided by 0, whose quotient and remainder PTX leaves open",
    "in flight": "data of an asynchronous copy or product before its wait",
    "race": "two threads at one shared byte, one of them writing, without a barrier between",
    "missing proxy fence": "generic writes that the asynchronous proxy reads without fence.proxy.async",
    "divergence": "threads of a warp that a synchronising instruction needs do not execute it together",
    "deadlock": "a barrier that never completes",
    "endless": "more steps than the machine takes",
    "launch": "a launch that the hardware refuses, or hints about its arguments that are not so",
    "empty": "a kernel that neither reads nor writes memory",
}
"""Every kind of fault and what it means."""


def place(instruction: Any) -> dict[str, Any]:
    """Arguments of :class:`Fault` that say where an instruction stands."""
    return {
        "kernel": instruction.kernel,
        "line": instruction.line,
        "text": instruction.text,
        "source": instruction.source,
    }
