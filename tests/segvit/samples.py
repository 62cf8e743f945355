"""Small models and pictures for tests, and what label maps must be."""

import torch
from torch.nn import functional as F

from segvit import SegViT, SegViTConfig
from segvit.config import DECODERS, BackboneConfig

NAMES = ("road", "sky", "car", "street light", "tree")


def tiny_model(kind="plain", patch=8, class_token=True, setup=None, **overrides):
    """Sharp enough that label maps have several classes and small mistakes show.

    Args:
        setup: more fields of the backbone.
    """
    torch.manual_seed(0)
    shrink = 1 if kind == "shrunk" else None
    fields = {"patch_size": patch, "class_token": class_token, "shrink_at": shrink, **(setup or {})}
    backbone = BackboneConfig(32, 3, 2, **fields)
    values = {"num_classes": 6, "taps": (0, 2), "decoder_depth": 2, "image_size": (4 * patch, 4 * patch)}
    values |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "upsample": kind == "shrunk"}
    values["decoder"] = kind if kind in DECODERS else "atm"
    model = SegViT(SegViTConfig(backbone, **(values | overrides)))
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
        if name.endswith("pos_embed"):
            parameter.mul_(10)
    if hasattr(model.decoder, "stages"):
        if model.mixes_classes:  # every token sure of its own class
            size = torch.Size((1, 3, *model.config.image_size))
            tokens = model.decoder(model.backbone(torch.randn(size)), (4, 4))[-1].tokens[0]
            model.decoder.class_head.weight.zero_()[:-1] = 8 * torch.linalg.pinv(tokens).T
        for stage in model.decoder.stages:
            stage.layers[-1].atm.q.weight.mul_(6)
    return model


def pictures(size, batch=2, seed=0):
    """Blocks of colour, uint8 (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (batch, 3, size[0] // 8 + 1, size[1] // 8 + 1), generator=generator)
    return F.interpolate(small.float(), size=size).to(torch.uint8)


def assert_same_up_to_ties(labels, model, images):
    """Each label's score, in float64, is the best."""
    double = model.double()
    padded = double.pad_to_patches(double.preprocess(images))
    size = tuple(images.shape[-2:])
    scores = double.semantic_scores(double(padded), tuple(padded.shape[-2:]))[..., : size[0], : size[1]]
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() < 1e-4 * scores.abs().max()
    assert labels.shape == (len(images), *size) and labels.dtype == torch.uint8
    assert labels.unique().numel() > 2, "nothing to get wrong"


def randomise(module, seed=0):
    """Random values everywhere: fresh norms and LayerScales would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name or "gamma" in name else 0.15 * noise)
    return module.eval()


def named_model(**changes) -> SegViT:
    """Of the classes `NAMES`, every token sure of its own; label maps have several."""
    torch.manual_seed(0)
    backbone = BackboneConfig(width=32, depth=2, heads=2, patch_size=8)
    values = {"num_classes": 5, "taps": (0, 1), "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}
    model = SegViT(SegViTConfig(backbone, **{**values, "image_size": 32, "class_names": NAMES, **changes}))
    model.eval()
    with torch.no_grad():
        for parameter in model.backbone.blocks.parameters():
            parameter.normal_(std=0.3)
        for stage in model.decoder.stages:
            stage.layers[-1].atm.q.weight.normal_()
            stage.layers[-1].atm.k.weight.normal_()
        tokens = model.decoder(model.backbone(torch.randn(1, 3, 32, 32)), (4, 4))[-1].tokens[0]
        model.decoder.class_head.weight.zero_()[:-1] = 8 * torch.linalg.pinv(tokens).T
    return model


def sharp_config(**overrides):
    values = {"width": 32, "depth": 3, "heads": 2, "patch_size": 8, "num_classes": 5, "taps": (0, 2)}
    return SegViTConfig.from_fields({**values, "decoder_depth": 2, "image_size": (32, 32), **overrides})


def sharp_model(seed=0, **overrides):
    """Sharper than fresh weights, so that mistakes show."""
    torch.manual_seed(seed)
    model = SegViT(sharp_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def flat(output):
    return [*output[:2], *(tensor for pair in output.auxiliary for tensor in pair)]


def assert_equal_outputs(actual, expected, tolerance=1e-5):
    for a, b in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
