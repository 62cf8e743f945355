"""`segvit predict`: label maps, overlays with a legend, scores and similarity maps for pictures on disk.

For every picture NAME.* the output folder gets NAME_labels.png (class indices as grey values, 16-bit above
256 classes), NAME_overlay.png and, where asked for, NAME_maps.png (similarity maps), NAME_scores.npz and
NAME_probabilities.npz. Arguments are checked before the first file is written, and a file appears whole or
not at all. A picture that cannot be done does not keep the others from it; it is named at the end.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from segvit.data.find import find_images
from segvit.exporting import open_model
from segvit.exporting.exported import ExportedModel
from segvit.inference.bulk import KINDS, CannotWriteError, Job, find_classes, output_stems
from segvit.inference.classes import class_names
from segvit.inference.passes import check_options
from segvit.model.linear_head import LinearSegmenter
from segvit.options import PredictConfig
from segvit.system.failures import one_line, out_of_memory
from segvit.system.files import make_folder
from segvit.system.machine import pick_backend, pick_device


def run(config: PredictConfig) -> int:
    """Predict every picture of `config`; prints a line for each. Returns 0.

    Raises:
        ValueError, OSError: an argument or a file is wrong, or some pictures could not be done; one line that
            names them. Those that could are there.
        KeyboardInterrupt: with what is done and what is not as its message.
    """
    files = find_images(config.images)
    out = Path(config.out)
    stems = output_stems(files, out)
    if config.region and not (config.scores or config.probabilities):
        raise ValueError("region: is of scores and probabilities; expected --scores or --probabilities too")
    if config.score_classes and not (config.scores or config.probabilities):
        raise ValueError("score_classes: expected --scores or --probabilities too")
    if config.score_type == "uint8" and config.scores:
        raise ValueError("score_type: uint8 is for probabilities; scores need float16 or float32")
    if config.region and (len(config.region) != 4 or 0 in config.region[2:]):
        raise ValueError(f"region: got {config.region}, expected left, top, width and height in pixels")
    device = pick_device(config.accelerator)
    choice = pick_backend(config.backend, device)

    model: Any = open_model(config.checkpoint).to(device).eval().fuse()
    if isinstance(model, ExportedModel):
        model.check(config)
        model.check_outputs(maps=config.maps, scores=config.scores, probabilities=config.probabilities)
    names = class_names(model.config)
    classes = find_classes(config.maps, names)
    if classes and isinstance(model, LinearSegmenter):
        raise ValueError(f"maps: {config.checkpoint} has a linear head, which has no similarity maps")
    kept = find_classes(config.score_classes, names, "score_classes") or list(range(len(names)))
    check_options(config, model.config.backbone.patch_size)
    made = not out.exists()
    make_folder(out)
    job = Job(config, model, out, classes, kept)
    failed: dict[Path, str] = {}
    done = 0

    def state() -> str:
        left = [str(file) for file in files[done + len(failed) :]]
        problems = [f"{file}: {reason}" for file, reason in failed.items()]
        parts = [f"{done} of {len(files)} pictures are done, in {out}"]
        parts += [f"failed: {_listed(problems)}"] if failed else []
        return "; ".join(parts + ([f"not done: {_listed(left)}"] if left else []))

    try:
        with choice, torch.inference_mode():
            for file, stem in zip(files, stems, strict=True):
                try:
                    with ExitStack() as scratch:
                        outputs, summary = job.predict(file, scratch)
                        for kind, write in outputs.items():
                            job.write(out / f"{stem}_{kind}{KINDS[kind]}", write)
                except CannotWriteError:
                    raise
                except Exception as error:
                    if not (isinstance(error, (ValueError, OSError, ImportError)) or out_of_memory(error)):
                        raise
                    failed[file] = one_line(error).removeprefix(f"{file}: ")
                    print(f"{file}: failed: {failed[file]}", flush=True)
                else:
                    done += 1
                    print(f"{file}: {summary} -> {out / stem}_overlay.png", flush=True)
    except CannotWriteError as error:
        raise OSError(f"{error}; {state()}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(state()) from None
    finally:
        if made and not done:
            with suppress(OSError):  # not empty
                out.rmdir()
    if failed:
        raise ValueError(state())
    return 0


def _listed(items: list[str], most: int = 20) -> str:
    return "; ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
