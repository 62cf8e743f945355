"""Keep the result of a run beside the recipe, and write the README's table from what is kept.

python -m examples.camvid.record RUN EVALUATION.json NAME   # -> examples/camvid/results/NAME.json; a name
                                                            # earlier/... is a row of the second table
python -m examples.camvid.record costs NAME=RUN...          # time and memory of kept runs, measured in turn
python -m examples.camvid.record                            # only the table
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from bench.measure import timing
from bench.measure.environment import describe
from bench.measure.peaks import isolated, resident_peak
from bench.measure.text import size
from bench.subjects.counts import count_torch
from segvit.config import SegViTConfig
from segvit.model.heads import load_model
from segvit.model.linear_head import CrossEntropy, LinearSegmenter
from segvit.model.losses import SegViTLoss
from segvit.options import InferenceOptions, TrainConfig

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
START, END = "<!-- {} -->", "<!-- /{} -->"


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
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


SIZE, CROP, BATCH = (360, 480), 224, 8
THREADS = 2


def _inference(model: torch.nn.Module) -> Callable[[], object]:
    """One image of the data set's size, in, its label map out, by windows as in the evaluation."""
    model = model.eval().fuse()
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)

    return lambda: model.predict(image, InferenceOptions(window=CROP))


def _training(model: torch.nn.Module) -> Callable[[], object]:
    """One step of the recipe on one batch, the optimizer's included."""
    model = model.unfuse().train()
    images = torch.randint(0, 256, (BATCH, 3, CROP, CROP), dtype=torch.uint8)
    labels = torch.randint(0, model.config.num_classes, (BATCH, 4, 4)).repeat_interleave(CROP // 4, 1)
    labels = labels.repeat_interleave(CROP // 4, 2)
    linear = isinstance(model, LinearSegmenter)
    loss = CrossEntropy() if linear else SegViTLoss(model.config.num_classes, 255)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def call() -> None:
        loss(model(model.preprocess(images)), labels)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


WORK = {"inference": _inference, "training": _training}


def peak(kind: str, run: str) -> int | None:
    """Peak memory of one call beyond the weights; in a process of its own."""
    torch.set_num_threads(THREADS)
    return resident_peak(WORK[kind](load_model(run)))


def costs(runs: dict[str, str]) -> None:
    """Operations, time and peak memory of kept runs' models; adds them to their results."""
    torch.set_num_threads(THREADS)
    found: dict[str, dict] = {}
    for name, run in runs.items():
        model = load_model(run).eval()
        found[name] = {"parameters": sum(p.numel() for p in model.parameters())}
        call = _inference(model.requires_grad_(False))
        found[name]["macs"] = count_torch(lambda _, call=call: call(), None)
    for kind, work in WORK.items():
        samplers = {}
        for name, run in runs.items():
            call = work(load_model(run))
            call()
            samplers[name] = timing.call_sampler(lambda _, call=call: call(), [None])
        samples = timing.interleave(samplers, rounds=9, seconds_per_peer=30.0)
        for name, run in runs.items():
            extra = isolated("examples.camvid.record", "peak", kind, run)
            found[name][kind] = timing.summary(samples[name]) | {"extra_bytes": extra}
    for name, values in found.items():
        path = RESULTS / f"{name}.json"
        environment = {**describe(torch.device("cpu")), "threads": THREADS}
        result = json.loads(path.read_text()) | {"costs": {"environment": environment, **values}}
        path.write_text(json.dumps(result, indent=1) + "\n")


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _cost(render: Callable[[dict], str]) -> Callable[[dict], str]:
    return lambda result: render(result["costs"]) if "costs" in result else "–"


def table() -> str:
    """Markdown of every kept result: one column each."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    lines = [
        _row("", *results),
        "|---|" + "---|" * len(results),
        *(
            _row(label, *map(value, results.values()))
            for label, value in (
                ("**mIoU**", lambda r: f"**{100 * r['evaluation']['miou']:.1f}**"),
                ("mIoU, whole images at once", lambda r: f"{100 * r['curve'][-1]['miou']:.1f}"),
                ("pixel accuracy", lambda r: f"{100 * r['evaluation']['accuracy']:.1f}"),
                ("optimizer steps of 8 images", lambda r: str(r["options"]["max_steps"])),
                ("GMACs of an image", _cost(lambda c: f"{c['macs'] / 1e9:.2f}")),
                ("parameters", _cost(lambda c: f"{c['parameters'] / 1e6:.1f} M")),
                ("images/s, image to label map", _cost(lambda c: f"{1 / c['inference']['median_s']:.2f}")),
                ("its memory beyond the weights", _cost(lambda c: size(c["inference"]["extra_bytes"]))),
                ("seconds of a training step", _cost(lambda c: f"{c['training']['median_s']:.2f}")),
                ("its memory beyond weights", _cost(lambda c: size(c["training"]["extra_bytes"]))),
                (
                    "mIoU on the way (step), whole images",
                    lambda r: ", ".join(f"{100 * p['miou']:.1f} ({p['step']})" for p in r["curve"]),
                ),
            )
        ),
    ]
    first = next(iter(results.values()))
    for name in first["evaluation"]["iou"]:
        lines.append(_row(name, *(f"{100 * r['evaluation']['iou'][name]:.1f}" for r in results.values())))
    e = first["environment"]
    commits = ", ".join(f"{name} {r['environment']['commit'][:10]}" for name, r in results.items())
    lines += [
        "",
        f"{e['cpu']}, {e['cpu_count']} cores, float32; torch {e['torch']}, Python {e['python']}; "
        f"commits: {commits}.",
    ]
    return "\n".join(lines)


def recipes() -> str:
    """Markdown of what was tried: what differs between the options of runs, and what they reach."""
    columns = ("key positions", "gain", "decoder rate", "β₂", "dropout", "steps", "mIoU", "whole images")
    lines = [_row("shrinks at block", *columns), "|---|" + "---|" * len(columns)]
    rows = []
    for path in [*RESULTS.glob("earlier/*.json"), *RESULTS.glob("*.json")]:
        result = json.loads(path.read_text())
        options, classes = result["options"], len(result["evaluation"]["iou"])
        if options["head"] == "linear":
            continue
        fields = {"image_size": options["image_size"], "shrunk": options["shrunk"], **options["model"]}
        config = SegViTConfig.preset(options["preset"], classes, **fields)
        block = config.backbone.shrink_at
        order = -1 if block is None else block, options["max_steps"], result["evaluation"]["miou"]
        row = _row(
            "–" if block is None else block,
            ("yes" if config.key_positions else "no") if config.upsample else "–",
            f"{options['similarity_gain']:g}",
            f"{options['lr'] * options['decoder_lr_scale']:.1e}",
            options.get("betas", TrainConfig.betas)[1],
            f"{config.decoder_dropout:g}",
            options["max_steps"],
            f"{100 * result['evaluation']['miou']:.1f}",
            f"{100 * result['curve'][-1]['miou']:.1f}",
        )
        rows.append((order, row))
    return "\n".join([*lines, *(row for _, row in sorted(rows))])


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["costs"]:
        costs(dict(pair.partition("=")[::2] for pair in arguments[1:]))
    elif len(arguments) not in (0, 3):
        print(__doc__, file=sys.stderr)
        return 2
    elif arguments:
        record(Path(arguments[0]), Path(arguments[1]), arguments[2])
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, render in (("results", table), ("recipes", recipes)):
        before, _, rest = text.partition(START.format(name))
        _, _, after = rest.partition(END.format(name))
        text = f"{before}{START.format(name)}\n{render()}\n{END.format(name)}{after}"
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
