"""How each operator of :mod:`segvit_kernels.ops` runs on a GPU. Imported when an operator runs."""
