"""The Python modules of ``csrc/``, which is no package: they run where nothing is installed."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

from bench.measure import environment


@functools.cache
def module(name: str) -> ModuleType:
    """``csrc/<name>.py``."""
    sys.path.insert(0, str(environment.ROOT / "csrc"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
