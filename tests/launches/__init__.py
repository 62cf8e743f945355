"""What the compile gate compiles, one module an operator.

Each has ``EVERYWHERE``, cases by name for every architecture, and ``MORE``, further ones for sm_90;
``launches(case, arch)``, all launches of a case, made by the launchers from meta tensors; ``KERNELS``, the
names of the kernels that must be among them; ``wgmma(row)``, whether a row of the gate (``case``, ``kernel``)
must hold tensor-core instructions on sm_90. Imported in a process without Triton's interpreter.
"""
