"""The Shrunk structure: query-based down- and up-sampling in the model, at every size and in every mode."""

import copy
import json

import numpy as np
import pytest
import torch
from samples import assert_equal_outputs, sharp_config, sharp_model
from torch import nn
from torch.nn import functional as F

from segvit import BackboneConfig, SegViT, SegViTConfig, SegViTLoss
from segvit.inference.passes import label_maps
from segvit.model.linear_head import LinearSegmenter
from segvit.options import InferenceOptions
from segvit_kernels import QueryUpsample, modules, query_attention

VARIANTS = {
    "shrunk": {"shrink_at": 1, "taps": (0, 2), "upsample": True},
    "published": {"shrink_at": 1, "taps": (0, 2), "upsample": True, "resize_queries": False},
    "positions": {"shrink_at": 1, "taps": (0, 2), "upsample": True, "key_positions": True},
    "features": {
        "shrink_at": 1,
        "taps": (0, 2),
        "upsample": True,
        "upsample_depth": 1,
        "query_features": True,
    },
    "naive": {"shrink_at": 1, "taps": (2,)},
    "mixed": {"shrink_at": 1, "taps": (0, 1, 2)},
    "single": {"taps": (2,)},
}
PREFIX = {"class_token": True, "register_tokens": 2, "layer_scale": 0.1}


@pytest.mark.parametrize("rotary", [None, {}])
def test_tokens_are_kept_in_the_first_share_of_a_training(rotary):
    """As in a model that does not shrink, with the same weights; the rest of it and evaluation shrink."""
    fields = {**VARIANTS["mixed"], "rotary": rotary, "decoder_dropout": 0.0}
    late, full = sharp_model(**fields), sharp_model(**{**fields, "shrink_at": None})
    full.load_state_dict(late.state_dict())
    images = torch.randn(2, 3, 40, 24)
    shrunk = late(images)
    with pytest.raises(AssertionError):
        assert_equal_outputs(shrunk, full(images))
    late.set_shrink_after(0.5).train()
    for progress in (0.0, 0.49):
        late.anneal(progress)
        assert_equal_outputs(late(images), full(images))
    late.anneal(0.5)
    assert_equal_outputs(late(images), shrunk)
    late.anneal(0.1)
    assert_equal_outputs(late.eval()(images), shrunk)
    late.train().anneal(0.1)
    late.set_shrink_after(0.2).anneal(0.1)
    assert_equal_outputs(late(images), full(images))
    assert_equal_outputs(late.set_shrink_after(0.0)(images), shrunk)


@pytest.mark.parametrize("name", ["single", "shrunk"])
def test_models_that_cannot_shrink_later(name):
    model = sharp_model(**VARIANTS[name]).set_shrink_after(0.0)
    with pytest.raises(ValueError, match=r"shrink_after: got 0\.5, expected 0 without a cascade"):
        model.set_shrink_after(0.5)
    for share in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"shrink_after: got {share:g}, expected a share from 0 to 1"):
            sharp_model(**VARIANTS["mixed"]).set_shrink_after(share)


# Configuration


@pytest.mark.parametrize(
    "name, options, shrink_at, taps, upsample",
    [
        ("vit_large", {}, 8, (7, 23), True),
        ("vit_base", {}, 6, (5, 11), True),
        ("vit_small", {}, 6, (5, 11), True),
        ("vit_tiny", {"upsample": False}, 6, (11,), False),
        ("vit_base", {"shrink_at": 3}, 3, (2, 11), True),
        ("vit_base", {"shrink_at": 11}, 11, (10, 11), True),
        ("vit_base", {"shrink_at": 0}, 0, (11,), True),
        ("vit_base", {"taps": (3, 7, 11)}, 6, (3, 7, 11), True),
        ("vit_base", {"depth": 8, "shrink_at": 2}, 2, (1, 7), True),
    ],
)
def test_presets(name, options, shrink_at, taps, upsample):
    config = SegViTConfig.preset(name, 150, shrunk=True, **options)
    assert (config.backbone.shrink_at, config.taps, config.upsample) == (shrink_at, taps, upsample)
    assert config.resize_queries and not config.key_positions
    assert SegViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    plain = SegViTConfig.preset(name, 150, shrunk=False)
    assert plain == SegViTConfig.preset(name, 150) and plain.backbone.shrink_at is None and not plain.upsample


def test_layers_of_the_upsampling():
    for depth, expected in ((None, 3), (1, 1), (2, 2)):
        model = SegViT(SegViTConfig.preset("vit_tiny", 3, shrunk=True, image_size=64, upsample_depth=depth))
        assert [len(stage.layers) for stage in model.decoder.upsample.stages] == [expected, expected]
        assert len(model.decoder.stages[0].layers) == 3
        assert ("upsample_depth" in model.config.to_dict()) == (depth is not None)


def test_config_files_of_plain_models_still_load():
    values = SegViTConfig.preset("vit_base", 3).to_dict()
    del values["backbone"]["shrink_at"]
    for name in ("upsample", "resize_queries", "key_positions"):
        del values[name]
    assert SegViTConfig.from_dict(values) == SegViTConfig.preset("vit_base", 3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SegViTConfig.preset("vit_base", 3, shrunk=True, shrink_at=12), "index from 0 to 11, got 12"),
        (lambda: SegViTConfig.preset("vit_base", 3, shrunk=True, shrink_at=-1), "index from 0 to 11, got -1"),
        (lambda: SegViTConfig.preset("vit_base", 3, shrunk=True, depth=4), "index from 0 to 3, got 6"),
        (lambda: SegViTConfig.preset("vit_base", 3, shrunk=True, taps=(5, 12)), "last block, 11; got"),
        (lambda: SegViTConfig.preset("vit_base", 3, upsample=True), "shrink_at is None"),
        (lambda: sharp_config(taps=(0, 2), upsample=True), "shrink_at is None"),
        (lambda: sharp_config(**{**VARIANTS["features"], "taps": (1, 2)}), "a first tap before the block"),
        (lambda: sharp_config(**VARIANTS["published"], query_features=True), "query_features needs upsample"),
        (lambda: SegViTConfig.preset("vit_base", 3, query_features=True), "query_features needs upsample"),
        (lambda: SegViTConfig.preset("vit_base", 3, upsample_depth=0), "upsample_depth must be .* got 0"),
    ],
)
def test_config_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "num_heads is 3; expected a divisor of embed_dim 32"),
        ({"depth": 0}, "one layer and one level at least, got 0 and 2"),
        ({"level_dims": []}, "one layer and one level at least, got 3 and 0"),
    ],
)
def test_upsample_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        QueryUpsample(**{"embed_dim": 32, "num_heads": 2, "grid": (2, 2), "level_dims": [8, 8], **options})
    with pytest.raises(ValueError, match="levels: got 1, expected 2"):
        QueryUpsample(32, 2, (2, 2), [8, 8])([torch.zeros(1, 4, 8)])


# Down-sampling in the backbone


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 1), (2, 7)])
def test_downsampling_is_the_plain_block_at_every_second_token(grid):
    """Up to the block that shrinks and, at the tokens that stay, after it; weights load by name."""
    plain = sharp_model(taps=(0, 1, 2), **PREFIX)
    model = sharp_model(1, taps=(0, 1, 2), shrink_at=1, **PREFIX)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    expected, features = plain.backbone(images), model.backbone(images)
    torch.testing.assert_close(features[0], expected[0])
    kept = expected[1].unflatten(1, grid)[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(features[1], kept, atol=1e-5, rtol=1e-5)
    assert features[2].shape == features[1].shape


def test_pretrained_weights_load():
    plain, model = sharp_model(taps=(2,), **PREFIX), sharp_model(1, **VARIANTS["shrunk"], **PREFIX)
    report = model.load_backbone(plain.backbone.state_dict())
    assert report.loaded == len(plain.backbone.state_dict()) and not report.ignored
    for a, b in zip(plain.backbone.parameters(), model.backbone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stochastic_depth_and_checkpointing():
    images, labels = torch.randn(2, 3, 40, 24), torch.randint(0, 5, (2, 40, 24))
    options = {"drop_path": 0.5, "drop_path_branch": "both", **VARIANTS["shrunk"], **PREFIX}
    grads = []
    for enabled in (False, True):
        model = sharp_model(**options).train().set_gradient_checkpointing(enabled)
        torch.manual_seed(0)
        SegViTLoss(5)(model(images), labels)["total"].backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# Up-sampling


def make_upsample(seed=0, **options):
    torch.manual_seed(seed)
    upsample = QueryUpsample(32, 2, grid=(3, 5), level_dims=[24, 40], **{"depth": 2, **options})
    with torch.no_grad():
        for parameter in upsample.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return upsample


class ReferenceLayer(nn.TransformerDecoderLayer):
    """Torch's post-norm layer, with keys and values of their own."""

    def forward(self, x, keys, values):
        x = self.norm1(x + self.self_attn(x, x, x, need_weights=False)[0])
        x = self.norm2(x + self.multihead_attn(x, keys, values, need_weights=False)[0])
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


def reference_upsample(upsample, levels, grid=(3, 5)):
    """What `QueryUpsample` means, in the layers of torch, whose parameters have the same names."""
    image = upsample.queries.T.unflatten(1, (3, 5))[None]
    if grid != (3, 5):
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    tokens = image.flatten(2).transpose(1, 2).expand(len(levels[0]), -1, -1)
    for stride, stage, features in zip((1, 2), upsample.stages, levels, strict=True):
        features = keys = stage.input_norm(stage.input_proj(features))
        if upsample.query_features and stage is upsample.stages[0]:
            tokens = tokens + features
        if upsample.key_positions:
            keys = features + image[:, :, ::stride, ::stride].flatten(2).transpose(1, 2)
        for layer in stage.layers:
            torch_layer = ReferenceLayer(32, 2, 128, dropout=0.0, batch_first=True)
            state = layer.state_dict(keep_vars=True)
            tokens = torch.func.functional_call(torch_layer, state, (tokens, keys, features), strict=True)
    return tokens


def levels_of(grid, batch):
    """Feature levels of a grid and of every second of its rows and columns."""
    height, width = grid
    shrunk = ((height + 1) // 2) * ((width + 1) // 2)
    return [torch.randn(batch, height * width, 24), torch.randn(batch, shrunk, 40)]


@pytest.mark.parametrize("grid", [None, (3, 5), (4, 4), (7, 2)])
@pytest.mark.parametrize("options", [{}, {"key_positions": True}, {"query_features": True}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_upsample_values_and_gradients(grid, options, training):
    """The batch shares the first steps, which must show in no value and in no gradient."""
    upsample = make_upsample(**options).train(training)
    levels = levels_of(grid or (3, 5), 3)
    output = upsample(levels, grid)
    expected = reference_upsample(upsample, levels, grid or (3, 5))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    parameters = dict(upsample.named_parameters())
    weights = torch.randn_like(output)
    actual = torch.autograd.grad((output * weights).sum(), parameters.values())
    wanted = torch.autograd.grad((expected * weights).sum(), parameters.values())
    for name, a, b in zip(parameters, actual, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5, name


def test_key_positions_are_those_of_the_image():
    """Also where the output keeps the training grid; and a level of another shape is refused."""
    upsample = make_upsample(resize=False, key_positions=True).eval()
    found = []
    upsample.stages[1].register_forward_hook(lambda module, args, out: found.append(args[3]))
    assert upsample(levels_of((5, 6), 2), (5, 6)).shape == (2, 15, 32)
    image = upsample.queries.T.unflatten(1, (3, 5))[None]
    image = F.interpolate(image, size=(5, 6), mode="bicubic", align_corners=False)
    expected = upsample.stages[1].position_keys(image[0, :, ::2, ::2].flatten(1).T)
    torch.testing.assert_close(found[0], expected)
    with pytest.raises(ValueError, match=r"levels: 14 tokens are no subsampled grid of \(3, 5\)"):
        upsample([torch.randn(2, 14, 24), torch.randn(2, 6, 40)])


@pytest.mark.parametrize("training, dropout, batch", [(False, 0.2, 1), (True, 0.0, 1), (True, 0.2, 4)])
def test_shared_steps_run_once(training, dropout, batch):
    """Unless every image draws dropout of its own."""
    upsample = make_upsample(dropout=dropout).train(training)
    seen = []
    upsample.stages[0].layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    output = upsample([torch.randn(4, 15, 24), torch.randn(4, 6, 40)])
    assert output.shape == (4, 15, 32)
    assert [len(out) for out in seen] == [batch]
    if batch > 1:
        assert not torch.allclose(seen[0][0], seen[0][1])


def attention_distances(upsample, levels, monkeypatch):
    """Mean distance, in cells of the full grid, between a query and what it attends to, by layer."""
    size, found = upsample.grid[0], []

    def places(stride):
        axis = torch.arange(0, size, stride).float()
        return torch.cartesian_prod(axis, axis)

    def recorded(query, key, value, **options):
        weights = torch.einsum("bqhd,bkhd->bhqk", query.expand(len(key), -1, -1, -1), key)
        weights = (weights * query.shape[-1] ** -0.5).softmax(-1)
        stride = 1 if key.shape[1] == size**2 else 2
        found.append((weights * torch.cdist(places(1), places(stride))).sum(-1).mean().item())
        return query_attention(query, key, value, **options)

    monkeypatch.setattr(modules, "query_attention", recorded)
    upsample(levels)
    return found[1::2]  # every other one is self-attention


@pytest.mark.parametrize("key_positions", [False, True])
def test_located_queries_attend_to_their_own_place(key_positions, monkeypatch):
    torch.manual_seed(0)
    upsample = QueryUpsample(64, 4, (8, 8), level_dims=[48, 40], depth=2, key_positions=key_positions).eval()
    axis = torch.linspace(0, 1, 8)
    place = torch.cartesian_prod(axis, axis)

    def features(count, width, stride, seed):
        """Content with a trace of the place in it, as features of a Vision Transformer have."""
        mixing = torch.randn(16, width, generator=torch.Generator().manual_seed(width))
        waves = torch.cat([(place * f * torch.pi).cos() for f in range(1, 9)], dim=1) @ mixing / 4
        content = torch.randn(count, 64, width, generator=torch.Generator().manual_seed(seed))
        return (waves + content).unflatten(1, (8, 8))[:, ::stride, ::stride].flatten(1, 2)

    shown, others = (
        [features(count, 48, 1, seed), features(count, 40, 2, seed + 1)] for count, seed in ((24, 1), (4, 9))
    )
    before = attention_distances(upsample, others, monkeypatch)
    upsample.fuse()
    upsample.locate(shown)
    assert upsample.folded_first is None
    after = attention_distances(upsample, others, monkeypatch)
    assert len(before) == len(after) == 4
    assert all(b > 3.8 for b in before), before  # about the mean distance of two cells
    # With positions in the keys the code need not be read off the features.
    nearer = (0.05, 0.05, 0.3, 0.3) if key_positions else (0.3, 0.3, 0.4, 0.4)
    assert all(a < n * b for a, b, n in zip(after, before, nearer, strict=True)), after
    if key_positions:
        attention = upsample.stages[0].layers[0].multihead_attn
        query, key, _ = (weight[:16] for weight in attention.in_proj_weight.chunk(3))  # of the first head
        logits = (F.layer_norm(upsample.queries, (64,)) @ query.T) @ (upsample.queries @ key.T).T / 4
        torch.testing.assert_close(logits.std(-1).mean(), torch.tensor(6.0), rtol=1e-3, atol=0)
    low_rank = torch.randn(2, 64, 3) @ torch.randn(3, 48)
    upsample.locate([low_rank, torch.randn(2, 16, 40)])
    assert upsample.stages[0].input_proj(low_rank)[..., 16:].std() < 2
    assert upsample.stages[0].input_proj.weight[16:].abs().max() < 20
    with pytest.raises(ValueError, match=r"levels: 63 tokens are no subsampled grid of \(8, 8\)"):
        upsample.locate([shown[0][:, 1:], shown[1]])


def test_upsample_grids():
    free, fixed = make_upsample(), make_upsample(resize=False)
    levels = [torch.randn(2, 24, 24), torch.randn(2, 6, 40)]
    assert free.output_grid((6, 4)) == (6, 4) and free(levels, (6, 4)).shape == (2, 24, 32)
    assert fixed.output_grid((6, 4)) == (3, 5) and fixed(levels, (6, 4)).shape == (2, 15, 32)
    assert free.output_grid() == (3, 5) and free(levels).shape == (2, 15, 32)
    assert free([level[:0] for level in levels]).shape == (0, 15, 32)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"key_positions": True}, {"query_features": True}], ids=str)
def test_upsample_fuse(options, called):
    upsample = make_upsample(dropout=0.1, **options).eval()
    levels = {grid: levels_of(grid or (3, 5), 2) for grid in (None, (4, 4))}
    expected = {grid: upsample(levels[grid], grid) for grid in levels}
    upsample.fuse()
    for grid, output in expected.items():
        calls = called(upsample.stages[0].layers[0].self_attn)
        torch.testing.assert_close(upsample(levels[grid], grid), output, atol=1e-5, rtol=1e-5)
        folded = grid is None and not upsample.query_features
        assert len(calls) == (not folded), "folded at the training grid only"
    keys = set(make_upsample().state_dict())
    assert set(upsample.state_dict()) == keys
    other = make_upsample(1, **options).eval()
    upsample.load_state_dict(other.state_dict())
    torch.testing.assert_close(upsample(levels[None]), other(levels[None]))
    upsample.fuse()
    assert upsample.double().stages[0].folded_rows is not None
    assert upsample.train().folded_first is None and upsample.stages[0].folded_rows is None


# Whole models


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_step(variant):
    """Every parameter gets a gradient, and the step lowers the loss; the grid is odd."""
    torch.manual_seed(0)
    model = SegViT(sharp_config(**VARIANTS[variant], decoder_dropout=0.0)).train()
    images, labels = torch.randn(2, 3, 40, 56), torch.randint(0, 5, (2, 40, 56))
    output = model(images)
    if variant == "published":
        assert output.mask_logits.shape == (2, 5, 4, 4)
    elif variant == "naive":
        assert output.mask_logits.shape == (2, 5, 3, 4)
    else:
        assert output.mask_logits.shape == (2, 5, 5, 7)
    outputs = {"shrunk": 2, "published": 2, "positions": 2, "features": 2, "mixed": 3}.get(variant, 1)
    assert len(output.auxiliary) == outputs - 1
    assert tuple(output.mask_logits.shape[-2:]) == model.mask_grid((40, 56))
    criterion = SegViTLoss(5)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4, 0.01))
    losses = []
    for _ in range(3):
        loss = criterion(model(images), labels)["total"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # A key's bias shifts a row of logits, which softmax does not see.
            assert parameter.grad.any() or name.endswith("atm.k.bias"), name
        optimizer.step()
    assert losses[-1] < losses[0]


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (8, 8)])
def test_any_position_and_grid(position, size):
    taps = (position - 1, 2) if position else (2,)
    for upsample in (True, False):
        model = sharp_model(shrink_at=position, taps=taps, upsample=upsample, **PREFIX)
        output = model(torch.randn(2, 3, *size))
        grid = (size[0] // 8, size[1] // 8)
        if not upsample and position == 0:
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        assert output.mask_logits.shape == (2, 5, *grid) and output.mask_logits.isfinite().all()
        assert all(maps.isfinite().all() for maps in model.similarity_maps(torch.randn(1, 3, *size)))


@torch.no_grad()
def test_masks_of_stages_at_different_grids_add_up():
    model = sharp_model(**VARIANTS["mixed"])
    images = torch.randn(2, 3, 40, 56)
    maps, output = model.similarity_maps(images), model(images)
    coarse, finer, finest = maps
    assert [tuple(m.shape[-2:]) for m in maps] == [(3, 4), (3, 4), (5, 7)]
    total = F.interpolate(coarse + finer, size=(5, 7), mode="bilinear", align_corners=False) + finest
    torch.testing.assert_close(output.mask_logits, total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.auxiliary[1][1], coarse + finer, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_of_layers_are_not_added_up():
    model = sharp_model(**VARIANTS["shrunk"])
    images = torch.randn(2, 3, 40, 56)
    output, maps = model(images), model.similarity_maps(images)
    for masks, similarity in zip([output.auxiliary[0][1], output.mask_logits], maps, strict=True):
        torch.testing.assert_close(masks, similarity)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse(variant):
    model = sharp_model(**VARIANTS[variant])
    pictures = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 40, 24)]
    expected = [model(images) for images in pictures]
    keys = set(model.state_dict())
    model.fuse()
    for _ in range(2):
        for images, output in zip(pictures, expected, strict=True):
            assert_equal_outputs(model(images), output)
    assert set(model.state_dict()) == keys
    if model.config.upsample:
        stages = model.decoder.upsample.stages
        assert (model.decoder.upsample.folded_first is None) == model.config.query_features
        assert all(stage.folded_rows is not None for stage in stages)
        assert copy.deepcopy(model).train().decoder.upsample.stages[0].folded_rows is None
    other = sharp_model(1, **VARIANTS[variant])
    model.load_state_dict(other.state_dict())
    assert_equal_outputs(model(pictures[0]), other(pictures[0]))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path):
    pytest.importorskip("safetensors", reason="needs the extra train")
    model = sharp_model(**VARIANTS[variant], **PREFIX).fuse()
    model.save_pretrained(tmp_path)
    loaded = SegViT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    images = torch.randn(1, 3, 40, 32)
    assert_equal_outputs(loaded(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_label_maps(variant):
    """Masks of any grid lie where they belong: whole images with padding, windows, mirrored."""
    model = sharp_model(**VARIANTS[variant])
    images = torch.randn(1, 3, 37, 51)
    padded = model.pad_to_patches(images)
    # Every token sure of its own class, and masks that differ: label maps of several classes.
    for stage in model.decoder.stages:
        stage.layers[-1].atm.q.weight.normal_()
        stage.layers[-1].atm.k.weight.normal_()
    tokens = model.decoder(model.backbone(padded), (5, 7))[-1].tokens[0]
    model.decoder.class_head.weight[:-1] = 8 * torch.linalg.pinv(tokens).T
    scores = model.semantic_scores(model(padded), (40, 56))[..., :37, :51]
    assert_best(label_maps(model, images, InferenceOptions()), scores)
    mirrored = model.semantic_scores(model(padded.flip(-1)), (40, 56)).flip(-1)[..., :37, :51]
    labels = label_maps(model, images, InferenceOptions(flip=True))
    assert_best(labels, (scores + mirrored) / 2)
    windows = [(0, 0), (0, 19), (5, 0), (5, 19)]
    total, count = torch.zeros(1, 5, 37, 51), torch.zeros(37, 51)
    for top, left in windows:
        crop = images[..., top : top + 32, left : left + 32]
        total[..., top : top + 32, left : left + 32] += model.semantic_scores(model(crop), (32, 32))
        count[top : top + 32, left : left + 32] += 1
    assert_best(label_maps(model, images, InferenceOptions(window=32, stride=32)), total / count)


def assert_best(labels, scores):
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() < 1e-4 * scores.max(), "a pixel has a clearly better class"
    assert labels.unique().numel() > 1


@torch.no_grad()
def test_linear_head_on_a_shrunk_backbone():
    torch.manual_seed(0)
    model = LinearSegmenter(sharp_config(**VARIANTS["shrunk"])).eval()
    images = torch.randn(1, 3, 37, 51)
    padded = model.pad_to_patches(images)
    assert model(padded).shape == (1, 5, 3, 4)
    scores = model.semantic_scores(model(padded), (40, 56))[..., :37, :51]
    labels = label_maps(model, images, InferenceOptions())
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() < 1e-4


def test_similarity_maps_for_pictures():
    pytest.importorskip("PIL", reason="needs the extra train")
    from segvit.inference.similarity import similarity_maps

    image = torch.randint(0, 255, (3, 37, 51), dtype=torch.uint8)
    for variant in ("shrunk", "mixed"):
        model = sharp_model(**VARIANTS[variant])
        with torch.no_grad():
            stages, masks = similarity_maps(model, image, [1, 3])
            padded = model.pad_to_patches(model.preprocess(image[None]))
            expected = F.interpolate(model(padded).mask_logits, padded.shape[-2:], mode="bilinear")
        assert {maps.shape for maps in (*stages, masks)} == {(2, 37, 51)}
        assert np.allclose(masks, expected[0, [1, 3], :37, :51], atol=1e-5)
        assert variant == "mixed" or np.allclose(masks, stages[-1])


def test_parameter_groups():
    model = sharp_model(**VARIANTS["shrunk"], **PREFIX)
    groups = {group["name"]: group["params"] for group in model.parameter_groups(1e-3, 0.05)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [names[id(parameter)] for params in groups.values() for parameter in params]
    assert sorted(listed) == sorted(names.values()), "every parameter once"
    assert any(parameter is model.decoder.upsample.queries for parameter in groups["decoder"])
    norms = {names[id(parameter)] for parameter in groups["backbone_norms"]}
    assert {"backbone.blocks.1.norm1.weight", "backbone.blocks.1.ls1.gamma"} <= norms


def test_initialisation():
    model = SegViT(sharp_config(width=256, heads=4, **VARIANTS["shrunk"]))
    upsample = model.decoder.upsample
    assert abs(upsample.queries.std().item() - 1) < 0.1
    attention = upsample.stages[1].layers[0].multihead_attn
    limit = (6 / (128 + 3 * 128)) ** 0.5
    assert 0.95 * limit < attention.in_proj_weight.abs().max() <= limit
    assert not attention.in_proj_bias.any()
    for module in upsample.modules():
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std().item() - 0.02) < 0.002 and not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
    assert model.backbone.blocks[1].norm1.eps == 1e-6


@torch.no_grad()
def test_half_precision():
    model = sharp_model(**VARIANTS["shrunk"])
    images = torch.randn(1, 3, 40, 32)
    expected = model(images)
    half = copy.deepcopy(model).to(torch.bfloat16).fuse()
    output = half(images.bfloat16())
    scale = expected.mask_logits.abs().max()
    assert output.mask_logits.dtype == torch.bfloat16
    assert (output.mask_logits.float() - expected.mask_logits).abs().max() < 0.1 * scale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    assert (output.mask_logits.float() - expected.mask_logits).abs().max() < 0.1 * scale


# Compilation. AOTAutograd without code generation finds graph breaks and wrong shapes in seconds.


@pytest.fixture
def compiler():
    """Compiled here, forgotten afterwards: `SegViT.forward` may be compiled but a few times in a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_model(variant, **overrides):
    options = {"depth": 2, "decoder_depth": 1, **VARIANTS[variant]}
    options["taps"] = tuple(tap for tap in (0, 1) if tap == 1 or len(options["taps"]) > 1)
    return sharp_model(**options, class_token=True, **overrides)


@pytest.mark.usefixtures("compiler")
def test_compiled_training():
    """Checkpointed too; dropout in such graphs: test_model.py."""
    model = compile_model("shrunk", decoder_dropout=0.0, layer_scale=0.1).train()
    model.set_gradient_checkpointing()
    images, labels = torch.randn(2, 3, 48, 40), torch.randint(0, 5, (2, 48, 40))
    grads = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        SegViTLoss(5)(forward(images), labels)["total"].backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_compiled_inference():
    model = compile_model("shrunk").fuse()

    def label_map(images):
        return model.labels(model(images), tuple(images.shape[-2:]))

    compiled = torch.compile(label_map, fullgraph=True, backend="aot_eager")
    for size in ((32, 32), (48, 40)):
        images = torch.randn(2, 3, *size)
        assert (compiled(images) == label_map(images)).float().mean() > 0.999


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
@pytest.mark.parametrize("variant", ["shrunk", "published", "mixed"])
def test_compiled_for_any_size(variant):
    model = compile_model(variant)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in ((40, 24), (48, 40)):
        images = torch.randn(2, 3, *size)
        assert_equal_outputs(compiled(images), model(images))


# From the command line


def test_train_evaluate_predict(tmp_path, capsys):
    pytest.importorskip("yaml", reason="needs the extra train")
    image_module = pytest.importorskip("PIL.Image", reason="needs the extra train")
    from segvit.cli import main

    tiny = "{'shrunk': true, 'depth': 3, 'shrink_at': 1, 'width': 32, 'heads': 2, 'patch_size': 8}"
    cpu, run = ["--accelerator", "cpu"], str(tmp_path / "run")
    synthetic = ["--data", "synthetic", "--workers", "0", "--no-progress", "--synthetic-validation", "2"]
    train = ["--max-steps", "2", "--batch-size", "2", "--warmup-steps", "1", "--synthetic-images", "4"]
    model = ["--preset", "vit_tiny", "--model", tiny, "--image-size", "32"]
    assert main(["train", *synthetic, *cpu, *train, *model, "--out", run]) == 0
    assert main(["evaluate", *synthetic, *cpu, "--checkpoint", run]) == 0
    image_module.fromarray(np.zeros((37, 51, 3), np.uint8)).save(tmp_path / "a.png")
    out = ["--out", str(tmp_path / "out"), "--maps", "0"]
    assert main(["predict", str(tmp_path / "a.png"), "--checkpoint", run, *out, *cpu]) == 0
    config = SegViT.from_pretrained(tmp_path / "run/checkpoints/last").config
    assert config.upsample and config.backbone.shrink_at == 1 and config.taps == (0, 2)
    assert isinstance(config.backbone, BackboneConfig)
