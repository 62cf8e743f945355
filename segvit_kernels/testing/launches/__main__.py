"""Print the resources of every launch as one JSON list, for ``segvit_kernels.testing.launches.compiled``."""

import json
import os
import sys

from triton.backends.compiler import GPUTarget

from segvit_kernels.testing.launches import ALIKE, TARGETS, faults, module, resources


def main(operator: str, arch: str, *names: str) -> None:
    found = module(operator)
    gate = {**found.EVERYWHERE, **(found.MORE if arch == "sm_90" else {})}
    cases = {name: {**found.EVERYWHERE, **found.MORE}[name] for name in names} or gate
    rows, seen, kernels = [], {}, set()
    once = not names and (arch in ALIKE or os.environ.get("SEGVIT_GATE") == "quick")
    for name, case in cases.items():
        for launch in found.launches(case, arch):
            kernel = launch.kernel.__name__
            if once and kernel in kernels:
                continue
            kernels.add(kernel)
            compiled = launch.compile(GPUTarget(*TARGETS[arch]))
            if compiled.hash not in seen:
                seen[compiled.hash] = resources(compiled)
            row = {"case": name, "kernel": kernel, "warps": launch.options["num_warps"]}
            row = {**row, **seen[compiled.hash], "wgmma": found.wgmma(row)}
            demand = found.KERNELS.get(kernel)
            rows.append(
                {**row, "faults": faults(row, arch, demand) if demand else ["no demand stands for it"]}
            )
    if not names:
        demanded = {name for name, demand in found.KERNELS.items() if demand.everywhere or arch == "sm_90"}
        missing = demanded - kernels
        rows += [{"case": None, "kernel": kernel, "faults": ["not launched"]} for kernel in sorted(missing)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
