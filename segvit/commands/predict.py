"""`segvit predict`: label maps, overlays with a legend, scores and similarity maps for pictures on disk.

For every picture NAME.* the output folder gets NAME_labels.png (class indices as grey values, 16-bit above
256 classes) or NAME_rle.json (run lengths), NAME_overlay.png and, where asked for, NAME_maps.png (similarity
maps), NAME_scores.npz and NAME_probabilities.npz. Arguments are checked before the first file is written; a
file appears whole or not at all, and takes no place but that of an earlier result. A picture that cannot be
done does not keep the others from it; it is named at the end.

Pictures are read and results written while the network runs. Of several processes (torchrun) each takes every
so manyth picture; they need nothing of each other but the end, for which all wait.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from segvit.data.find import Found, find_pictures
from segvit.exporting import open_model
from segvit.exporting.exported import ExportedModel
from segvit.inference.bulk import Job, Pipeline, find_classes, output_stems
from segvit.inference.classes import class_names
from segvit.inference.engine import check_precision, in_precision
from segvit.inference.passes import check_options
from segvit.inference.record import CannotWriteError, Files, Output, Record, Tars
from segvit.inference.table import write_parquet
from segvit.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint
from segvit.options import PredictConfig
from segvit.system.extras import require
from segvit.system.files import make_folder
from segvit.system.machine import pick_backend, pick_device, place_among_processes

# Options that results depend on, besides the checkpoint and those of inference.
_OF_RESULTS = (
    "dtype",
    "overlay",
    "maps",
    "scores",
    "probabilities",
    "score_type",
    "score_classes",
    "region",
    "alpha",
)


def run(config: PredictConfig) -> int:
    """Predict every picture of `config`; prints a line for each. Returns 0.

    Raises:
        ValueError, OSError: an argument or a file is wrong, or some pictures could not be done; one line that
            names them. Those that could are there.
        KeyboardInterrupt: with what is done and what is not as its message.
    """
    out = Path(config.out)
    rank, ranks = place_among_processes()
    _check(config)
    found = find_pictures(
        config.images,
        recursive=config.recursive,
        leave_out=out,
        every=config.frames,
        say=functools.partial(print, flush=True) if rank == 0 else None,
    )
    stems = output_stems(found, out, dots=config.pack is None)
    device = pick_device(config.accelerator)
    choice = pick_backend(config.backend, device)
    if device.index is not None:
        torch.cuda.set_device(device)

    model: Any = open_model(config.checkpoint)
    if isinstance(model, ExportedModel):
        model.check(config)
        model.check_precision(config.dtype)
        model.check_outputs(maps=config.maps, scores=config.scores, probabilities=config.probabilities)
    else:
        check_precision(device, config.dtype, config.backend)
        model = in_precision(model, device, config.dtype)
    names = class_names(model.config)
    classes = find_classes(config.maps, names)
    if classes and not model.has_similarity_maps:
        decoder = model.config.decoder
        raise ValueError(f"maps: {config.checkpoint} has the decoder {decoder}, which has no similarity maps")
    kept = find_classes(config.score_classes, names, "score_classes") or list(range(len(names)))
    check_options(config, model.config.backbone.patch_size, model.config.class_names)
    share = list(zip(found, stems, strict=True))[rank::ranks]
    made = not out.exists()
    make_folder(out)
    job = Job(config, model, out, classes, kept)
    with _results(config, job, (rank, ranks), share) as (record, output, left):
        pipeline = Pipeline(job, left, output)
        before = len(share) - len(left)

        def state() -> str:
            names = [picture.name for picture, _ in left]
            undone = [name for name in names if name not in pipeline.done and name not in pipeline.failed]
            problems = [f"{name}: {reason}" for name, reason in pipeline.failed.items()]
            earlier = f" ({before} before)" if before else ""
            parts = [f"{before + len(pipeline.done)} of {len(share)} pictures are done{earlier}, in {out}"]
            parts += [f"failed: {_listed(problems)}"] if problems else []
            return "; ".join(parts + ([f"not done: {_listed(undone)}"] if undone else []))

        if before:
            print(f"{before} of {len(share)} pictures are done already, in {out}", flush=True)
        try:
            with choice, torch.inference_mode():
                for picture, stem, summary in pipeline.run():
                    if summary is None:
                        reason = pipeline.failed[picture.name]
                        if record:
                            record.add({"picture": picture.name, "error": reason})
                        print(f"{picture.name}: failed: {reason}", flush=True)
                    else:
                        what = "overlay.png" if config.overlay else job.results[0]
                        where = out if config.pack else f"{out / stem}_{what}"
                        print(f"{picture.name}: {summary} -> {where}", flush=True)
        except CannotWriteError as error:
            raise OSError(f"{error}; {state()}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(state()) from None
        finally:
            if made and not pipeline.done:
                with suppress(OSError):  # not empty
                    out.rmdir()
    if config.parquet and record:
        write_parquet(out, (rank, ranks), record.lines())
    _wait_for_all(ranks)
    if pipeline.failed:
        raise ValueError(state())
    return 0


def _check(config: PredictConfig) -> None:
    """Raises ValueError for options that do not go together."""
    if config.region and not (config.scores or config.probabilities):
        raise ValueError("region: is of scores and probabilities; expected --scores or --probabilities too")
    if config.score_classes and not (config.scores or config.probabilities):
        raise ValueError("score_classes: expected --scores or --probabilities too")
    if config.score_type == "uint8" and config.scores:
        raise ValueError("score_type: uint8 is for probabilities; scores need float16 or float32")
    if config.region and (len(config.region) != 4 or 0 in config.region[2:]):
        raise ValueError(f"region: got {config.region}, expected left, top, width and height in pixels")
    if config.batch > 1 and (config.scores or config.probabilities or config.maps):
        raise ValueError(
            f"batch: got {config.batch}, expected 1 with --scores, --probabilities or --maps, of which each "
            "picture's are made by themselves"
        )
    if config.parquet:
        if not (config.manifest or config.pack):
            raise ValueError("parquet: is the record of --manifest or --pack; expected one of them too")
        require("pyarrow.parquet", extra="parquet")
    if not (config.manifest or config.pack) and Record.begun(Path(config.out)):
        raise ValueError(
            f"out: {config.out} holds results with a record; expected --manifest or --pack, or another folder"
        )


@contextmanager
def _results(
    config: PredictConfig, job: Job, place: tuple[int, int], share: Sequence[tuple[Found, str]]
) -> Iterator[tuple[Record | None, Output, list[tuple[Found, str]]]]:
    """The record if there is one, where results go, and those pictures of the share that are not done yet."""
    begun = Record.begun(job.out)
    if not (begun or config.pack):  # before a record is made in a folder that has other things
        job.check_targets(stem for _, stem in share)
    if not (config.manifest or config.pack):
        yield None, Files(job.out, None), list(share)
        return
    settings = {
        "checkpoint": config.checkpoint,
        "checkpoint's sha256": _digest(config.checkpoint),
        "kind of results": ("tars" if config.pack else "files")
        + (" of run lengths" if config.labels == "rle" else ""),
        **config.inference_fields(),
        **{name: getattr(config, name) for name in _OF_RESULTS},
    }
    record = Record(job.out, place, settings, {picture.name: stem for picture, stem in share})
    try:
        output = Tars(job.out, record, config.pack) if config.pack else Files(job.out, record)
        left = []
        for picture, stem in share:
            done = record.is_done(picture.name, stem, picture.version() if record.has(picture.name) else "")
            if not (done and output.has([f"{stem}_{result}" for result in job.results])):
                left.append((picture, stem))
            if not done and config.pack and record.has(picture.name):  # its results would be there twice
                raise ValueError(
                    f"images: {picture.name} has changed since its results were put into a tar; choose "
                    "another folder"
                )
        if begun and not config.pack:  # what the record has is ours, whatever it looks like
            job.check_targets(stem for picture, stem in left if not record.has(picture.name))
        try:
            yield record, output, left
        finally:
            output.close()
    finally:
        record.close()


def _digest(checkpoint: str) -> str:
    """Of a checkpoint's or an exported file's content."""
    path = Path(checkpoint)
    if path.is_file() and path.name not in (CONFIG_FILE, WEIGHTS_FILE):
        files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    else:
        files = [find_checkpoint(checkpoint) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    digest = hashlib.sha256()
    for part in files:
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _wait_for_all(ranks: int) -> None:
    """torchrun ends all processes when one fails: with damaged pictures none may end before the others."""
    if ranks == 1 or not torch.distributed.is_torchelastic_launched():
        return
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _listed(items: list[str], most: int = 20) -> str:
    return "; ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
