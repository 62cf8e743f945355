"""`segvit train`."""

from __future__ import annotations

import sys

from segvit.options import TrainConfig
from segvit.system.interrupts import Interrupted
from segvit.system.machine import first_process
from segvit.training.score import miou_text
from segvit.training.train import train


def run(config: TrainConfig) -> int:
    """Train as the options say; prints what came of it. Returns 0, 128 + signal after SIGINT or SIGTERM."""
    try:
        result = train(config)
    except Interrupted as error:
        print(f"segvit train: {error}", file=sys.stderr)
        return 128 + error.signum
    if not first_process():
        return 0
    score = miou_text(result["miou"]) or "no labelled pixel to evaluate"
    best = f" (best {100 * result['best_miou']:.2f})" if result["best_miou"] is not None else ""
    minutes = result["seconds"] / 60
    when = f"at step {result['step']} after {minutes:.1f} minutes"
    print(f"{result['stopped']} {when}: {score}{best} in {config.out}")
    return 0
