"""Parts of a batch: as much at a time as a budget of memory holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BUDGETS = {"cpu": 2**25}  # bytes, by type of device
_BUDGET = 2**28  # on others


def budget_of(device: torch.device) -> int:
    """Bytes of what exists in parts alone."""
    return BUDGETS.get(device.type, _BUDGET)


def parts(count: int, each: int, budget: int) -> Iterator[slice]:
    """0 to ``count`` in order, as many at a time as ``budget`` bytes hold of ``each``, or one."""
    step = max(1, budget // each)
    if count <= step:  # compiled code has the loop for one number of steps
        if count:
            yield slice(0, count)
        return
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
