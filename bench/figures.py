"""Figures drawn from result files (to come)."""

from pathlib import Path


def wanted(results: Path) -> dict:
    return {}


def stale(wanted: dict, folder: Path) -> list[str]:
    return []


def draw(wanted: dict, names: list[str], folder: Path) -> None:
    pass
