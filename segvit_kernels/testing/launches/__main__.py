"""Print the resources of every launch as one JSON list, for ``segvit_kernels.testing.launches.compiled``."""

import json
import os
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from triton.backends.compiler import GPUTarget

from segvit_kernels.testing.launches import ALIKE, TARGETS, faults, module, resources
from segvit_kernels.triton._launch import Launch

Features = Callable[[Launch], set[Hashable]]
Case = tuple[str, Launch]
"""A launch and the name of the case that it is of."""


def kernel_of(launch: Launch) -> set[Hashable]:
    return {launch.kernel.__name__}


def code_of(launch: Launch) -> set[Hashable]:
    """What decides which code a kernel is made of: each flag, what it is not given, widths of its numbers."""
    kernel, tensors = launch.kernel.__name__, [v for v in launch.arguments.values() if hasattr(v, "dtype")]
    values = [*launch.constants.items(), *((name, v) for name, v in launch.arguments.items() if v is None)]
    flags = {(kernel, name, v) for name, v in values if v is None or isinstance(v, (bool, str))}
    return {(kernel, *sorted({t.element_size() for t in tensors if t.is_floating_point()})), *flags}


def chosen(launches: list[Case], features: Features | None) -> list[Case]:
    """Those of ``launches`` that have every feature between them, few: in turn the one that adds most."""
    if features is None:
        return launches
    own = [features(launch) for _, launch in launches]
    left, found = set().union(*own), []
    while left:
        best = max(range(len(own)), key=lambda i: len(own[i] & left))
        found.append(best)
        left -= own[best]
    return [launches[i] for i in sorted(found)]


def rows(operator: str, arch: str, names: Sequence[str], features: Features | None) -> list[dict[str, Any]]:
    """A row for every launch of an operator's cases, or for a few that have all features between them."""
    found = module(operator)
    gate = {**found.EVERYWHERE, **(found.MORE if arch == "sm_90" else {})}
    cases = {name: {**found.EVERYWHERE, **found.MORE}[name] for name in names} or gate
    launches = [(name, launch) for name, case in cases.items() for launch in found.launches(case, arch)]
    rows: list[dict[str, Any]] = []
    seen: dict[str, dict[str, Any]] = {}
    for name, launch in chosen(launches, features):
        kernel = launch.kernel.__name__
        compiled = launch.compile(GPUTarget(*TARGETS[arch]))
        row = {"operator": operator, "case": name, "kernel": kernel}
        row |= {"warps": launch.options["num_warps"], "wgmma": found.wgmma(row)}
        demand = found.KERNELS.get(kernel)
        if compiled.hash not in seen:
            asked = row["wgmma"] or (demand is not None and demand.barriers is not None)
            seen[compiled.hash] = resources(compiled, bool(names) or asked)
        row |= seen[compiled.hash]
        rows.append({**row, "faults": faults(row, arch, demand) if demand else ["no demand stands for it"]})
    if not names:
        demanded = {name for name, demand in found.KERNELS.items() if demand.everywhere or arch == "sm_90"}
        for kernel in sorted(demanded - {launch.kernel.__name__ for _, launch in launches}):
            rows.append({"operator": operator, "case": None, "kernel": kernel, "faults": ["not launched"]})
    return rows


def main(operators: str, arch: str, *names: str) -> None:
    asked = os.environ.get("SEGVIT_GATE", "")
    if names or (asked == "all" and arch not in ALIKE):
        features = None
    else:
        features = code_of if arch == "sm_90" and asked != "quick" else kernel_of
    found = [rows(operator, arch, names, features) for operator in operators.split(",")]
    print(json.dumps([row for some in found for row in some]))


if __name__ == "__main__":
    main(*sys.argv[1:])
