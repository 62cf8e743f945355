"""What an object of another library is, told without importing it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def known_base(kind: type, names: Container[str]) -> type | None:
    """The first class among ``kind`` and its bases whose name is one of ``names``."""
    return next((base for base in kind.__mro__ if base.__name__ in names), None)


def overridden(value: Any, base: type, *methods: str) -> str | None:
    """The first of ``methods`` that the class of ``value`` has from elsewhere than ``base``."""
    for name in methods:
        if getattr(type(value), name, None) is not getattr(base, name, None):
            return name
    return None
