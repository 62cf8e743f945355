"""Rotary positions of the backbone: from a grid of patches to the angles of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.config import BackboneConfig, RotaryConfig
from segvit_kernels import same_grid

Angles = tuple[Tensor, Tensor]
"""Cosine and sine, (tokens, 1 or heads, head channels / 2); prefix tokens come first and are not turned."""


def axial_frequencies(base: float, channels: int) -> Tensor:
    """Frequencies (2, D/2) of rows and columns for the pairs of a head of D channels (`RotaryConfig`)."""
    steps = torch.arange(channels // 4, dtype=torch.float32) * 4 / channels
    frequencies = base**-steps
    zeros = torch.zeros_like(frequencies)
    return torch.stack([torch.cat([frequencies, zeros]), torch.cat([zeros, frequencies])])


def _random_directions(base: float, channels: int, depth: int, heads: int) -> Tensor:
    """(2, depth, heads, D/2): the same lengths in directions that are drawn for each head (RoPE-Mixed)."""
    lengths = base ** -(torch.arange(channels // 4, dtype=torch.float32) * 4 / channels)
    direction = torch.rand(depth, heads, 1) * (2 * math.pi)
    turned = [direction, direction + math.pi / 2]
    rows, columns = ([lengths * f(angle) for angle in turned] for f in (torch.sin, torch.cos))
    return torch.stack([torch.cat(rows, -1), torch.cat(columns, -1)])


class Rotary(nn.Module):
    """The angles of a backbone's rotary positions.

    `freqs` are the frequencies of rows and of columns, (2, D/2), or learned ones, (2, depth, heads, D/2).
    They stay in float32 whatever the model's dtype: their rounding would be multiplied by row numbers.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        assert config.rotary is not None
        self.config: RotaryConfig = config.rotary
        channels = config.width // config.heads
        self.freqs: Tensor
        if self.config.learned:
            self.freqs = nn.Parameter(
                _random_directions(self.config.base, channels, config.depth, config.heads)
            )
        else:
            self.register_buffer("freqs", axial_frequencies(self.config.base, channels))
        self.folded_grid = (0, 0)  # of `folded`, after fold_grid()
        self.register_buffer("folded", None, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.itemsize < 4 else moved

        return super()._apply(at_least_float32, recurse)

    def coordinates(self, grid: tuple[int, int]) -> Tensor:
        """(2, h·w): row and column of each patch as `RotaryConfig` says, while training with augmentation."""
        config, like = self.config, self.freqs
        axes = []
        for axis, count in enumerate(grid):
            place = torch.arange(count, dtype=like.dtype, device=like.device)
            if config.coordinates == "centred":
                place = 2 * ((place + 0.5) / count) - 1
            else:
                place = place + config.offset
                place = place if config.grid is None else place / count * config.grid[axis]
            axes.append(place)
        rows, columns = axes
        places = [rows[:, None].expand(grid), columns.expand(grid)]
        coordinates = torch.stack([place.flatten() for place in places])
        if self.training:
            coordinates = self._augmented(coordinates)
        return coordinates * (2 * math.pi) if config.coordinates == "centred" else coordinates

    def _augmented(self, coordinates: Tensor) -> Tensor:
        config = self.config
        if config.shift:
            moved = coordinates.new_empty(2, 1).uniform_(-config.shift, config.shift)
            coordinates = coordinates + moved
        for most, number in ((config.jitter, 2), (config.rescale, 1)):
            if most > 1:
                factor = coordinates.new_empty(number, 1).uniform_(-math.log(most), math.log(most)).exp()
                coordinates = coordinates * factor
        return coordinates

    def forward(self, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
        """Cosines and sines (2, 1 or depth, prefix + h·w, 1 or heads, D/2) for the blocks."""
        if self.folded is not None and same_grid(grid, self.folded_grid) and not self.training:
            return self.folded
        freqs = self.freqs if self.config.learned else self.freqs[:, None, None]
        # No matrix product: autocast would round it.
        parts = [c[:, None, None] * f[:, None] for c, f in zip(self.coordinates(grid), freqs, strict=True)]
        angles = F.pad(parts[0] + parts[1], (0, 0, 0, 0, prefix_tokens, 0))
        return torch.stack([angles.cos(), angles.sin()])

    @torch.no_grad()
    def fold_grid(self, grid: tuple[int, int], prefix_tokens: int) -> None:
        """Keep the angles of a grid."""
        self.folded = None
        self.folded, self.folded_grid = self(grid, prefix_tokens), grid


def block_angles(
    table: Tensor, depth: int, shrink_at: int | None, grid: tuple[int, int], prefix_tokens: int
) -> list[Angles]:
    """Of every block the angles of its tokens; behind the block that shrinks those of the tokens it kept.

    Args:
        table: of `Rotary`.
    """
    shrink_at = depth if shrink_at is None else shrink_at
    full = table.unbind(1)
    kept = full
    if shrink_at < depth - 1:
        prefix, patches = table[:, :, :prefix_tokens], table[:, :, prefix_tokens:]
        patches = patches.unflatten(2, grid)[:, :, ::2, ::2].flatten(2, 3)
        kept = torch.cat([prefix, patches], dim=2).unbind(1)
    of_blocks = ((full if block <= shrink_at else kept)[block % len(full)] for block in range(depth))
    return [(cos, sin) for cos, sin in of_blocks]
