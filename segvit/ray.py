"""Bulk prediction inside other engines' workers: rows of pictures in, rows of label maps out.

`Labeller` is what Ray Data's `map_batches` starts an actor of (examples/ray_predict.py), and what Spark's
`mapInPandas` calls (examples/spark_predict.py). It imports neither: a batch is a dict of columns.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from segvit.data.decoding import OWN_FORMATS
from segvit.data.pictures import PictureBytes, read_image
from segvit.exporting import open_model
from segvit.exporting.exported import ExportedModel
from segvit.inference.bulk import label_picture
from segvit.inference.classes import class_names
from segvit.inference.engine import check_precision, in_precision
from segvit.inference.passes import check_options
from segvit.options import InferenceOptions
from segvit.system.failures import let_go, of_one_picture, one_line
from segvit.system.machine import pick_device

__all__ = ["Labeller"]


class Labeller:
    """A model, held by a worker, that labels batches of picture files.

    Args:
        checkpoint: as of `segvit predict`.
        accelerator: "auto", "cpu" or "cuda".
        dtype: precision of the network, as of `segvit predict`.
        options: fields of `segvit.options.InferenceOptions`: window, scales, flip and so on.

    Raises:
        ValueError, OSError: as `segvit predict`, before the first batch.
    """

    def __init__(
        self, checkpoint: str, accelerator: str = "auto", dtype: str = "float32", **options: Any
    ) -> None:
        self.options = InferenceOptions(**options)
        device = pick_device(accelerator)
        model: Any = open_model(checkpoint)
        if isinstance(model, ExportedModel):
            model.check(self.options)
            model.check_precision(dtype)
        else:
            check_precision(device, dtype, None)
            model = in_precision(model, device, dtype)
        check_options(self.options, model.config.backbone.patch_size, model.config.class_names)
        self.model, self.names = model, class_names(model.config)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Columns "path" (str) and "bytes" (a picture file's content) to columns of as many rows.

        Returns:
            "path"; "width" and "height", int32; "labels", a PNG of class indices; "counts", int64 (N,) pixels
            of each class; "error", one line. A picture that cannot be done fails alone: of it there are 0, 0,
            b"", zeros and the error, which is "" else.
        """
        paths = [str(path) for path in batch["path"]]
        labels: list[np.ndarray | None] = [None] * len(paths)
        errors = [""] * len(paths)
        groups: dict[tuple[int, ...], dict[int, torch.Tensor]] = {}  # pictures of one size run together

        def fail(row: int, error: Exception) -> None:
            if not of_one_picture(error):
                raise error
            errors[row] = one_line(error).removeprefix(f"{paths[row]}: ")

        for row, (path, data) in enumerate(zip(paths, batch["bytes"], strict=True)):
            picture = PictureBytes(bytes(data), path, formats=OWN_FORMATS)
            try:
                image = read_image(picture, **self.model.config.reading)
            except Exception as error:
                fail(row, error)
            else:
                groups.setdefault(tuple(image.shape), {})[row] = image
        for rows in groups.values():
            for row, found in zip(rows, self._label_maps(list(rows.values())), strict=True):
                if isinstance(found, Exception):
                    fail(row, found)
                else:
                    labels[row] = found
        sizes = [(0, 0) if one is None else one.shape for one in labels]
        return {
            "path": np.array(paths, dtype=object),
            "width": np.array([width for _, width in sizes], np.int32),
            "height": np.array([height for height, _ in sizes], np.int32),
            "labels": np.array([self._png(one) for one in labels], dtype=object),
            "counts": np.array([self._counts(one) for one in labels], np.int64).reshape(-1, len(self.names)),
            "error": np.array(errors, dtype=object),
        }

    @torch.inference_mode()
    def _label_maps(self, images: list[torch.Tensor]) -> list[np.ndarray | Exception]:
        """Of each image its label map, or why there is none."""
        try:
            found = self.model.predict(torch.stack(images), self.options)
            return list(torch.as_tensor(found).cpu().numpy())
        except Exception as error:
            if len(images) == 1:
                let_go(error)
                return [error]
        return [found for image in images for found in self._label_maps([image])]  # it may be one's fault

    def _png(self, labels: np.ndarray | None) -> bytes:
        if labels is None:
            return b""
        file = io.BytesIO()
        label_picture(labels, len(self.names)).save(file, "PNG")
        return file.getvalue()

    def _counts(self, labels: np.ndarray | None) -> np.ndarray:
        found = np.empty(0, np.int64) if labels is None else labels.reshape(-1)
        return np.bincount(found, minlength=len(self.names))
