"""Tables of each kind of result: a module has ``tables(result)``, and perhaps ``sound(result)`` and
``schema_problem(result)``."""

from bench.report.tables import (
    backbones,
    bulk,
    decoders,
    export,
    flops,
    host,
    inference,
    instructions,
    kernels,
    learning,
    memory,
    model,
    scaling,
    simulate,
    static,
    step,
)

KINDS = {
    "backbones": backbones,
    "bulk": bulk,
    "cpu": kernels,
    "decoders": decoders,
    "gpu": kernels,
    "export": export,
    "flops": flops,
    "host": host,
    "inference": inference,
    "instructions": instructions,
    "learning": learning,
    "memory": memory,
    "model": model,
    "scaling": scaling,
    "simulate": simulate,
    "static": static,
    "step": step,
}
