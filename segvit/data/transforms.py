"""Training augmentation of the published recipe, with torchvision.transforms.v2.

Random resize that keeps the aspect, random crop in which no class dominates, flip, photometric distortion,
padding. All randomness comes from torch's CPU generator, which `Augment` seeds from (seed, epoch, image) and
nothing else: the stream of samples is the same for any number of processes and loading workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segvit.system.extras import require

require("torchvision", extra="train")

from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402
from torchvision.transforms.v2 import functional as F  # noqa: E402

__all__ = [
    "Augment",
    "ClassBalancedCrop",
    "PhotometricDistortion",
    "RandomIntensity",
    "RandomMirror",
    "RandomScale",
    "sample_seed",
]


def sample_seed(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class RandomScale(v2.Transform):
    """Resize by r * short_side / (the image's short side), r uniform in `scale`; labels by nearest pixel."""

    def __init__(self, short_side: int, scale: tuple[float, float], longest: int = 2048) -> None:
        super().__init__()
        self.short_side, self.scale, self.longest = short_side, scale, longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        low, high = self.scale
        ratio = low + (high - low) * float(torch.rand(()))
        # The published (2048, crop) box: the long side may not pass 2048 * r, or 4 crops where that is more.
        limit = max(self.longest, 4 * self.short_side)
        factor = ratio * min(self.short_side / min(height, width), limit / max(height, width))
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        return {"size": [2, 2] if size == [1, 1] else size}  # torchvision does not resize to a single pixel

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            # As a plain tensor: for masks v2 takes "nearest", which is half a pixel off the image's bilinear.
            resized = F.resize(
                inpt.as_subclass(Tensor)[None], params["size"], v2.InterpolationMode.NEAREST_EXACT
            )
            return tv_tensors.wrap(resized[0], like=inpt)
        return F.resize(inpt, params["size"], v2.InterpolationMode.BILINEAR, antialias=True)


class ClassBalancedCrop(v2.Transform):
    """Crop to at most `size` (square), trying ten places for one where no class has over `class_share`."""

    def __init__(self, size: int, class_share: float, ignore_index: int, attempts: int = 10) -> None:
        super().__init__()
        self.size, self.class_share = size, class_share
        self.ignore_index, self.attempts = ignore_index, attempts

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        (label,) = (item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        height, width = label.shape[-2:]
        crop_height, crop_width = min(height, self.size), min(width, self.size)
        for _ in range(self.attempts):
            top = int(torch.randint(height - crop_height + 1, ()))
            left = int(torch.randint(width - crop_width + 1, ()))
            if self.class_share >= 1:
                break
            piece = label[..., top : top + crop_height, left : left + crop_width]
            counts = piece[piece != self.ignore_index].flatten().bincount()
            if (counts > 0).sum() > 1 and counts.max() <= self.class_share * counts.sum():
                break
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue of an RGB image, each half of the time.

    Torchvision's own, which is SSD's, also exchanges channels: the sky becomes red, the grass blue. The
    recipes of semantic segmentation do not.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


class RandomMirror(v2.RandomHorizontalFlip):
    """Mirror half of the time; of label maps also exchange pairs of classes, such as left and right arm."""

    def __init__(self, exchanged: Sequence[tuple[int, int]]) -> None:
        super().__init__(0.5)
        self.exchanged = exchanged

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        mirrored = super().transform(inpt, params)
        if not isinstance(inpt, tv_tensors.Mask):
            return mirrored
        before = mirrored.as_subclass(Tensor)
        after = before.clone()
        for left, right in self.exchanged:
            after[before == left], after[before == right] = right, left
        return tv_tensors.wrap(after, like=inpt)


class RandomIntensity(v2.Transform):
    """Brightness and contrast of an image of any channels, all alike, each half of the time.

    The part of `PhotometricDistortion` that is not about colour; contrast around each channel's mean.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        bright, contrast = (
            float(torch.empty(()).uniform_(*limits)) for limits in ((0.875, 1.125), (0.5, 1.5))
        )
        use = torch.rand(2) < 0.5
        return {"brightness": bright if use[0] else 1.0, "contrast": contrast if use[1] else 1.0}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        image = inpt.as_subclass(Tensor).float() * params["brightness"]
        mean = image.mean((-2, -1), keepdim=True)
        image = (image - mean) * params["contrast"] + mean
        return tv_tensors.wrap(image.round().clamp(0, 255).to(inpt.dtype), like=inpt)


class Augment:
    """(image uint8 (C, H, W), label int64 (H, W)) -> the same kinds at (size, size).

    Args:
        size: side of the result.
        scale: range of the random resize relative to short side = size.
        class_share, flip, photometric: see `segvit.options.AugmentationOptions`.
        mean: colour of the padding on 0..1 (it becomes 0 after normalisation), a value for each channel.
        ignore_index: label of the padding.
        exchanged: pairs of classes that mirroring exchanges, see `segvit.data.names.mirrored_classes`.
        seed: first of the three numbers that decide everything random; the others come with the call.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        class_share: float = 0.75,
        flip: bool = True,
        photometric: bool = True,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        ignore_index: int = 255,
        exchanged: Sequence[tuple[int, int]] = (),
        seed: int = 0,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: got {tuple(scale)}, expected 0 < low <= high")
        if not 0 < class_share <= 1:
            raise ValueError(f"class_share: got {class_share}, expected a share in (0, 1]")
        self.size, self.seed, self.ignore_index = size, seed, ignore_index
        self.fill = [round(255 * channel) for channel in mean]
        steps: list[v2.Transform] = [
            RandomScale(size, (scale[0], scale[1])),
            ClassBalancedCrop(size, class_share, ignore_index),
        ]
        if flip:
            steps.append(RandomMirror(exchanged))
        if photometric:
            colour = len(self.fill) == 3
            steps.append(PhotometricDistortion() if colour else RandomIntensity())
        self.steps = v2.Compose(steps)

    def __call__(self, image: Tensor, label: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would reseed the GPU too, and with it dropout.
            torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
            image, label = self.steps(tv_tensors.Image(image), tv_tensors.Mask(label))
        right, bottom = self.size - image.shape[-1], self.size - image.shape[-2]
        if right or bottom:
            image = F.pad(image, [0, 0, right, bottom], fill=self.fill)
            label = F.pad(label, [0, 0, right, bottom], fill=self.ignore_index)
        return image.as_subclass(Tensor), label.as_subclass(Tensor)
