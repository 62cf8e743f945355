"""A machine that executes the PTX of a compiled kernel, without a GPU: see docs/ptx.md.

::

    from segvit_kernels.testing import ptx

    with ptx.machine("sm_90"):  # TRITON_INTERPRET must not be set
        kernel[(programs,)](x, y, n, BLOCK=128)  # any Triton kernel, CPU tensors

    ptx.run_ptx(text, "my_kernel", (8, 1, 1), 128, [x, y, n])  # PTX of any compiler
"""

from segvit_kernels.testing.ptx.faults import KINDS, Fault, PTXError
from segvit_kernels.testing.ptx.launch import Session, machine, run_ptx
from segvit_kernels.testing.ptx.traffic import Counts

__all__ = ["KINDS", "Counts", "Fault", "PTXError", "Session", "machine", "run_ptx"]
