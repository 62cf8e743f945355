"""The commands of `segvit`: the module `a_b` is the command `a b`, and its `run` takes the options of it."""
