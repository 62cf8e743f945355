"""What a SegViT is made of, as frozen dataclasses that go to JSON and back. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

MLPS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
RESIZES = ("bicubic", "bicubic_antialias", "bilinear", "bilinear_antialias")
DECODERS = ("atm", "segvitv2", "linear", "eomt")


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions: queries and keys are turned, pair by pair of channels, by angles of their patch.

    The angle of a pair is row · f + column · g; in a head of D channels the pairs are i and i + D/2. Unless
    learned, the first half of them has f = base^(-4i/D) and g = 0, the second half the same with columns.

    Attributes:
        coordinates: "centred", from -2π to 2π over any image, at the centres of patches (DINOv3); or "index",
            numbers of row and column (EVA-02, Perception Encoder, RoPE-ViT).
        base: see above.
        grid: numbers of rows and columns that "index" is scaled to, whatever the image's; None: not scaled.
        offset: added to "index" before it is scaled.
        learned: every head of every block has frequencies of its own, which are trained (RoPE-Mixed).
        shift, jitter, rescale: DINOv3's augmentation, in training alone. Coordinates, centred ones from -1 to
            1, are moved by up to `shift` and scaled by a factor from 1/jitter to `jitter`, each direction by
            itself, and both by one from 1/rescale to `rescale`. 0, 1, 1: none.
    """

    coordinates: str = "centred"
    base: float = 100.0
    grid: tuple[int, int] | None = None
    offset: float = 0.0
    learned: bool = False
    shift: float = 0.0
    jitter: float = 1.0
    rescale: float = 1.0

    def __post_init__(self) -> None:
        _check_types(self)
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
            _check(min(self.grid) >= 1, f"rotary.grid must be at least 1 x 1, got {self.grid}")
        kinds = ("centred", "index")
        _check(
            self.coordinates in kinds, f"rotary.coordinates must be {kinds[0]!r} or {kinds[1]!r}, "
            f"got {self.coordinates!r}"
        )  # fmt: skip
        _check(
            self.coordinates == "index" or (self.grid is None and self.offset == 0),
            "rotary.grid and rotary.offset are of coordinates 'index', got 'centred'",
        )
        _check(self.base > 1, f"rotary.base must be more than 1, got {self.base}")
        _check(self.shift >= 0, f"rotary.shift must be at least 0, got {self.shift}")
        for name in ("jitter", "rescale"):
            value = getattr(self, name)
            _check(value >= 1, f"rotary.{name} must be at least 1, got {value}")

    def places(self) -> tuple[Any, ...]:
        """What must be the same for weights to compute the same; the other fields are for training."""
        return self.coordinates, self.grid, self.offset, self.learned


@dataclass(frozen=True)
class BackboneConfig:
    """A plain Vision Transformer, in the variants that the weights of timm, DINOv3, EVA-02, CLIP, ... need.

    Attributes:
        width, depth, heads: token width, number of blocks, attention heads.
        patch_size: side of a square patch in pixels.
        mlp: "gelu", its approximations "gelu_tanh" (SigLIP 2) and "quick_gelu" (OpenAI's CLIP), or "swiglu".
        mlp_ratio: rows of mlp.fc1 / width; a SwiGLU packs gate and value into fc1, as timm counts it.
        class_token: whether a class token runs through the blocks. Without one, `cls_token` and its position
            in a checkpoint are dead weights and are not loaded (as in published SegViT models).
        register_tokens: number of register tokens.
        layer_scale: initial value of LayerScale, or None for blocks without it.
        in_channels: channels of the images: 3 for RGB, 1 for grey, or any number; RGB weights fit all.
        qkv_bias: whether the packed query, key and value projection has a bias.
        norm_eps: what every LayerNorm adds to the variance.
        pre_norm: a LayerNorm between the embeddings and the first block (CLIP).
        final_norm: apply the final LayerNorm to every tapped feature map (published SegViT: no).
        drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
        drop_path_branch: "mlp" (published SegViT) or "both" residual branches.
        shrink_at: index of the block that keeps every second row and column of the token grid (query-based
            down-sampling, paper section 3.3): later blocks run on a quarter of the tokens. None: no block.
        shrink_edges: share of all patches that this block keeps besides, those where a lightweight head sees
            an edge (edge-aware down-sampling of SegViTv2, arXiv 2306.06289). Needs `upsample`.
        absolute_positions: a learned position embedding is added to the patches.
        position_resize: how it gets to other grids: "bicubic", "bilinear", or either with "_antialias".
        rotary: rotary positions, beside or in place of it.
        attention_norm, mlp_norm: a LayerNorm before the last layer of the branch (sub-LN, EVA-02).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch_size: int = 16
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    class_token: bool = False
    register_tokens: int = 0
    layer_scale: float | None = None
    in_channels: int = 3
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    pre_norm: bool = False
    final_norm: bool = False
    drop_path: float = 0.0
    drop_path_branch: str = "mlp"
    shrink_at: int | None = None
    shrink_edges: float = 0.0
    absolute_positions: bool = True
    position_resize: str = "bicubic"
    rotary: RotaryConfig | None = None
    attention_norm: bool = False
    mlp_norm: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rotary, Mapping):
            object.__setattr__(self, "rotary", _from_dict(RotaryConfig, self.rotary))
        _check_types(self)
        _check_sizes(self, "width", "depth", "heads", "patch_size", "in_channels")
        _check_sizes(self, "register_tokens", least=0)
        _check(self.mlp_ratio <= 64, f"mlp_ratio must be at most 64, got {self.mlp_ratio}")
        ratio, hidden = self.mlp_ratio, self.mlp_ratio * self.width
        _check(
            math.isfinite(hidden) and hidden >= 1, f"mlp_ratio must give at least one channel, got {ratio}"
        )
        _check(
            self.mlp == "gelu" or int(hidden) % 2 == 0,
            f"mlp_ratio {ratio} gives {int(hidden)} channels, and {self.mlp!r} needs an even number",
        )
        _check(self.width % self.heads == 0, f"width {self.width} is not divisible by heads {self.heads}")
        _check(self.mlp in MLPS, f"mlp must be {', '.join(map(repr, MLPS))}, got {self.mlp!r}")
        _check(0 < self.norm_eps < 1, f"norm_eps must be between 0 and 1, got {self.norm_eps}")
        _check(
            self.drop_path_branch in ("mlp", "both"),
            f"drop_path_branch must be 'mlp' or 'both', got {self.drop_path_branch!r}",
        )
        _check(0 <= self.drop_path < 1, f"drop_path must be in [0, 1), got {self.drop_path}")
        _check(
            self.shrink_at is None or 0 <= self.shrink_at < self.depth,
            f"shrink_at must be None or a block index from 0 to {self.depth - 1}, got {self.shrink_at}",
        )
        edges = self.shrink_edges
        _check(0 <= edges <= 0.75, f"shrink_edges must be between 0 and 0.75, got {edges}")
        _check(not edges or self.shrink_at is not None, f"shrink_edges needs shrink_at, got {edges} without")
        _check(
            self.position_resize in RESIZES,
            f"position_resize must be {', '.join(map(repr, RESIZES))}, got {self.position_resize!r}",
        )
        head = self.width // self.heads
        _check(
            self.rotary is None or head % 4 == 0,
            f"rotary positions need heads of a multiple of 4 channels, got {self.width} / {self.heads}",
        )

    def grid_after(self, block: int, grid: tuple[int, int]) -> tuple[int, int]:
        """The token grid after a block, for images of `grid` patches."""
        if self.shrink_at is None or block < self.shrink_at:
            return grid
        return (grid[0] + 1) // 2, (grid[1] + 1) // 2

    def to_dict(self) -> dict[str, Any]:
        """A dict; fields that came later are in it where they say something, for readers without them."""
        values = dataclasses.asdict(self)
        values = {key: value for key, value in values.items() if key not in _LATER or value != _LATER[key]}
        if self.rotary and self.rotary.grid:
            values["rotary"]["grid"] = list(self.rotary.grid)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackboneConfig:
        return _from_dict(cls, values)


_LATER: dict[str, Any] = {
    "shrink_edges": 0.0,
    "decoder": "atm",
    "queries": 100,
    "query_blocks": None,
    "upscale_blocks": None,
    "upsample_depth": None,
    "query_features": False,
    "absolute_positions": True,
    "position_resize": "bicubic",
    "rotary": None,
    "attention_norm": False,
    "mlp_norm": False,
}


@dataclass(frozen=True)
class SegViTConfig:
    """A SegViT model: backbone, decoder, and how its images are prepared.

    Attributes:
        num_classes: number of classes, and of class tokens.
        decoder: "atm", the cascade of SegViT; "segvitv2", the same without self-attention of class tokens and
            without class mixing (arXiv 2306.06289); "linear", one linear layer on the last feature map;
            "eomt", queries that join the last blocks of the backbone (arXiv 2503.19108).
        taps: 0-based indices of the blocks whose output feeds the decoder, shallow to deep; the last one is
            the backbone's last block. Without `upsample` each has a stage of its own, the deepest first. The
            linear layer and EoMT have the last alone.
        decoder_dim: width of the decoder; None: half the backbone's.
        decoder_heads: attention heads of the decoder; None: one for every 32 channels.
        decoder_depth: layers in a stage.
        decoder_dropout: dropout on attention weights, after each sub-layer and inside the feed-forward part.
        upsample: query-based up-sampling (paper, section 3.3): learned queries, one for each patch, attend to
            the taps in turn, shallow to deep, and a single ATM stage looks at the result. Needs a backbone
            that shrinks.
        resize_queries: resize these queries to the image's grid, as position embeddings are. Otherwise they
            and the masks keep the grid of `image_size` whatever the image's, as in published models.
        key_positions: add to each key of the up-sampling the query of its own place, see
            `segvit_kernels.QueryUpsample`. Published models do not, and take longer to train.
        upsample_depth: layers for each tap in the up-sampling; None: `decoder_depth`, as in published models.
        query_features: each query of the up-sampling starts with the features of its own place, of the first
            tap, which must come before the block that shrinks; see `segvit_kernels.QueryUpsample`.
        queries: EoMT's number of queries.
        query_blocks: blocks that they run through, the last ones; None: 3 of up to 12, 4 of up to 24, else 5.
        upscale_blocks: how often EoMT's features get twice the rows and columns; None: as often as leaves
            cells of 4 pixels a side or more, once at least.
        image_size: height and width of training crops; the position embedding is stored for this size.
        mean, std: of each channel on the 0..1 scale.
        value_range: stored values of pictures that become black and white, one pair or one for each channel;
            None: found picture by picture for other than 8-bit pictures, see `segvit.data.read_image`.
        class_names: one name for each class, or None.
        palette: one (red, green, blue) in 0..255 for each class, or None.
    """

    backbone: BackboneConfig
    num_classes: int
    taps: tuple[int, ...]
    decoder_dim: int | None = None
    decoder_heads: int | None = None
    decoder_depth: int = 3
    decoder_dropout: float = 0.1
    upsample: bool = False
    resize_queries: bool = True
    key_positions: bool = False
    image_size: tuple[int, int] = (512, 512)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    value_range: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    decoder: str = "atm"
    queries: int = 100
    query_blocks: int | None = None
    upscale_blocks: int | None = None
    upsample_depth: int | None = None
    query_features: bool = False

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if isinstance(self.image_size, Integral) and not isinstance(self.image_size, bool):
            fill("image_size", (self.image_size, self.image_size))
        _check_types(self)
        _check(
            self.decoder in DECODERS,
            f"decoder must be {', '.join(map(repr, DECODERS))}, got {self.decoder!r}",
        )
        for name in ("taps", "image_size", "mean", "std", "value_range", "class_names"):
            if getattr(self, name) is not None:
                fill(name, tuple(getattr(self, name)))
        if self.decoder in ("linear", "eomt"):
            fill("taps", self.taps[-1:])
        if self.decoder == "eomt":
            self._fill_eomt()
        if self.palette is not None:
            fill("palette", tuple(tuple(colour) for colour in self.palette))
        dim = self.backbone.width // 2 if self.decoder_dim is None else self.decoder_dim
        fill("decoder_dim", dim)
        heads = max(1, dim // 32) if self.decoder_heads is None else self.decoder_heads
        fill("decoder_heads", heads)

        _check_sizes(self, "num_classes", "decoder_dim", "decoder_heads", "decoder_depth")
        _check(
            dim % heads == 0,
            f"decoder_dim {self.decoder_dim} is not divisible by decoder_heads {self.decoder_heads}",
        )
        if self.upsample_depth is not None:
            _check_sizes(self, "upsample_depth")
        dropout = self.decoder_dropout
        _check(0 <= dropout < 1, f"decoder_dropout must be in [0, 1), got {dropout}")
        taps, last = self.taps, self.backbone.depth - 1
        _check(
            len(taps) > 0 and taps == tuple(sorted(set(taps))) and taps[0] >= 0 and taps[-1] == last,
            f"taps must be increasing block indices from 0 that end with the last block, {last}; got {taps}",
        )
        _check(
            not self.upsample or self.backbone.shrink_at is not None,
            "upsample needs a backbone that shrinks: shrink_at is None",
        )
        _check(
            (self.upsample and self.decoder != "linear") or not self.backbone.shrink_edges,
            "shrink_edges needs upsample, of decoder atm or segvitv2: its tokens are on no grid, and only "
            "queries take them to one",
        )
        full = self.upsample and self.resize_queries and self.taps[0] < (self.backbone.shrink_at or 0)
        _check(
            full or not self.query_features,
            "query_features needs upsample, resize_queries and a first tap before the block that shrinks",
        )
        patch, size = self.backbone.patch_size, self.image_size
        _check(
            len(size) == 2 and all(side >= patch and side % patch == 0 for side in size),
            f"image_size must be two multiples of the patch size {patch}, got {size}",
        )
        _check(
            max(size) <= _LARGEST,
            f"image_size must be at most {_LARGEST:,}, got {size}",
        )
        channels = self.backbone.in_channels
        for name in ("mean", "std"):
            if getattr(self, name) == (0.5, 0.5, 0.5):
                fill(name, (0.5,) * channels)
            values = getattr(self, name)
            _check(len(values) == channels, f"{name} must have in_channels = {channels} values, got {values}")
        _check(
            self.value_range is None or len(self.value_range) in (2, 2 * channels),
            f"value_range must be 2 numbers, or 2 for each of {channels} channels, got {self.value_range}",
        )
        _check(all(map(math.isfinite, self.mean)), f"mean must be finite, got {self.mean}")
        _check(all(0 < value < math.inf for value in self.std), f"std must be positive, got {self.std}")
        # No data has such values on the 0..1 scale; what was meant is 123.675, 58.395 and their like.
        for name in ("mean", "std"):
            values = getattr(self, name)
            _check(
                max(map(abs, values)) <= 4,
                f"{name} must be on the 0..1 scale, got {values}; on 0..255 divide by 255: "
                f"{[round(value / 255, 4) for value in values]}",
            )
        for name in ("class_names", "palette"):
            entries = getattr(self, name)
            _check(
                entries is None or len(entries) == self.num_classes,
                f"{name} must have num_classes = {self.num_classes} entries, got {entries and len(entries)}",
            )
        wrong = [colour for colour in self.palette or () if not 0 <= min(colour) <= max(colour) <= 255]
        _check(not wrong, f"palette must have values from 0 to 255, got {wrong[:1]}")

    def _fill_eomt(self) -> None:
        """What EoMT has by default, and what it cannot be."""
        depth, patch = self.backbone.depth, self.backbone.patch_size
        defaults = {
            "backbone": dataclasses.replace(self.backbone, final_norm=True),
            "query_blocks": min(depth, 3 if depth <= 12 else 4 if depth <= 24 else 5),
            "upscale_blocks": max(1, patch.bit_length() - 3),
        }
        for name, value in defaults.items():
            if name == "backbone" or getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_sizes(self, "queries", "query_blocks")
        _check_sizes(self, "upscale_blocks", least=0)
        first = depth - typing.cast(int, self.query_blocks)
        _check(first >= 0, f"query_blocks must be at most the {depth} blocks, got {self.query_blocks}")
        shrink_at = self.backbone.shrink_at
        _check(
            shrink_at is None or shrink_at < first,
            f"shrink_at must be before the blocks of decoder eomt's queries, {first} and on; got {shrink_at}",
        )
        _check(not self.upsample, "upsample is not of decoder eomt, got true")

    @classmethod
    def preset(cls, name: str, num_classes: int, *, shrunk: bool = False, **overrides: Any) -> SegViTConfig:
        """A named model size; `overrides` are fields of this class or of `BackboneConfig`.

        Taps and stochastic depth of vit_base and vit_large are the paper's (section 4), and so is where they
        shrink: at block 8 of ViT-L and, judging by the operations the paper counts, block 6 of ViT-B.

        Args:
            shrunk: the Shrunk structure (section 3.3). With `upsample=False` it is the paper's naive variant,
                one ATM stage on the shrunk features; `taps=(last block,)` without `shrunk` is the single one.

        Raises:
            ValueError: unknown preset or field.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        values = {**PRESETS[name], **overrides}
        if shrunk:
            depth = PRESETS[name]["depth"]
            shrink_at = 6 if depth == 12 else depth // 3
            values = {"shrink_at": shrink_at, "upsample": values.get("decoder") != "eomt", **values}
            if "taps" not in overrides:
                last = (values["depth"] - 1,)
                upsampled = usual_taps(values["depth"], values["shrink_at"] or 0)
                values["taps"] = upsampled if values["upsample"] else last
        return cls.from_fields({**values, "num_classes": num_classes})

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> SegViTConfig:
        """A configuration from fields of this class and of `BackboneConfig`, side by side.

        Raises:
            ValueError: unknown or missing fields, or values that do not go together.
        """
        values = dict(values)
        names = {field.name for field in dataclasses.fields(BackboneConfig)}
        backbone = {key: values.pop(key) for key in list(values) if key in names}
        return cls.from_dict({"backbone": backbone, **values})

    @property
    def reading(self) -> dict[str, Any]:
        """How pictures are read for this model: arguments of `segvit.data.read_image`."""
        return {"channels": self.backbone.in_channels, "value_range": self.value_range}

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types; fields that came later are in it where they say something."""
        return {
            key: _lists(value.to_dict() if isinstance(value, BackboneConfig) else value)
            for key, value in ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
            if key not in _LATER or value != _LATER[key]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SegViTConfig:
        """The inverse of `to_dict`; "head" is what the decoder was called before.

        Raises:
            ValueError: unknown or missing keys, or values that do not go together.
        """
        values = dict(values)
        if (head := values.pop("head", None)) is not None:
            values["decoder"] = decoder_of(head)
        if isinstance(values.get("backbone"), Mapping):
            values["backbone"] = BackboneConfig.from_dict(values["backbone"])
        return _from_dict(cls, values)


_TAPS: dict[int, dict[str, Any]] = {
    12: {"depth": 12, "taps": (5, 7, 11), "drop_path": 0.1},
    24: {"depth": 24, "taps": (7, 15, 23), "drop_path": 0.3},
    32: {"depth": 32, "taps": (10, 20, 31), "drop_path": 0.3},
}
_TINY = {"width": 192, "heads": 3, **_TAPS[12]}
_SMALL = {"width": 384, "heads": 6, **_TAPS[12]}
_BASE = {"width": 768, "heads": 12, **_TAPS[12]}
_LARGE = {"width": 1024, "heads": 16, **_TAPS[24]}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_DINOV3 = {
    "class_token": True,
    "register_tokens": 4,
    "layer_scale": 1e-5,
    "norm_eps": 1e-5,
    "absolute_positions": False,
    "rotary": {"rescale": 2.0},
    **_IMAGENET,
}
_EVA02 = {
    "patch_size": 14,
    "image_size": (518, 518),
    "class_token": True,
    "mlp": "swiglu",
    "rotary": {"coordinates": "index", "base": 10000.0, "grid": (16, 16)},
    "position_resize": "bicubic_antialias",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_SIGLIP2 = {"mlp": "gelu_tanh", "position_resize": "bicubic_antialias"}
_PE = {
    "class_token": True,
    "pre_norm": True,
    "norm_eps": 1e-5,
    "rotary": {"coordinates": "index", "base": 10000.0, "grid": (32, 32), "offset": 1.0},
    "position_resize": "bicubic_antialias",
}
PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": _TINY,
    "vit_small": _SMALL,
    "vit_base": _BASE,
    "vit_large": {**_LARGE, "image_size": (640, 640)},
    "dinov3_vits16": {**_SMALL, **_DINOV3},
    "dinov3_vits16plus": {**_SMALL, **_DINOV3, "mlp": "swiglu", "mlp_ratio": 8.0},
    "dinov3_vitb16": {**_BASE, **_DINOV3},
    "dinov3_vitl16": {**_LARGE, **_DINOV3},
    "dinov3_vith16plus": {
        **{"width": 1280, "heads": 20, **_TAPS[32]},
        **_DINOV3,
        "mlp": "swiglu",
        "mlp_ratio": 8.0,
    },
    "eva02_vits14": {**_SMALL, **_EVA02, "mlp_ratio": 2048 / 384},
    "eva02_vitb14": {**_BASE, **_EVA02, "mlp_ratio": 4096 / 768, "mlp_norm": True},
    "eva02_vitl14": {**_LARGE, **_EVA02, "mlp_ratio": 5460 / 1024, "mlp_norm": True},
    "siglip2_vitb16": {**_BASE, **_SIGLIP2},
    "siglip2_vitl16": {**_LARGE, **_SIGLIP2},
    "pe_spatial_vits16": {**_SMALL, **_PE},
    "pe_spatial_vitb16": {**_BASE, **_PE},
    "pe_spatial_vitl14": {**_LARGE, **_PE, "patch_size": 14, "image_size": (518, 518)},
}


def usual_taps(depth: int, upsample_from: int | None = None) -> tuple[int, ...]:
    """The blocks that feed a decoder where nobody says: the published ones, at other depths thirds.

    For up-sampling, the last features before block `upsample_from`, which shrinks, if there are any, and the
    last of all.
    """
    last = depth - 1
    if upsample_from is not None:
        return (upsample_from - 1, last) if 0 < upsample_from < depth else (last,)
    if depth in _TAPS:
        return tuple(_TAPS[depth]["taps"])
    return tuple(sorted({max(0, depth * third // 3 - 1) for third in (1, 2, 3)}))


def decoder_of(head: Any) -> Any:
    """The decoder that an earlier name means; others stay."""
    return "atm" if head == "segvit" else head


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message[:500])


_LARGEST = 1 << 16  # of whatever is counted; blocks and heads have their own
_MOST = {
    "depth": 1000,
    "decoder_depth": 1000,
    "upsample_depth": 1000,
    "heads": 4096,
    "decoder_heads": 4096,
    "patch_size": 1024,
}
_MOST |= {"queries": 1 << 14, "query_blocks": 1000, "upscale_blocks": 6}
_MOST["num_classes"] = 1 << 15  # of `segvit_kernels.semantic_argmax`


def _check_sizes(config: Any, *names: str, least: int = 1) -> None:
    for name in names:
        value, most = getattr(config, name), _MOST.get(name, _LARGEST)
        _check(value >= least, f"{name} must be at least {least}, got {value}")
        _check(value <= most, f"{name} must be at most {most:,}, got {value}")


def plain(value: Any) -> Any:
    """NumPy's numbers and arrays, and paths, as Python's own: what JSON and YAML take."""
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value).__module__ == "numpy":
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_types(config: Any) -> None:
    """Make values plain; raise ValueError for the first that is not of its type. Lists do for tuples."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = plain(getattr(config, name))
        object.__setattr__(config, name, value)
        _check(_is_of(kind, value), f"{name} must be {_described(kind)}, got {value!r}"[:300])


def _is_of(kind: Any, value: Any) -> bool:
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_of(member, value) for member in arguments)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(map(_is_of, kinds, value))
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # of what is no number, too
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_described, arguments))
    if typing.get_origin(kind) is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} of "
        return f"a list ({count}{_described(arguments[0])})"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(kind) or ("null" if kind is types.NoneType else f"a {kind.__name__}")


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        named = ", ".join(name if name.isidentifier() else repr(name) for name in map(str, unknown))[:200]
        raise ValueError(f"{cls.__name__} has no field {named}; it has {', '.join(fields)}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**values)
