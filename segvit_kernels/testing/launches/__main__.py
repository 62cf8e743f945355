"""Print the resources of every launch as one JSON list, for ``segvit_kernels.testing.launches.compiled``."""

import json
import sys

from triton.backends.compiler import GPUTarget

from segvit_kernels.testing.launches import TARGETS, module, resources


def main(operator: str, arch: str, *names: str) -> None:
    found = module(operator)
    gate = {**found.EVERYWHERE, **(found.MORE if arch == "sm_90" else {})}
    cases = {name: {**found.EVERYWHERE, **found.MORE}[name] for name in names} or gate
    rows, seen = [], {}
    for name, case in cases.items():
        for launch in found.launches(case, arch):
            compiled = launch.compile(GPUTarget(*TARGETS[arch]))
            if compiled.hash not in seen:
                seen[compiled.hash] = resources(compiled)
            row = {"case": name, "kernel": launch.kernel.__name__, "warps": launch.options["num_warps"]}
            rows.append({**row, **seen[compiled.hash], "wgmma": found.wgmma(row)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
