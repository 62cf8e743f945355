"""Result files: their names, and written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def stem(name: str) -> str:
    """The name of a result's file: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def finite(value: object) -> object:
    """``value`` with ``None`` for what JSON cannot say: infinities and NaN, as a failed check may have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump(path: Path, result: dict) -> None:
    """Write a result file, whole or not at all."""
    write(path, json.dumps(finite(result), indent=1, sort_keys=True, allow_nan=False) + "\n")
