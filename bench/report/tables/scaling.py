"""Tables of ``bench scaling``."""

from __future__ import annotations

from bench.measure.text import markdown, seconds

PEERS = ("fused", "eager", "plain", "sdpa")


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``<operator>-<axis>``, one line a mode and value; time of every peer, and the floor."""
    found = {}
    for operator, axis in dict.fromkeys((r["operator"], r["axis"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["operator"], r["axis"]) == (operator, axis)]
        peers = [p for p in PEERS if any(r["peer"] == p for r in rows)]
        lines = []
        for mode, value in dict.fromkeys((r["mode"], r["value"]) for r in rows):
            own = {r["peer"]: r for r in rows if (r["mode"], r["value"]) == (mode, value)}
            cells = [own.get(p, {"status": "–"}) for p in peers]
            shown = [seconds(r["median_s"]) if r["status"] == "ok" else r["status"] for r in cells]
            ours = own.get("fused", {})
            least = seconds(ours["floor_s"]) if ours.get("floor_s") else "–"
            share = f"{100 * ours['share_of_floor']:.0f} %" if ours.get("share_of_floor") else "–"
            lines.append([f"{value}, {mode.replace('_', ' + ')}", *shown, least, share])
        header = [f"{axis}, mode", *peers, "floor", "share of it"]
        found[f"{operator}-{axis.replace(' ', '-')}"] = markdown(header, lines)
    return found
