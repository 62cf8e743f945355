"""Batches of items, by loading processes whose errors arrive as they were raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from segvit.system.interrupts import ignore_signals


class Indexed(Protocol):
    """Items by their number, or another key."""

    def __getitem__(self, index: Any, /) -> Any: ...


class _Guarded(Dataset):
    """Hands an item's exception over as a value: a loading worker would wrap it in its traceback."""

    def __init__(self, dataset: Indexed) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return error


def collate(items: list[Any]) -> Any:
    """Items of one size -> {"image": (B, 3, H, W), "label": (B, H, W), "name": list}; or their exception."""
    for item in items:
        if isinstance(item, Exception):
            return item
    return {
        "image": torch.stack([item["image"] for item in items]),
        "label": torch.stack([item["label"] for item in items]),
        "name": [item["name"] for item in items],
    }


def collate_by_size(items: list[Any]) -> list[Any]:
    """A list of what `collate` makes of the items of each size."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        key = "error" if isinstance(item, Exception) else tuple(item["image"].shape)
        groups.setdefault(key, []).append(item)
    return [collate(group) for group in groups.values()]


def batches(dataset: Indexed, sampler: Any, workers: int, collate_fn: Callable, pin: bool) -> Iterator[Any]:
    """Batches of `dataset` in the order of the batch sampler; raises what reading an item raised."""
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=pin,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own: the loader must not draw from the training's random state
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
