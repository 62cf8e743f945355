"""What kernels execute, for ``bench static``: ``python -m bench.suites._executed ARCH OPERATOR...``.

In a process of its own, since the PTX machine and Triton's interpreter exclude each other. An operator's main
shape with less of it, so that programs are those of the main shape and few. Prints one JSON list.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from bench.measure import timing
from bench.subjects import operators
from segvit_kernels.testing import ptx

SMALLER: dict[str, dict[str, Any]] = {
    "atm": {"heads": 2},
    "query_attention": {"heads": 1, "queries": 400},
    "mask_loss": {"grids": ((10, 10),) * 3, "size": (160, 160)},
    "mask_matching": {"grids": ((40, 40),), "size": (160, 160)},
    "semantic_argmax": {"grid": (10, 10), "size": (160, 160)},
    "semantic_topk": {"grid": (10, 10), "size": (160, 160)},
    "mask_binarize": {"count": 3, "grid": (40, 40), "size": (160, 160)},
    "mask_iou": {"masks": (40, 40), "grids": ((40, 40), (40, 40)), "size": (80, 80)},
    "panoptic_argmax": {"grid": (40, 40), "resized": (60, 60), "size": (160, 160)},
    "subsample_norm": {"grid": (20, 40)},
}
"""Changes of the main shape at batch 1, by operator."""


def rows(operator: operators.Operator, arch: str) -> list[dict[str, Any]]:
    """A row for each kernel of the operator's passes in bfloat16: programs, instructions of warps by class,
    bytes, sectors, passes of shared memory."""
    case = dataclasses.replace(operator.shape(operator.shapes[0].name, 1), **SMALLER[operator.name])
    arguments, gradients = operator.inputs(case, torch.bfloat16, torch.device("cpu"))
    mode = "forward_backward" if "forward_backward" in operator.modes else "forward"
    with ptx.machine(arch, traffic=True) as session:
        operators.runner(operator.peers("triton")[0], mode)(arguments, gradients)
    key = {"operator": operator.name, "arch": arch, "shape": case.name, "changes": SMALLER[operator.name]}
    return [
        {
            **key,
            "kernel": kernel,
            "programs": counts.blocks,
            "instructions": {name: int(count) for name, count in counts.classes.items()},
            "memory": {name: int(count) for name, count in counts.memory.items()},
            "status": "ok",
        }
        for kernel, counts in session.counts.items()
    ]


def main(arch: str, *names: str) -> None:
    found: list[dict[str, Any]] = []
    for name in names:
        try:
            found += rows(operators.by_name()[name], arch)
        except Exception as error:
            row = {"operator": name, "arch": arch, "kernel": "–", "status": "failed"}
            found.append(row | {"reason": timing.one_line(error)})
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
