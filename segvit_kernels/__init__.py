"""Fused kernels for mask-transformer segmentation on plain Vision Transformers."""

from segvit_kernels._library import (
    BACKENDS,
    BackendUnavailableError,
    backend,
    fvcore_handles,
    operator_names,
    why_not,
)
from segvit_kernels._version import __version__
from segvit_kernels.modules import FusedATM
from segvit_kernels.ops.atm import ATMFunction, ATMOutput, atm_reference, fused_atm

__all__ = [
    "BACKENDS",
    "ATMFunction",
    "ATMOutput",
    "BackendUnavailableError",
    "FusedATM",
    "__version__",
    "atm_reference",
    "backend",
    "fused_atm",
    "fvcore_handles",
    "operator_names",
    "why_not",
]
