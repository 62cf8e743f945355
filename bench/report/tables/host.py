"""Tables of ``bench host``."""

from __future__ import annotations

from bench.measure.text import markdown


def tables(result: dict) -> dict[str, str]:
    """``launchers``, and ``calls``: public functions, with and without autograd, beside torch's own."""
    commit = (result["environment"].get("before") or "")[:12]
    columns = {"before_s": f"before ({commit or 'no commit'})", "now_s": "now"}
    if not any("before_s" in row for row in result["rows"]):
        columns = {"now_s": "time"}

    def table(title: str, groups: tuple[str, ...]) -> str:
        rows = [
            [f"`{row['name']}` {row['what']}", *(_microseconds(row.get(c)) for c in columns)]
            for group in groups
            for row in result["rows"]
            if row["group"] == group
        ]
        return markdown([title, *columns.values()], rows)

    return {"launchers": table("launcher", ("launcher",)), "calls": table("call", ("torch", "function"))}


def _microseconds(value: float | None) -> str:
    return "–" if value is None else f"{1e6 * value:.1f} µs"
