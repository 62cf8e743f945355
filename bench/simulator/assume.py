"""What is assumed to stand in memory that one kernel writes and another is steered by.

No kernel runs in the simulator, so numbers that an earlier launch would have left, how many pairs of a batch
are active, say, are put there by hand: arrays by the name of the argument that points to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def contents(
    launch: dict[str, Any], labels: Sequence[Sequence[int]] | None, decided: bool
) -> dict[str, np.ndarray]:
    """Arrays by argument, for a launch as ``bench/suites/_capture.py`` describes it.

    Args:
        launch: the launch.
        labels: that occur in every image, where the operator was given such.
        decided: whether the semantic argmax tries its test (see :func:`_views`).
    """
    found, tensors, numbers = {}, launch["tensors"], launch["numbers"]
    if "pairs_ptr" in tensors and labels and "Q" in numbers:
        found["pairs_ptr"] = _pairs(labels, numbers["Q"], numbers.get("M", numbers["Q"]))
    if {"info_ptr", "cells_ptr"} <= tensors.keys() and "H" in numbers and "PADDED_Q" in launch["constants"]:
        found["info_ptr"] = _views(launch, decided)
    return found


def share_met(launch: dict[str, Any], words: np.ndarray, labels: Sequence[Sequence[int]]) -> float | None:
    """Of the tiles that a launch of the mask loss looks at, the share in which their class may occur.

    Args:
        launch: the launch.
        words: (images, down, across), bit c % 32 set where a tile of 64 × 64 labels may have class c.
        labels: that occur in every image.

    Returns:
        The share, or ``None`` for launches that ask nothing of the kind.
    """
    numbers, constants = launch["numbers"], launch["constants"]
    if not {"tiles_ptr", "pairs_ptr"} <= launch["tensors"].keys() or "GROUPS" not in constants:
        return None
    if "rows0" in numbers:
        height, width = constants["GROUPS"] * numbers["rows0"], constants["SPAN"] * constants["BLOCK"]
    else:
        height, width = (constants["GROUPS"] - 1) * numbers["H"] // numbers["h0"], constants["BLOCK"]
    met = []
    for y in range(0, numbers["H"], height):
        for x in range(0, numbers["W"], width):
            below, beyond = min(y + height, numbers["H"]) - 1, min(x + width, numbers["W"]) - 1
            seen = words[:, y // 64 : below // 64 + 1, x // 64 : beyond // 64 + 1]
            seen = np.bitwise_or.reduce(seen.reshape(len(words), -1), axis=1)
            met += [
                seen[b] >> c % 32 & 1 for b, there in enumerate(labels) for c in there if c < numbers["M"]
            ]
    return float(np.mean(met))


def _pairs(labels: Sequence[Sequence[int]], queries: int, targets: int) -> np.ndarray:
    """The number of active pairs of image and class, and these."""
    active = [
        b * queries + c for b, there in enumerate(labels) for c in there if 0 <= c < min(queries, targets)
    ]
    return np.array([len(active), *active], dtype=np.int32)


def _views(launch: dict[str, Any], decided: bool) -> np.ndarray:
    """Of every view the first cell, height and width of its grid, blocks of tokens before the test and in
    all; without a test these are as many."""
    numbers, constants, tensors = launch["numbers"], launch["constants"], launch["tensors"]
    count, width = tensors["info_ptr"]["shape"]
    cells = tensors["cells_ptr"]["shape"][0] // count
    ratio = numbers.get("step_y", 1.0) / numbers.get("step_x", 1.0)
    h = round((cells * ratio * numbers["H"] / numbers["W"]) ** 0.5)
    block = constants.get("BLOCK_Q", 32)
    blocks = -(-constants["PADDED_Q"] // block)
    head = max(1, constants.get("HEAD", 32) // block) if decided else blocks
    rows = np.zeros((count, width), dtype=np.int32)
    rows[:, 0] = cells * np.arange(count)
    rows[:, 1:5] = (h, cells // max(h, 1), head, blocks)
    return rows
