"""How things are measured: time, memory, the machine and its ceilings, result files."""
