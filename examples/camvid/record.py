"""Keep the result of a run beside the recipe, and write the README's table from what is kept.

python -m examples.camvid.record RUN EVALUATION.json NAME   # -> examples/camvid/results/NAME.json
python -m examples.camvid.record                            # only the table
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import torch
import yaml

from bench.environment import describe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
START, END = "<!-- results -->", "<!-- /results -->"


def record(run: Path, evaluation: Path, name: str) -> None:
    """Join a run's options and curve with its evaluation."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    options = yaml.safe_load((run / "config.yaml").read_text())
    for path in ("data", "out", "names", "backbone_weights"):
        options[path] = options[path] and Path(options[path]).name
    losses = [(int(r["step"]), float(r["loss"]), float(r["seconds"])) for r in rows if r["loss"]]
    result = {
        "environment": describe(torch.device("cpu")),
        "options": options,
        "seconds": float(rows[-1]["seconds"]),
        "curve": [
            {"step": int(r["step"]), "miou": float(r["miou"]), "seconds": float(r["seconds"])}
            for r in rows
            if r.get("miou")
        ],
        "loss": [{"step": s, "loss": loss, "seconds": t} for s, loss, t in losses],
        "evaluation": json.loads(evaluation.read_text()),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def table() -> str:
    """Markdown of every kept result: one column each."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    lines = [
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
        *(
            f"| {label} | " + " | ".join(value(r) for r in results.values()) + " |"
            for label, value in (
                ("**mIoU**", lambda r: f"**{100 * r['evaluation']['miou']:.1f}**"),
                ("pixel accuracy", lambda r: f"{100 * r['evaluation']['accuracy']:.1f}"),
                ("optimizer steps of 8 images", lambda r: str(r["options"]["max_steps"])),
                ("minutes, evaluations included", lambda r: f"{r['seconds'] / 60:.0f}"),
                (
                    "mIoU on the way (step)",
                    lambda r: ", ".join(f"{100 * p['miou']:.1f} ({p['step']})" for p in r["curve"]),
                ),
            )
        ),
    ]
    first = next(iter(results.values()))
    for name in first["evaluation"]["iou"]:
        lines.append(
            f"| {name} | "
            + " | ".join(f"{100 * r['evaluation']['iou'][name]:.1f}" for r in results.values())
            + " |"
        )
    e = first["environment"]
    commits = ", ".join(f"{name} {r['environment']['commit'][:10]}" for name, r in results.items())
    lines += [
        "",
        f"{e['cpu']}, {e['cpu_count']} cores, float32; torch {e['torch']}, Python {e['python']}; "
        f"commits: {commits}.",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if len(arguments) not in (0, 3):
        print(__doc__, file=sys.stderr)
        return 2
    if arguments:
        record(Path(arguments[0]), Path(arguments[1]), arguments[2])
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{table()}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
