"""Which samples a step takes, and their augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from segvit.data.transforms import Augment


class Augmented(Dataset):
    """Augmented items by (epoch, index)."""

    def __init__(self, dataset: Dataset, augment: Augment) -> None:
        self.dataset, self.augment = dataset, augment

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        item = self.dataset[index]
        image, label = self.augment(item["image"], item["label"], epoch, index)
        return {"image": image, "label": label, "name": item["name"]}


class StepSampler:
    """Batches of (epoch, index) keys for one process, from `start` to `steps`.

    The union over the `world` processes in a step is what one process with `world` times the batch takes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.start, self.rank, self.world, self.seed = start, rank, world, seed

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, np.ndarray] = {}
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.length)
                if epoch not in orders:
                    generator = np.random.default_rng([self.seed, epoch])
                    orders = {**orders, epoch: generator.permutation(self.length)}
                    orders.pop(epoch - 2, None)
                keys.append((epoch, int(orders[epoch][place])))
            yield keys
