"""An exported file in the place of a model: what `segvit predict` and `segvit evaluate` ask of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from segvit.data.pictures import image_tensor
from segvit.exporting.metadata import Description
from segvit.inference.passes import list_views, passes
from segvit.model.heads import SegViT
from segvit.options import InferenceOptions
from segvit_kernels import Views, semantic_argmax, without_autocast

__all__ = ["ExportedModel"]


class ExportedModel(nn.Module):
    """Label maps of pictures from an exported file, run by the runtime of its format.

    Args:
        path: of the file, for messages.
        description: what the file says of itself.
        run: uint8 pictures to its outputs, as arrays.

    Attributes:
        config: the model's.
        plan: what the file takes and gives.
    """

    def __init__(
        self, path: Path, description: Description, run: Callable[[np.ndarray], list[np.ndarray]]
    ) -> None:
        super().__init__()
        self.path, self.description = path, description
        self.config, self.plan = description.config, description.plan
        self._run = run
        self.activation = SegViT.kinds[self.config.decoder].activation

    def fuse(self) -> ExportedModel:
        """Nothing to fold; returns self."""
        return self

    def outputs(self, pictures: Tensor) -> list[Tensor]:
        """What the file gives for uint8 pictures (B, channels, H, W), in its own order.

        A file for a number of pictures gets the last one again where there are fewer.

        Raises:
            TypeError: not uint8. ValueError: pictures of another shape than the file takes.
        """
        if pictures.dtype != torch.uint8:  # some runtimes would convert them, or read their bytes as pixels
            raise TypeError(f"images must be uint8, got {pictures.dtype}")
        plan, (batch, channels, *size) = self.plan, pictures.shape
        expected = self.config.backbone.in_channels
        if channels != expected:
            raise ValueError(f"{self.path}: takes pictures of {expected} channels, got {channels}")
        if plan.size is not None and tuple(size) != plan.size:
            wanted, got = (f"{s[1]}x{s[0]}" for s in (plan.size, size))
            raise ValueError(
                f"{self.path}: exported for pictures of {wanted} pixels, got {got}; "
                "export without --size takes any"
            )
        step = plan.batch or batch
        arrays = torch.cat([pictures, *[pictures[-1:]] * (-batch % step)]).cpu().numpy()
        arrays = np.ascontiguousarray(arrays.transpose(0, 2, 3, 1) if plan.channels_last else arrays)
        try:
            with without_autocast(torch.device("cpu")):  # the precision is the file's own
                found = [self._run(arrays[i : i + step]) for i in range(0, len(arrays), step)]
        except Exception as error:  # each runtime has its own classes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"{self.path}: failed on {size[1]}x{size[0]} pixels ({reason})") from None
        return [torch.from_numpy(np.concatenate(parts)[:batch]) for parts in zip(*found, strict=True)]

    @torch.inference_mode()
    def predict(self, images: Any, options: InferenceOptions | None = None) -> Tensor:
        """Label maps as `SegViT.predict` gives them, on the CPU.

        Args:
            images: a path, a PIL image, an array (H, W, 3) or a uint8 tensor (3, H, W) or (B, 3, H, W).
            options: those of the file, or none.

        Raises:
            TypeError: not an image, or not uint8.
            ValueError: pictures or options that the file was not exported for.
        """
        self.check(options or InferenceOptions())
        images = image_tensor(images, **self.config.reading)
        pictures = images if images.ndim == 4 else images[None]
        first, *rest = self.outputs(pictures)
        if self.plan.outputs == "logits":
            size = (int(pictures.shape[2]), int(pictures.shape[3]))
            (run,) = passes(size, InferenceOptions(), self.config.backbone.patch_size)
            grid = (int(first.shape[2]), int(first.shape[3]))
            views = Views(list_views(len(pictures), size, [run], [grid]), len(pictures), size)
            labels = semantic_argmax(first, rest[0], size, views=views, activation=self.activation)
            assert isinstance(labels, Tensor)
            first = labels
        return first if images.ndim == 4 else first[0]

    def check(self, options: InferenceOptions) -> None:
        """Raise ValueError for windows, scales or mirroring that are not those inside the file."""
        for name, plain in (
            ("window", None),
            ("stride", None),
            ("scales", [1.0]),
            ("flip", False),
            ("short_side", None),
        ):
            asked, inside = getattr(options, name), getattr(self.plan.options, name)
            if asked not in (plain, inside):
                raise ValueError(
                    f"{name}: {self.path} has its own inside ({inside}), got {asked}; export it again"
                )

    def check_precision(self, dtype: str) -> None:
        """Raise ValueError for a precision other than the file's own or the default."""
        own = self.description.precision
        if dtype not in ("float32", own):
            raise ValueError(f"dtype: {self.path} has its own inside ({own}), got {dtype}; export it again")

    def check_outputs(self, **asked: object) -> None:
        """Raise ValueError for the first output that is asked for and that the file cannot give."""
        for name, value in asked.items():
            if value:
                raise ValueError(f"{name}: {self.path} gives {self.plan.outputs} only; expected a checkpoint")

    def similarity_maps(self, images: Tensor) -> NoReturn:
        raise ValueError(f"{self.path}: an exported file has no similarity maps")
