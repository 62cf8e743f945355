"""The score of a run: its last evaluation, its best, and how long ago that was."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["judged", "miou_text", "no_score"]


def no_score() -> dict[str, Any]:
    """Of a run without an evaluation.

    "result": the last evaluation and its "step"; "best": the highest mIoU, "best_step"; "since_best": how
    many evaluations came after it.
    """
    return {"result": {}, "best": None, "best_step": None, "since_best": 0}


def judged(score: dict[str, Any], step: int, result: dict[str, Any]) -> dict[str, Any]:
    """The score after an evaluation at `step`, without NaN, where no pixel counted."""
    result = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in result.items()
    }
    miou, best = result["miou"], score["best"]
    better = miou is not None and (best is None or miou > best)
    return {
        "result": {"step": step, **result},
        "best": miou if better else best,
        "best_step": step if better else score["best_step"],
        "since_best": 0 if better else score["since_best"] + 1,
    }


def miou_text(value: float | None) -> str:
    """In per cent; nothing for None."""
    return "" if value is None else f"mIoU {100 * value:.2f}"
