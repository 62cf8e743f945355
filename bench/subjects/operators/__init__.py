"""The benchmarked operators. To add one: write ``NAME.py`` here with an ``OPERATOR`` (``atm.py`` is the
example) and name it in ``_MODULES``."""

from __future__ import annotations

from collections.abc import Sequence

from bench.subjects.operators import (
    atm,
    mask_binarize,
    mask_iou,
    mask_loss,
    mask_matching,
    panoptic_argmax,
    query_attention,
    semantic_argmax,
    semantic_topk,
    subsample_norm,
)
from bench.subjects.operators.base import (
    MODES,
    Check,
    Cost,
    Operator,
    Peer,
    Target,
    checked,
    differentiable,
    floor,
    kernels_backend,
    runner,
    select,
    tensors,
)

__all__ = [
    "MODES",
    "Check",
    "Cost",
    "Operator",
    "OptionError",
    "Peer",
    "Target",
    "by_name",
    "check_peers",
    "checked",
    "differentiable",
    "floor",
    "kernels_backend",
    "runner",
    "select",
    "tensors",
]

_MODULES = (
    atm,
    query_attention,
    mask_loss,
    mask_matching,
    semantic_argmax,
    semantic_topk,
    panoptic_argmax,
    mask_binarize,
    mask_iou,
    subsample_norm,
)


def by_name() -> dict[str, Operator]:
    """Every benchmarked operator by name."""
    return {module.OPERATOR.name: module.OPERATOR for module in _MODULES}


class OptionError(ValueError):
    """An option that cannot be honoured; the message is for the user."""


def check_peers(backend: str, names: Sequence[str] | None) -> None:
    """Raises :class:`OptionError` for a name that no operator has a peer of."""
    known = {peer.name: None for op in by_name().values() for peer in op.peers(backend)}
    for name in names or ():
        if name not in known:
            raise OptionError(f"--peers {name}: no such peer; expected some of {', '.join(known)}")
