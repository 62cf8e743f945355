"""What the options of ``bench model`` and ``bench memory`` may be."""

from __future__ import annotations

import argparse

from bench.subjects.published import MODELS


def check(options: argparse.Namespace) -> None:
    """Refuse model names, counts and batches that cannot be.

    Raises:
        ValueError: names the option, what it was and what was expected.
    """
    known = [model.name for model in MODELS]
    for name in options.models or ():
        if name not in known:
            raise ValueError(f"--models {name}: no such model; expected some of {', '.join(known)}")
    for name in ("threads", "rounds", "batch"):
        value = getattr(options, name, 1)
        for number in value if isinstance(value, list) else [value]:
            if number < 1:
                raise ValueError(f"--{name} is {number}; expected at least 1")
