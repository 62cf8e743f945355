"""Operator cases, oracles and error budgets, shared by the tests, the benchmarks and whoever adds a backend.

One module an operator; the budgets are common.
"""

from segvit_kernels.testing.budgets import RELATIVE_NORM, assert_within_budget, relative_error

__all__ = ["RELATIVE_NORM", "assert_within_budget", "relative_error"]
