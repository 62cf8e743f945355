"""timm's attention pooling and torchvision's pasted masks, against their published formulas, written down
again, and against the libraries where they are installed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segvit_kernels.integrations.timm import FusedAttentionPool
from segvit_kernels.integrations.torchvision import paste_masks


class LatentPool(nn.Module):
    """A latent query's attention to tokens (Lee et al., ICML 2019), with timm's names of modules."""

    def __init__(self, dim=16, heads=2, latents=1, pool="token", norm=False, positions=None):
        super().__init__()
        self.num_heads, self.pool, self.scale = heads, pool, (dim // heads) ** -0.5
        self.pos_embed = None if positions is None else nn.Parameter(torch.randn(positions, dim))
        self.latent = nn.Parameter(torch.randn(1, latents, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // heads) if norm else nn.Identity() for _ in range(2))
        self.proj_drop, self.norm = nn.Dropout(0.0), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        batch, count, dim = x.shape
        if self.pos_embed is not None:
            x = x + self.pos_embed
        q = self.q_norm(self.q(self.latent).view(1, -1, self.num_heads, dim // self.num_heads))
        k, v = self.kv(x).view(batch, count, 2, self.num_heads, -1).unbind(2)
        self.scores = torch.einsum("lqhd,bnhd->bhqn", q, self.k_norm(k)) * self.scale
        y = torch.einsum("bhqn,bnhd->bqhd", self.scores.softmax(-1), v).flatten(2)
        y = self.proj(y)
        y = y + self.mlp(self.norm(y))
        return {"token": y[:, 0], "avg": y.mean(1), "": y}[self.pool]


@pytest.mark.parametrize(
    "options",
    [{}, {"latents": 3, "pool": "avg", "norm": True}, {"latents": 2, "pool": "", "positions": 11}],
    ids=["token", "avg", "latents"],
)
def test_pool(options):
    torch.manual_seed(0)
    pool = LatentPool(**options).double()
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    expected = pool(x)
    fused = FusedAttentionPool(pool)
    assert set(fused.state_dict()) == set(pool.state_dict())
    torch.testing.assert_close(fused(x), expected)
    found = fused(x, need_masks=True, need_weights="mean")
    torch.testing.assert_close(found.output, expected)
    torch.testing.assert_close(found.mask_logits, pool.scores.mean(1))
    torch.testing.assert_close(found.weights, pool.scores.softmax(-1).mean(1))
    assert fused(x, need_masks=True).weights is None
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        *(torch.autograd.grad(m(leaf).square().sum(), leaf) for m in (fused, pool)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "latent_len": 4, "pool_type": "avg"}], ids=["", "norm"]
)
def test_timms_own_pool(options):
    timm = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    pool = timm.AttentionPoolLatent(32, num_heads=4, norm_layer=nn.LayerNorm, **options).eval()
    x = torch.randn(2, 17, 32)
    expected = pool(x)
    torch.testing.assert_close(FusedAttentionPool(pool)(x, need_masks=True).output, expected)


def test_pool_refusals():
    with pytest.raises(
        TypeError, match=r"pool is a Linear without q, kv, .*; expected timm's AttentionPoolLatent"
    ):
        FusedAttentionPool(nn.Linear(2, 2))
    pool = LatentPool()
    pool.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(TypeError, match="pool is a LatentPool with hooks"):
        FusedAttentionPool(pool)
    pool = LatentPool()
    pool.gate = nn.Linear(16, 16)
    pool.bias = nn.Parameter(torch.zeros(16))
    with pytest.raises(TypeError, match="pool is a LatentPool with bias, gate; expected timm's"):
        FusedAttentionPool(pool)
    with pytest.raises(ValueError, match="need_weights is 'max'; expected None or 'mean'"):
        FusedAttentionPool(LatentPool())(torch.zeros(1, 2, 16), need_weights="max")


BOXES = torch.tensor(
    [
        [3.2, 4.7, 20.9, 30.1],
        [-6.5, -3.0, 8.0, 50.0],  # out of the image on three sides
        [30.0, 10.0, 30.2, 10.4],  # a pixel
        [35.0, 20.0, 60.0, 25.5],
        [90.0, 90.0, 99.0, 99.0],  # elsewhere
    ]
)
SIZE = (40, 45)


def pasted(masks, boxes, size, padding=1):
    """torchvision's rule: masks with a border of zeros, resized to grown boxes of whole pixels."""
    side = masks.shape[-1]
    result = masks.new_zeros(len(masks), *size)
    for mask, (left, top, right, bottom), out in zip(masks, boxes.tolist(), result, strict=True):
        scale = (side + 2 * padding) / side
        middle, half = ((left + right) / 2, (top + bottom) / 2), ((right - left) / 2, (bottom - top) / 2)
        x, y = (int(m - h * scale) for m, h in zip(middle, half, strict=True))
        width, height = (
            max(1, int(m + h * scale) - start + 1) for m, h, start in zip(middle, half, (x, y), strict=True)
        )
        grid = F.pad(mask, (padding,) * 4)[None, None]
        resized = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)[0, 0]
        for row in range(max(0, y), min(size[0], y + height)):
            for column in range(max(0, x), min(size[1], x + width)):
                out[row, column] = resized[row - y, column - x]
    return result


def masks_of(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(BOXES), 1, 9, 9, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_pasted_masks(padding, threshold):
    masks = masks_of()
    found = paste_masks(masks, BOXES.double(), SIZE, padding=padding, threshold=threshold)
    expected = pasted(masks[:, 0], BOXES.double(), SIZE, padding) > threshold
    assert torch.equal(found.masks, expected)
    assert found.areas.tolist() == expected.sum((1, 2)).tolist() and found.areas[4] == 0
    assert expected[0].any() and expected[1].any()
    rle = paste_masks(masks, BOXES.double(), SIZE, padding=padding, threshold=threshold, format="rle")
    assert [m["size"] for m in rle.masks] == [list(SIZE)] * len(BOXES)


def test_torchvisions_own_paste():
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    masks = masks_of(torch.float32)
    expected = roi_heads.paste_masks_in_image(masks, BOXES, SIZE)[:, 0]
    found = paste_masks(masks, BOXES, SIZE).masks
    different = found != (expected > 0.5)
    assert ((expected - 0.5).abs()[different] < 1e-5).all() and found.any()
    assert roi_heads.paste_masks_in_image(masks[:0], BOXES[:0], SIZE).numel() == 0
    crossed = torch.tensor([[20.0, 30.0, 12.0, 35.0], [20.0, 30.0, 25.0, 22.0], [9.0, 9.0, 5.0, 5.0]])
    assert not roi_heads.paste_masks_in_image(torch.ones(3, 1, 9, 9), crossed, SIZE).any()
    assert not paste_masks(torch.ones(3, 1, 9, 9), crossed, SIZE).masks.any()


def test_no_masks():
    found = paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), SIZE)
    assert found.masks.shape == (0, *SIZE) and found.areas.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masks": torch.zeros(5, 2, 9, 9)}, ValueError, r"masks has shape \(5, 2, 9, 9\)"),
        ({"masks": torch.zeros(5, 9, 8)}, ValueError, r"masks has shape \(5, 9, 8\)"),
        ({"masks": [1]}, TypeError, "masks is a list; expected a tensor"),
        ({"boxes": BOXES[:3]}, ValueError, r"boxes has shape \(3, 4\); expected \(5, 4\), one a mask"),
        ({"threshold": 1.5}, ValueError, "threshold is 1.5; expected 0 to 1"),
        ({"padding": -1}, ValueError, "padding is -1; expected at least 0"),
        ({"size": (0, 5)}, ValueError, "size is"),
    ],
)
def test_paste_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        paste_masks(**{"masks": masks_of(), "boxes": BOXES, "size": SIZE, **changes})
