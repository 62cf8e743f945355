"""`segvit data check`: what a folder holds, how it is understood, and a contact sheet to look at.

The last line is the refusal that training or evaluation would end with, if they would.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from segvit.data.check import Understood, files_table, look, open_training
from segvit.data.inspection import Facts
from segvit.data.layouts import find_layout
from segvit.data.pictures import as_rgb, read_image
from segvit.data.shards import Shards, are_shards
from segvit.options import DataConfig
from segvit.pictures.contact_sheet import contact_sheet
from segvit.pictures.palette import class_palette
from segvit.pictures.visualize import MADE_HERE, save_picture
from segvit.system.files import atomic_write, check_result_file
from segvit.system.progress import progress_bar

if TYPE_CHECKING:
    from PIL import Image

_FEW = 5


def run(config: DataConfig) -> int:
    """Print what the folder holds and means, and write the contact sheet. Returns 0.

    Raises:
        ValueError, OSError: what training or evaluation on this folder would end with.
    """
    if are_shards(config.folder):
        return _check_shards(config)
    if config.sheet:
        check_result_file("sheet", config.sheet, ".png", MADE_HERE)
    layout = find_layout(config.folder, config.image_pattern, config.label_pattern, config.split_list)
    print(f"{config.folder}: {layout}")
    splits, problems = look(layout, config)
    _print(files_table(splits))
    if layout.known:
        known, form = layout.known
        print(*(known.compare(form, split.name, len(split.listing.pairs)) for split in splits), sep="\n")
    dataset, trouble = open_training(config, splits)
    if dataset is not None and not trouble:
        print()
        try:
            print(*dataset.check(), sep="\n")
        except ValueError as error:
            trouble = str(error)
    usable = [
        (*pair, facts)
        for split in splits
        for pair, facts in zip(split.listing.pairs, split.facts, strict=True)
        if not facts.problem
    ]
    understood = Understood(dataset, [facts for *_, facts in usable], layout)
    if usable:
        print()
        _print(understood.table([facts for *_, facts in usable]))
    for kind, listed in problems.items():
        if listed:
            more = [f"  and {len(listed) - _FEW} more"] if len(listed) > _FEW else []
            print("", f"{kind}:", *(f"  {line}" for line in listed[:_FEW]), *more, sep="\n")
    if config.sheet and usable:
        places = sorted({len(usable) * i // config.pictures for i in range(config.pictures)})
        sheet = _sheet([usable[place] for place in places], understood, config)
        atomic_write(config.sheet, lambda path: save_picture(sheet, path))
        print(f"\n{len(places)} pictures with their labels: {config.sheet}", flush=True)
    if trouble:
        raise ValueError(trouble)
    return 0


def _check_shards(config: DataConfig) -> int:
    """Read every sample of shards, and print how many pixels each class has."""
    problems = []
    for split in Shards(config.folder).splits:
        dataset = Shards(config.folder, split, channels=config.channels, value_range=config.value_range)
        names = dataset.class_names or tuple(f"class {i}" for i in range(dataset.num_classes))
        pixels = np.zeros(len(names), np.int64)
        with progress_bar(config.progress) as bar:
            for index in bar.track(range(len(dataset)), description=split):
                try:
                    label = dataset[index]["label"]
                except ValueError as error:
                    problems.append(str(error))
                    continue
                pixels += np.bincount(label[label != dataset.ignore_index], minlength=len(names))
        print(*dataset.check(), sep="\n")
        order = [index for index in np.argsort(-pixels, kind="stable") if pixels[index]]
        _print([("class", "pixels"), *((names[i], f"{pixels[i] / pixels.sum():.2%}") for i in order)])
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")
    return 0


def _sheet(
    files: Sequence[tuple[Path, Path, Facts]], understood: Understood, config: DataConfig
) -> Image.Image:
    palette = class_palette(len(understood.names))
    if understood.dataset is not None and understood.dataset.palette is not None:
        palette = np.array(understood.dataset.palette, np.uint8)

    def read(picture: Path, label: Path) -> tuple[str, np.ndarray, np.ndarray]:
        image = as_rgb(read_image(picture, config.channels, config.value_range or None))
        return picture.name, image.permute(1, 2, 0).numpy(), understood.labels(label)

    pictures = (read(picture, label) for picture, label, _ in files)  # one at a time in memory
    return contact_sheet(pictures, understood.names, palette)


def _print(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
