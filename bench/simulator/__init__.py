"""A simulator of Hopper multiprocessors that executes machine code: see :mod:`bench.simulator.launch`."""
