"""Counts and times of a server, as the text that Prometheus reads."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence

__all__ = ["Counter", "Gauge", "Histogram", "exposition"]


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    pairs = [f'{name}="{escaped(value)}"' for name, value in zip(names, values, strict=True)]
    return f"{{{','.join(pairs)}}}" if pairs else ""


class Counter:
    """How often something was, by labels."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, labels
        self.values: dict[tuple[str, ...], int] = {} if labels else {(): 0}
        self.lock = threading.Lock()

    def add(self, *labels: str) -> None:
        with self.lock:
            self.values[labels] = self.values.get(labels, 0) + 1

    def lines(self) -> list[str]:
        with self.lock:
            return [f"{self.name}{_labels(self.labels, k)} {v}" for k, v in sorted(self.values.items())]


class Gauge:
    """What something is now."""

    kind = "gauge"

    def __init__(self, name: str, help: str, value: Callable[[], int]) -> None:
        self.name, self.help, self.value = name, help, value

    def lines(self) -> list[str]:
        return [f"{self.name} {self.value()}"]


class Histogram:
    """How often something was at most so large, and the sum, by labels."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.bounds, self.labels = name, help, bounds, labels
        self.values: dict[tuple[str, ...], tuple[list[int], float]] = {}
        self.lock = threading.Lock()

    def add(self, value: float, *labels: str) -> None:
        with self.lock:
            counts, total = self.values.get(labels) or ([0] * (len(self.bounds) + 1), 0.0)
            counts[bisect.bisect_left(self.bounds, value)] += 1
            self.values[labels] = counts, total + value

    def lines(self) -> list[str]:
        found = []
        with self.lock:
            for labels, (counts, total) in sorted(self.values.items()):
                so_far = 0
                for bound, count in zip([*self.bounds, "+Inf"], counts, strict=True):
                    so_far += count
                    edge = _labels((*self.labels, "le"), (*labels, str(bound)))
                    found.append(f"{self.name}_bucket{edge} {so_far}")
                found.append(f"{self.name}_sum{_labels(self.labels, labels)} {total:.6f}")
                found.append(f"{self.name}_count{_labels(self.labels, labels)} {so_far}")
        return found


def exposition(metrics: Sequence[Counter | Gauge | Histogram]) -> str:
    """All of them in the text format 0.0.4."""
    lines = []
    for metric in metrics:
        lines += [
            f"# HELP {metric.name} {metric.help}",
            f"# TYPE {metric.name} {metric.kind}",
            *metric.lines(),
        ]
    return "\n".join(lines) + "\n"
