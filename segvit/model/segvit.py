"""SegViT: plain ViT backbone, ATM decoder, and what turns images into label maps."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.config import BackboneConfig, RotaryConfig, SegViTConfig
from segvit.data.pictures import image_tensor
from segvit.inference.engine import InferenceEngine
from segvit.inference.passes import check_region, label_maps, label_maps_with_scores
from segvit.model.backbone import Block, LayerScale, VisionTransformer, patch_grid
from segvit.model.backbone_weights import adapt_backbone_state
from segvit.model.checkpoint import (
    CONFIG_FILE,
    DATA_FILE,
    WEIGHTS_FILE,
    LoadReport,
    find_checkpoint,
    load_state_dict,
    read_config,
    read_state_dict,
    save_weights,
)
from segvit.model.decoder import ATMDecoder, Decoder, StageOutput
from segvit.model.pretrained import Pretrained, open_pretrained
from segvit.model.rotary import Rotary
from segvit.model.shrunk import ShrunkDecoder
from segvit.options import InferenceOptions
from segvit.system.extras import require
from segvit.system.files import atomic_write
from segvit_kernels import (
    PackedLinear,
    Views,
    exportable,
    is_plain,
    pack_linears,
    semantic_argmax,
    unpack_linears,
)


@exportable
class SegViTOutput(NamedTuple):
    """Prediction of a SegViT, with N classes and a grid of h x w patches.

    Attributes:
        class_logits: (B, N, N+1), the last entry "no object"; of SegViTv2 (B, N), whether the class is there.
        mask_logits: (B, N, h, w), before the sigmoid.
        auxiliary: (class_logits, mask_logits) of the earlier stages, earliest first.
        edges: of a backbone with `shrink_edges`, how likely each patch has an edge, logits (B, h, w).
    """

    class_logits: Tensor
    mask_logits: Tensor
    auxiliary: list[tuple[Tensor, Tensor]]
    edges: Tensor | None = None


class SegViT(nn.Module):
    """Semantic segmentation with a plain Vision Transformer (NeurIPS 2022, arXiv 2210.05844).

    `SegViT(config)` and `SegViT.from_pretrained` make the kind of model that `config.decoder` names, a
    subclass for each of them but "atm".

    Args:
        config: sizes and image statistics; see `SegViTConfig.preset`.

    Attributes:
        data_record: what a training said of its data (data.json: what label values mean), of a model that was
            read with it, for `save_pretrained`; set it to None after a training of your own on other labels.
    """

    data_record: bytes | None = None
    kind = "atm"  # of decoder
    kinds: ClassVar[dict[str, type[SegViT]]] = {}  # all that are known, by decoder
    activation = "sigmoid"  # of upsampled mask logits
    mixes_classes = True  # else scoring() gives the diagonal: every mask is of a class of its own
    has_similarity_maps = True
    backbone_frozen = False
    shrink_after = 0.0

    mean: Tensor
    std: Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__:
            SegViT.kinds[cls.kind] = cls

    def __new__(cls, config: SegViTConfig | None = None) -> SegViT:
        decoder = getattr(config, "decoder", cls.kind)
        if cls is not SegViT or decoder == cls.kind:
            return super().__new__(cls)
        if decoder not in SegViT.kinds:
            raise ImportError(f"decoder {decoder!r} comes with segvit.model.heads; import SegViT from segvit")
        return super().__new__(SegViT.kinds[decoder])

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__()
        if config.decoder != self.kind:
            config = dataclasses.replace(config, decoder=self.kind)
        self.config = config
        self.backbone = VisionTransformer(config.backbone, config.image_size, config.taps)
        self.decoder = self._make_decoder(config)
        self._set_statistics()
        self.fused = False
        self.register_load_state_dict_pre_hook(_unfuse)

    def _set_statistics(self, like: Tensor | None = None) -> None:
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.config, name)).view(-1, 1, 1)
            self.register_buffer(name, values if like is None else values.to(like), persistent=False)

    def _make_decoder(self, config: SegViTConfig) -> Decoder:
        return ShrunkDecoder(config) if config.upsample else ATMDecoder(config)

    def forward(self, images: Tensor) -> SegViTOutput:
        """Class and mask logits.

        Args:
            images: normalised, (B, channels, H, W), H and W multiples of the patch size; see `preprocess`.

        Raises:
            ValueError: another shape.
        """
        stages, edges = self._stages(images)
        *auxiliary, (class_logits, mask_logits) = [
            (stage.class_logits, stage.mask_logits.unflatten(-1, stage.grid)) for stage in stages
        ]
        return SegViTOutput(class_logits, mask_logits, auxiliary, edges)

    def _stages(self, images: Tensor, accumulate: bool = True) -> tuple[list[StageOutput], Tensor | None]:
        """What the decoder gives, and the logits of edges."""
        grid = self._grid(images)
        if not self.config.backbone.shrink_edges:
            return self.decoder(self.backbone(images), grid, accumulate=accumulate), None
        found: list[tuple[Tensor, Tensor]] = []
        decoder = cast(ShrunkDecoder, self.decoder)

        def keep(patches: Tensor, grid: tuple[int, int]) -> Tensor:
            found.append(decoder.edges(patches, grid))
            return found[0][1]

        features = self.backbone(images, keep=keep)
        edges, places = found[0]
        return decoder(features, grid, accumulate=accumulate, places=places), edges

    def similarity_maps(self, images: Tensor) -> list[Tensor]:
        """Similarity maps (B, N, h, w) of the stages in running order, not accumulated (paper, figure 1).

        With `upsample` in the configuration: of the layers of its only stage.
        """
        stages, _ = self._stages(images, accumulate=False)
        return [stage.mask_logits.unflatten(-1, stage.grid) for stage in stages]

    def mask_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of `mask_logits` for images of `size`, multiples of the patch size."""
        patch = self.config.backbone.patch_size
        return self.decoder.mask_grid((size[0] // patch, size[1] // patch))

    def _grid(self, images: Tensor) -> tuple[int, int]:
        patch, channels = self.config.backbone.patch_size, self.config.backbone.in_channels
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or images.shape[2] % patch
            or images.shape[3] % patch
        ):
            expected = f"(B, {channels}, H, W), H and W multiples of {patch}"
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point, got {images.dtype}; see preprocess()")
        return patch_grid(images, patch)

    # From images to label maps

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (B, 3, H, W), or one (3, H, W), in the model's dtype and on its device.

        Raises:
            TypeError: not uint8.
            ValueError: another number of channels than the model's (3 above).
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        channels = self.config.backbone.in_channels
        if images.ndim not in (3, 4) or images.shape[-3] != channels:
            expected = f"(B, {channels}, H, W) or ({channels}, H, W)"
            raise ValueError(f"images must have shape {expected}, got {tuple(images.shape)}")
        images = images.to(self.mean.device).to(self.mean.dtype)
        return (images / 255 - self.mean) / self.std

    def pad_to_patches(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), padded at the right and bottom to multiples of the patch size."""
        patch = self.config.backbone.patch_size
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % patch, 0, -height % patch))  # 0 is the mean colour

    def semantic_scores(self, output: SegViTOutput, size: tuple[int, int]) -> Tensor:
        """Scores (B, N, H, W) of every class at every pixel.

        score[c] = Σ_q softmax(class_logits)[q, c] · σ(mask_logits[q] upsampled to `size`).
        """
        masks = F.interpolate(_float32(output.mask_logits), size=size, mode="bilinear", align_corners=False)
        return torch.einsum("bqc,bqhw->bchw", _class_probabilities(output), masks.sigmoid())

    def scoring(self, output: SegViTOutput) -> tuple[Tensor, Tensor]:
        """What `segvit_kernels.semantic_argmax` takes: mask logits (B, N, h, w), probabilities (B, N, N).

        Of a model that does not mix classes their diagonal (B, N).
        """
        return output.mask_logits, _class_probabilities(output)

    @torch.no_grad()
    def labels(
        self, output: SegViTOutput | Sequence[SegViTOutput], size: tuple[int, int], views: Views | None = None
    ) -> Tensor:
        """Label map (B, H, W): the argmax of `semantic_scores`, uint8 (int16 for more than 256 classes).

        Scores of full size never exist.

        Args:
            output: what the model returned, or several of them where there are views.
            size: height and width of the label map.
            views: the place of every output's every image in the label maps; by default an output's images
                are one view each, of the whole map.
        """
        outputs = [output] if isinstance(output, (SegViTOutput, Tensor)) else output
        masks, probabilities = zip(*map(self.scoring, outputs), strict=True)
        labels = semantic_argmax(
            list(masks), torch.cat(probabilities), size, views=views, activation=self.activation
        )
        return cast(Tensor, labels)

    @torch.inference_mode()
    def predict(
        self,
        images: Any,
        options: InferenceOptions | None = None,
        *,
        return_scores: bool | str = False,
        region: tuple[int, int, int, int] | None = None,
    ) -> Any:
        """Label maps at the images' own sizes, on the model's device.

        Images of any size are padded at the right and bottom with the mean colour to multiples of the patch
        size; mask logits are upsampled by the patch size and the padding is cut off. Images of a list run one
        by one.

        Args:
            images: a path, a PIL image (both as they are seen, see `segvit.data.read_image`), a uint8 array
                (H, W, 3), a uint8 tensor (3, H, W) or (B, 3, H, W), or a list of single ones.
            options: sliding window, scales, mirroring; by default the whole image at once.
            return_scores: also return the score of every class, of which the labels are the argmax; with
                "probabilities", scores as shares (see `probabilities`).
            region: (left, top, width, height) of the scores in pixels; the whole image when not given.

        Returns:
            (H, W) for a single image, (B, H, W) for a batch, a list of (H, W) for a list. With
            `return_scores` a pair (or a list of pairs): labels, and float32 scores (N, H, W) or (B, N, H, W)
            of the region.

        Raises:
            TypeError: not an image, or not uint8.
            ValueError: an unreadable file, not RGB, or an option that cannot be.
        """
        if return_scores not in (False, True, "scores", "probabilities"):
            raise ValueError(
                f"return_scores: got {return_scores!r}, expected True, False, 'scores' or 'probabilities'"
            )
        if region is not None and not return_scores:
            raise ValueError("region: is of the scores; expected return_scores with it")
        if isinstance(images, (list, tuple)):
            return [self.predict(i, options, return_scores=return_scores, region=region) for i in images]
        images = image_tensor(images, **self.config.reading)
        training = self.training
        self.eval()
        try:
            batch = self.preprocess(images if images.ndim == 4 else images[None])
            options = options or InferenceOptions()
            if not return_scores:
                labels = label_maps(self, batch, options)
                return labels if images.ndim == 4 else labels[0]
            size = (batch.shape[-2], batch.shape[-1])
            left, top, columns, rows = check_region(region or (0, 0, size[1], size[0]), size)
            scores = batch.new_empty(len(batch), self.config.num_classes, rows, columns, dtype=torch.float32)

            def take(first: int, block: Tensor) -> None:
                block = self.probabilities(block) if return_scores == "probabilities" else block
                start, stop = max(first, top), min(first + block.shape[2], top + rows)
                if start < stop:
                    part = block[:, :, start - first : stop - first, left : left + columns]
                    scores[:, :, start - top : stop - top] = part

            labels = label_maps_with_scores(self, batch, options, take)
            return (labels, scores) if images.ndim == 4 else (labels[0], scores[0])
        finally:
            self.train(training)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores (B, N, ...) of all classes as shares that add up to 1: each divided by their sum.

        They say how much of the evidence is for a class; nothing calibrates them. Where no class has any, all
        have the same.
        """
        total = scores.sum(1, keepdim=True)
        return torch.where(total > 0, scores / total.clamp(min=1e-38), 1 / scores.shape[1])

    def compile_for_inference(
        self,
        size: int | tuple[int, int],
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        method: str = "auto",
        fp8: bool = False,
        int8: bool = False,
        options: InferenceOptions | None = None,
    ) -> InferenceEngine:
        """A callable: uint8 images (B, 3, H, W) of one size, on the model's device, to label maps (B, H, W).

        The labels are those of `predict`: the same up to ties in float32, and with bfloat16's rounding else.
        The call copies nothing to the host and does not wait. The engine holds a fused copy of the model with
        the weights of now, and the model stays as it is; engines do not disturb each other.

        Args:
            size: height and width of the images, any; one number for squares.
            batch: images of a call.
            dtype: of the network; by default bfloat16 for a float32 model where that is faster (GPUs that
                have it; CPUs with AMX, or AVX512-BF16 and the native library), otherwise the model's.
            method: "eager" runs layer by layer; "graph" replays a CUDA graph of that, and on CPUs its calls
                of operators from the fourth call on; "compile" is torch.compile (minutes, needs a compiler),
                in a CUDA graph on GPUs. "auto": "graph" on GPUs and CPUs, "eager" elsewhere.
            fp8: the backbone's projections in fp8, by torchao, best with "compile", its default method; on
                GPUs of compute capability 8.9 or more.
            int8: the backbone's projections in int8, weights by output and activations by token as they
                come; on x86 CPUs with AVX2 and the native library.
            options: sliding window, scales, mirroring; by default the whole image at once.

        Raises:
            ValueError: an argument is out of range, or this machine cannot do what is asked.
        """
        return InferenceEngine(
            self, size, batch, dtype=dtype, method=method, fp8=fp8, int8=int8, options=options
        )

    def fold_normalisation(self, pixel: float) -> tuple[Tensor, Tensor | None]:
        """Scale the patch embedding for images u · pixel + shift of bytes u, not (u / 255 − mean) / std.

        Returns the shift (channels, 1, 1): such an image is normalised up to a factor, and 0 where that is 0;
        and the factor (channels, 1, 1), where it cannot be folded into a patch embedding that is more than
        its weights.
        """
        projection = self.backbone.patch_embed.proj
        exact = torch.promote_types(self.mean.dtype, torch.float32)
        mean, std = (
            torch.tensor(values, dtype=exact, device=self.mean.device).view(-1, 1, 1)
            for values in (self.config.mean, self.config.std)
        )
        step = 255 * pixel
        if not is_plain(projection):
            return -step * mean, 1 / (step * std)
        weight = projection.weight.to(exact) / (step * std)
        projection.weight = nn.Parameter(weight, requires_grad=False)
        return -step * mean, None

    def fold_grid(self, size: tuple[int, int]) -> None:
        """Store position embedding and up-sampling queries for the grid of images of `size`."""
        patch = self.config.backbone.patch_size
        grid = (size[0] // patch, size[1] // patch)
        self.backbone.fold_grid(grid)
        self.decoder.fold_grid(grid)

    def take_class_head(self) -> nn.Module | None:
        """The head that gives class logits, which the caller then does: outputs hold tokens (B, N, C) there.

        None for a model without one. Every stage classifies its tokens, and inference needs the last's alone.
        """
        head = getattr(self.decoder, "class_head", None)
        if head is not None:
            self.decoder.class_head = nn.Identity()
        return head

    def plain_blocks(self) -> list[nn.Module]:
        """The backbone's blocks but the one that shrinks, which takes its projection apart."""
        return [block for block in self.backbone.blocks if isinstance(block, Block)]

    # Modes

    def fuse(self) -> SegViT:
        """Fold what depends on parameters alone into constants, for inference; returns self.

        Folded: the first layer's self-attention and query, the k and v projections of a stage, stacked into
        one, and the position embedding of the last image size. On a CPU with the native library attention
        runs on `segvit_kernels.query_attention`, and linear layers on packed weights where that is faster
        (`segvit_kernels.pack_linears`); these take as much memory as the weights.
        Layers that are wrapped (LoRA), parametrized, quantised or hooked are not folded but called. `train()`
        and loading weights undo it, conversions (`to`, `half`) make the constants anew. Constants whose
        weights or layers have changed are not used, which costs the speed only: call it again. Not noticed
        are writes through `.data`, and in compiled code changes in place.

        Raises:
            RuntimeError: the model is in training mode.
        """
        if self.training:
            raise RuntimeError("fuse() is for inference: call eval() first")
        self.unfuse()
        self.decoder.fuse()
        self.backbone.fuse()
        pack_linears(self)
        self.fused = True
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SegViT:
        if not self.fused:
            return super()._apply(fn, recurse)
        eight = [
            module
            for module in self.modules()
            if any(isinstance(child, PackedLinear) and child.int8 for child in module.children())
        ]
        self.unfuse()
        super()._apply(fn, recurse)
        self.fuse()
        for module in eight:  # what has 8 bits keeps them, on processors that take them
            unpack_linears(module)
            pack_linears(module, int8=True)
            pack_linears(module)
        return self

    def unfuse(self) -> SegViT:
        """Forget the constants of `fuse`; returns self."""
        self.decoder.unfuse()
        self.backbone.unfuse()
        unpack_linears(self)
        self.fused = False
        return self

    def train(self, mode: bool = True) -> SegViT:
        if mode:
            self.unfuse()
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        if self.shrink_after:
            self._shrink(True)  # anneal() says otherwise before each step of a training
        return self

    def freeze_backbone(self) -> SegViT:
        """Train the decoder alone: the backbone computes the same at every step, without stochastic depth.

        Returns self.
        """
        self.backbone_frozen = True
        self.backbone.requires_grad_(False).eval()
        return self

    def set_gradient_checkpointing(self, enabled: bool = True) -> SegViT:
        """Recompute the backbone's blocks in the backward pass instead of keeping it all; returns self."""
        self.backbone.gradient_checkpointing = enabled
        return self

    def anneal(self, progress: float) -> None:
        """Told before every step which share of the training is done, 0 to 1."""
        if self.shrink_after:
            self._shrink(progress >= self.shrink_after)

    def set_shrink_after(self, share: float) -> SegViT:
        """Keep all tokens in this share of a training, which the cascade takes as well; returns self.

        Raises:
            ValueError: no share; or the model has no cascade, or its backbone does not shrink.
        """
        cascade = isinstance(self.decoder, ATMDecoder) and not self.config.upsample
        if share and not (cascade and self.config.backbone.shrink_at is not None):
            reason = "without a cascade on a backbone that shrinks (shrink_at, not upsample)"
            raise ValueError(f"shrink_after: got {share:g}, expected 0 {reason}")
        if not 0 <= share <= 1:
            raise ValueError(f"shrink_after: got {share:g}, expected a share from 0 to 1")
        if self.shrink_after:
            self._shrink(True)  # perhaps the last step was told not to
        self.shrink_after = share
        return self

    def _shrink(self, enabled: bool) -> None:
        self.backbone.shrink(enabled)
        cast(ATMDecoder, self.decoder).shrinks = enabled

    def parameter_groups(
        self,
        lr: float,
        weight_decay: float,
        decoder_lr_scale: float = 10.0,
        layer_decay: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the published recipe.

        No decay on the backbone's norms (and LayerScale, and learned rotary frequencies); every decoder
        parameter, its norms included, with decay and `decoder_lr_scale` times the learning rate.

        With `layer_decay` block i of n has its (n - i)-th power times the learning rate, what is before the
        blocks the (n + 1)-th, and a final norm the whole, as usual since BEiT (arXiv 2106.08254).
        """
        norms = {
            id(parameter)
            for module in self.backbone.modules()
            if isinstance(module, (nn.LayerNorm, LayerScale, Rotary))
            for parameter in module.parameters()
        }
        depth = len(self.backbone.blocks)
        groups: dict[str, dict[str, Any]] = {}

        def add(group: str, parameter: nn.Parameter, rate: float, decay: float) -> None:
            if parameter.requires_grad:
                empty = {"name": group, "params": [], "lr": rate, "weight_decay": decay}
                groups.setdefault(group, empty)["params"].append(parameter)

        for name, parameter in self.backbone.named_parameters():
            first, _, rest = name.partition(".")
            block = int(rest.partition(".")[0]) if first == "blocks" else -1
            below = 0 if layer_decay == 1 or first == "norm" else depth - block
            group = "backbone_norms" if id(parameter) in norms else "backbone"
            decay = 0.0 if id(parameter) in norms else weight_decay
            add(f"{group}.{block}" if below else group, parameter, lr * layer_decay**below, decay)
        for parameter in self.decoder.parameters():
            add("decoder", parameter, lr * decoder_lr_scale, weight_decay)
        return list(groups.values())

    # Weights

    def load_backbone(
        self,
        source: str | os.PathLike | Mapping[str, Any] | Pretrained,
        *,
        statistics: bool = True,
        known: Mapping[str, Any] | None = None,
    ) -> LoadReport:
        """Load pretrained weights of a plain ViT by name; position grid and patch size are adapted.

        Mean and std of the weights' images, and the norms' epsilon, become the model's where they are known.

        Args:
            source: a .safetensors or .pth file, a folder or Hub repository ('hf:OWNER/NAME') with one,
                'timm:NAME' for timm's pretrained weights, or a state dict; with the names of timm,
                mmsegmentation, Hugging Face, OpenCLIP and others (see `segvit.model.foreign`).
            known: what you know of the weights and the file does not tell: "heads", "mlp", "norm_eps",
                "mean", "std", "rotary" with "rotary_layout" (`segvit.model.rotary_weights.to_our_layout`), or
                "plain": True for a doubtful architecture.
            statistics: False keeps the model's mean and std.

        Raises:
            FileNotFoundError, ValueError: no such file, unreadable, or weights of another architecture.
            ImportError: timm, safetensors or huggingface_hub is needed and not installed.
        """
        weights = source if isinstance(source, Pretrained) else open_pretrained(source)
        weights = weights._replace(known={**weights.known, **(known or {})})
        own, known, name = self.config.backbone, weights.known, weights.name
        theirs = weights.backbone_config()
        try:
            adapted = adapt_backbone_state(weights.state_dict, own, self.backbone.grid, known)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        needed = {
            key: known[key] for key in ("heads", "mlp") if known.get(key) not in (None, getattr(own, key))
        }
        if own.rotary and theirs.rotary and own.rotary.places() != theirs.rotary.places():
            needed["rotary"] = theirs.rotary
        if theirs.width != own.width or theirs.depth < own.depth:
            needed = {}  # another size, which the loader says
        if needed:
            found = ", ".join(f"{key} {_shown(value)}" for key, value in needed.items())
            raise ValueError(f"{name}: weights of a ViT with {found}; use --model '{_options(needed)}'")
        try:
            load_state_dict(self.backbone, adapted.state_dict, name)
        except ValueError as error:
            raise ValueError(f"{error}{_hint(theirs, own)}") from None
        changed = [*weights.notes, *adapted.changed, *self._take_over(known, statistics)]
        untold = [words for key, words in _untold(self.config).items() if key not in known]
        if untold and not isinstance(source, Mapping):
            changed.append(f"not told by the weights, taken: {', '.join(untold)}")
        return LoadReport(len(adapted.state_dict), tuple(adapted.ignored), tuple(changed))

    def _take_over(self, known: Mapping[str, Any], statistics: bool) -> list[str]:
        """Mean, std and the norms' epsilon of weights; what changed, in words."""
        changed = []
        new: dict[str, Any] = {key: tuple(known[key]) for key in ("mean", "std") if key in known}
        if any(getattr(self.config, key) != value for key, value in new.items()):
            words = _statistics(new)
            if not statistics or any(
                len(getattr(self.config, key)) != len(value) for key, value in new.items()
            ):
                changed.append(f"the weights' {words} not taken")
            else:
                self.config = dataclasses.replace(self.config, **new)
                self._set_statistics(self.mean)
                changed.append(f"{words} of the weights")
        eps = known.get("norm_eps", self.config.backbone.norm_eps)
        if eps != self.config.backbone.norm_eps:
            backbone = dataclasses.replace(self.config.backbone, norm_eps=eps)
            self.config = dataclasses.replace(self.config, backbone=backbone)
            self.backbone.config = backbone
            for module in self.backbone.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = eps
            changed.append(f"norm_eps {eps:g} of the weights")
        return changed

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model.safetensors and config.json into `folder`, each in one step; data.json too, of a model
        that was read with it.

        Raises:
            ValueError: layers are wrapped, parametrized or quantised: the files could not be loaded.
        """
        with torch.device("meta"):
            plain = type(self)(self.config).state_dict().keys()
        if other := sorted(self.state_dict().keys() ^ plain):
            raise ValueError(
                f"{other[0]}: expected the parameters of a plain SegViT; merge adapters, remove "
                "parametrizations and save before quantising, or use torch.save"
            )
        state = {key: value.detach().contiguous() for key, value in self.state_dict().items()}
        save_weights(folder, state, self.config.to_dict())
        if (record := self.data_record) is not None:
            atomic_write(Path(folder) / DATA_FILE, lambda path: path.write_bytes(record))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *, revision: str | None = None) -> SegViT:
        """The model in a folder of `save_pretrained`, a run's folder or a Hub repository; in eval mode.

        Args:
            source: a checkpoint's folder; a run's, for its best checkpoint; 'owner/name' on the Hub (needs
                the extra `hub`).
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: neither folder nor Hub repository, or a file is missing in it.
            ValueError: configuration or weights that do not go together.
        """
        return cls._from_folder(find_checkpoint(source, revision))

    @classmethod
    def _from_folder(cls, folder: Path) -> SegViT:
        config = read_config(folder)
        if cls is not SegViT and config.decoder != cls.kind:
            raise ValueError(
                f"{folder / CONFIG_FILE}: of a model with decoder {config.decoder}, expected {cls.kind}"
            )
        weights = folder / WEIGHTS_FILE
        model = cls.from_state_dict(config, read_state_dict(weights), str(weights))
        if (record := folder / DATA_FILE).is_file():
            model.data_record = record.read_bytes()
        return model

    @classmethod
    def from_state_dict(cls, config: SegViTConfig, state_dict: Mapping[str, Tensor], source: str) -> SegViT:
        """The model of a configuration with these weights, in eval mode.

        Raises:
            ValueError: they do not fit exactly; `source` is named.
        """
        with torch.device("meta"):  # no time for initial values that are replaced at once
            model = cls(config)
        model.to_empty(device="cpu")._set_statistics()
        load_state_dict(model, state_dict, source)
        return model.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes to a Hugging Face Hub repository; returns its address.

        Args:
            repo_id: 'owner/name', made if it does not exist.
            private: visibility of a new repository.
            kwargs: for `huggingface_hub.HfApi.upload_folder` (commit_message, revision, ...).
        """
        api = require("huggingface_hub", extra="hub").HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))


SegViT.kinds[SegViT.kind] = SegViT


def _unfuse(model: SegViT, *_: Any) -> None:
    """Before a state dict is loaded: constants of fuse() would be of no use beside new weights."""
    model.unfuse()


def _options(fields: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in fields.items()) + "}"


def _shown(value: Any) -> str:
    """As in YAML; of rotary positions what is not the default."""
    if isinstance(value, RotaryConfig):
        plain = RotaryConfig()
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _options({key: v for key, v in fields.items() if v != getattr(plain, key)})
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _hint(theirs: BackboneConfig, own: BackboneConfig) -> str:
    """The options that make a backbone fit weights, after a message that it does not."""
    if (theirs.width, theirs.depth) != (own.width, own.depth):
        return f"; they are a ViT of width {theirs.width} with {theirs.depth} blocks: choose that preset"
    fields = (
        "mlp", "mlp_ratio", "class_token", "register_tokens", "layer_scale", "qkv_bias", "pre_norm",
        "absolute_positions", "rotary", "attention_norm", "mlp_norm",
    )  # fmt: skip
    differ = {key: getattr(theirs, key) for key in fields if getattr(theirs, key) != getattr(own, key)}
    if theirs.layer_scale is not None and own.layer_scale is not None:
        differ.pop("layer_scale", None)
    if theirs.rotary and own.rotary and theirs.rotary.places() == own.rotary.places():
        differ.pop("rotary", None)
    return f"; they fit with --model '{_options(differ)}'" if differ else ""


def _untold(config: SegViTConfig) -> dict[str, str]:
    own = config.backbone
    return {
        "heads": f"{own.heads} heads",
        "mlp": own.mlp,
        "norm_eps": f"norm_eps {own.norm_eps:g}",
        "mean": f"the model's {_statistics({'mean': config.mean, 'std': config.std})}",
    }


def _statistics(values: Mapping[str, Sequence[float]]) -> str:
    return " and ".join(f"{key} {' '.join(f'{v:.4g}' for v in value)}" for key, value in values.items())


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _class_probabilities(output: SegViTOutput) -> Tensor:
    """(B, N, N), without "no object"."""
    return _float32(output.class_logits).softmax(-1)[..., :-1]
