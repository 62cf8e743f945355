"""What inference asks of a model; `segvit.SegViT` answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from segvit.config import SegViTConfig
from segvit.options import InferenceOptions
from segvit_kernels import Views


class Segmenter(Protocol):
    """A network whose outputs become label maps.

    Attributes:
        config: its sizes and image statistics.
        activation: of upsampled mask logits, "sigmoid" or "none", see `segvit_kernels.semantic_argmax`.
    """

    config: SegViTConfig
    activation: str

    def __call__(self, images: Tensor) -> Any:
        """The outputs for normalised images (B, channels, H, W), H and W multiples of the patch size."""

    def mask_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the mask logits for images of `size`."""

    def scoring(self, output: Any) -> tuple[Tensor, Tensor]:
        """Mask logits (B, Q, h, w) and class probabilities (B, Q, N) of an output."""

    def labels(self, output: Sequence[Any], size: tuple[int, int], views: Views | None = None) -> Tensor:
        """Label maps (B, H, W) of `size` from outputs, each image of which is a view."""


class Foldable(Segmenter, Protocol):
    """A module that can be made ready for one size of image: what the engine asks of its own copy.

    Attributes:
        mean: the mean colour, on the network's device and in its dtype.
    """

    mean: Tensor

    def eval(self) -> Foldable:
        """Out of training; returns self."""

    def requires_grad_(self, requires_grad: bool = True) -> Foldable:
        """Whether its parameters have gradients; returns self."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules inside, itself among them."""

    def fuse(self) -> Foldable:
        """Fold what depends on parameters alone; returns self."""

    def unfuse(self) -> Foldable:
        """Undo `fuse`; returns self."""

    def fold_normalisation(self, pixel: float) -> tuple[Tensor, Tensor | None]:
        """Take images u · pixel + shift of bytes u; the shift, and a factor on such images or None."""

    def fold_grid(self, size: tuple[int, int]) -> None:
        """Store for images of `size` what would be resized to their grid in each call."""

    def take_class_head(self) -> nn.Module | None:
        """Leave classification to the caller, who gives the `class_logits` of an output to this module.

        None where outputs are not classified.
        """

    def plain_blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks whose linear layers are called as they are, and may be replaced."""


class Predictor(Segmenter, Protocol):
    """A model that predicts pictures: what bulk prediction asks of it."""

    def predict(self, images: Tensor, options: InferenceOptions | None = None) -> Tensor:
        """The label map (H, W) of a uint8 image (channels, H, W), (B, H, W) of (B, channels, H, W)."""

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalised images of uint8 images (B, channels, H, W)."""

    def pad_to_patches(self, images: Tensor) -> Tensor:
        """Normalised images, padded at the right and bottom to multiples of the patch size."""

    def similarity_maps(self, images: Tensor) -> list[Tensor]:
        """Similarity maps (B, N, h, w) of the stages in running order, not accumulated."""

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores (B, N, ...) of all classes as shares that add up to 1."""
