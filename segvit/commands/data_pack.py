"""`segvit data pack`: a data set as shards."""

from __future__ import annotations

from pathlib import Path

from segvit.data import SegmentationFolder, check_data, folder_options
from segvit.data.pack import pack
from segvit.options import PackConfig
from segvit.system.files import locked, make_folder


def run(config: PackConfig) -> int:
    """Write the shards that are not there yet, and say what they hold. Returns 0.

    Raises:
        ValueError, OSError: what training on this folder would end with, or shards that cannot be written.
    """
    options = {**folder_options(config), "channels": config.channels, "progress": config.progress}
    datasets = [SegmentationFolder(config.folder, split, **options) for split in ("training", "validation")]
    for line in check_data(*datasets):
        print(line, flush=True)
    out = Path(config.out)
    make_folder(out)
    try:
        with locked(out / ".lock"):
            written, shards = pack(datasets, out, config.pictures, progress=config.progress)
    except BlockingIOError:
        raise ValueError(f"out: another pack runs in {out}; choose another folder") from None
    there = f", {shards - written} were there" if written < shards else ""
    counts = ", ".join(f"{len(dataset):,} pictures of {dataset.split}" for dataset in datasets)
    print(f"{counts} in {shards:,} shards{there}: --data '{out}/{{{0:05d}..{shards - 1:05d}}}.tar'")
    return 0
