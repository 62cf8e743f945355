"""The pinned launch parameters of the Triton kernels, with changes for a while."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.measure import environment, timing

CONFIGS = environment.ROOT / "segvit_kernels" / "triton" / "configs"


def entry(configs: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The pinned entry at ``path``."""
    for key in path:
        configs = configs[key]
    return configs


@contextlib.contextmanager
def replaced(configs: dict[str, Any], path: Sequence[str], values: dict[str, Any]) -> Iterator[None]:
    """``configs`` with the entry at ``path`` replaced, for a while."""
    there = entry(configs, path)
    kept = dict(there)
    put(there, values)
    try:
        yield
    finally:
        put(there, kept)


def put(entry: dict[str, Any], values: dict[str, Any]) -> None:
    """Replace an entry of the pinned parameters in place; launchers forget what they made of the old one."""
    from segvit_kernels.triton._plan import forget

    entry.clear()
    entry.update(values)
    forget()


@contextlib.contextmanager
def applied(candidate: dict[str, Any], configs: dict[str, Any]) -> Iterator[None]:
    """``configs`` with the changes of a candidate, for a while."""
    with contextlib.ExitStack() as stack:
        for place, changes in candidate["changes"].items():
            path = place.split()
            stack.enter_context(replaced(configs, path, changed(entry(configs, path), changes)))
        yield


def load_changes(path: Path) -> dict[str, Any]:
    """Changes of the pinned parameters from a file: a JSON object of entries (path, joined by spaces), as a
    candidate of :func:`bench.suites.tune.load` has under ``changes``.

    Raises:
        ValueError: names the file, what it was and what was expected.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {timing.one_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise ValueError(f"{path}: not an object of entries and their values")
    check_changes(found, str(path))
    return found


def check_changes(changes: dict[str, Any], where: str) -> None:
    defaults = json.loads((CONFIGS / "default.json").read_text(encoding="utf-8"))
    for place in changes:
        try:
            entry(defaults, place.split())
        except (KeyError, TypeError):
            raise ValueError(
                f"{where}: changes of {place!r}; expected an entry of {CONFIGS.name}/default.json"
            ) from None


def changed(pinned: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """An entry with some values replaced, and without those that are ``None``."""
    return {k: v for k, v in {**pinned, **changes}.items() if v is not None}
