"""Print the resources of every launch as one JSON list, for ``segvit_kernels.testing.launches.compiled``."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from triton.backends.compiler import GPUTarget

from segvit_kernels.testing.launches import ALIKE, TARGETS, faults, module, resources


def rows(operator: str, arch: str, names: Sequence[str], once: bool) -> list[dict[str, Any]]:
    """A row for every launch of an operator's cases, or with ``once`` for the first one of each kernel."""
    found = module(operator)
    gate = {**found.EVERYWHERE, **(found.MORE if arch == "sm_90" else {})}
    cases = {name: {**found.EVERYWHERE, **found.MORE}[name] for name in names} or gate
    rows, seen, kernels = [], {}, set()
    for name, case in cases.items():
        for launch in found.launches(case, arch):
            kernel = launch.kernel.__name__
            if once and kernel in kernels:
                continue
            kernels.add(kernel)
            compiled = launch.compile(GPUTarget(*TARGETS[arch]))
            if compiled.hash not in seen:
                seen[compiled.hash] = resources(compiled)
            row = {"operator": operator, "case": name, "kernel": kernel}
            row |= {"warps": launch.options["num_warps"], **seen[compiled.hash]}
            row["wgmma"] = found.wgmma(row)
            demand = found.KERNELS.get(kernel)
            rows.append(
                {**row, "faults": faults(row, arch, demand) if demand else ["no demand stands for it"]}
            )
    if not names:
        demanded = {name for name, demand in found.KERNELS.items() if demand.everywhere or arch == "sm_90"}
        for kernel in sorted(demanded - kernels):
            rows.append({"operator": operator, "case": None, "kernel": kernel, "faults": ["not launched"]})
    return rows


def main(operators: str, arch: str, *names: str) -> None:
    asked = os.environ.get("SEGVIT_GATE", "")
    every = asked == "all" or (asked != "quick" and arch == "sm_90")
    once = not names and (arch in ALIKE or not every)
    found = [rows(operator, arch, names, once) for operator in operators.split(",")]
    print(json.dumps([row for some in found for row in some]))


if __name__ == "__main__":
    main(*sys.argv[1:])
