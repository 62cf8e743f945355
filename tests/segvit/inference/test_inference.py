"""Sliding windows, scales and mirroring, against score maps of full size accumulated by hand."""

import pytest
import torch
from torch.nn import functional as F

from segvit import SegViT, SegViTConfig, SegViTOutput
from segvit.inference.passes import label_maps, passes
from segvit.options import InferenceOptions

PATCH, CLASSES = 4, 5


class Network(SegViT):
    """Masks that depend on a patch and on the whole crop, and classes that all win somewhere."""

    def forward(self, images):
        generator = torch.Generator().manual_seed(0)
        kernel = torch.randn(CLASSES, 3, PATCH, PATCH, generator=generator)
        masks = F.conv2d(images, kernel, stride=PATCH)
        masks = masks + images.cumsum(-1).mean((1, 2, 3))[:, None, None, None] / 4
        classes = 3 * torch.eye(CLASSES, CLASSES + 1) + torch.randn(CLASSES, CLASSES + 1, generator=generator)
        return SegViTOutput(classes + images.mean((1, 2, 3))[:, None, None], masks, [])


@pytest.fixture(scope="module")
def model():
    return Network(SegViTConfig.preset("vit_tiny", CLASSES, patch_size=PATCH, depth=1, taps=(0,))).eval()


def images(height, width, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


def scores(model, crop, size):
    """Class scores of a crop, its mask logits upsampled to `size`."""
    output = model(crop)
    masks = F.interpolate(output.mask_logits.double(), size=size, mode="bilinear").sigmoid()
    probabilities = output.class_logits.double().softmax(-1)[..., :CLASSES]
    return torch.einsum("bqc,bqhw->bchw", probabilities, masks)


def assert_best(labels, expected):
    """Every label's score is the best, up to rounding; and there is something to get wrong."""
    chosen = expected.gather(1, labels.long()[:, None])[:, 0]
    assert (expected.amax(1) - chosen).max() < 1e-5
    assert labels.unique().numel() > 2


@torch.no_grad()
@pytest.mark.parametrize("flip", [False, True])
def test_sliding_window_is_the_mean_of_overlapping_windows(model, flip):
    batch = images(22, 37, batch=2)
    total, count = torch.zeros(2, CLASSES, 22, 37, dtype=torch.float64), torch.zeros(22, 37)
    for top in (0, 6):
        for left in (0, 10, 20, 21):
            window = batch[..., top : top + 16, left : left + 16]
            for mirrored in (False, True) if flip else (False,):
                score = scores(model, window.flip(-1) if mirrored else window, (16, 16))
                total[..., top : top + 16, left : left + 16] += score.flip(-1) if mirrored else score
                count[top : top + 16, left : left + 16] += 1
    options = InferenceOptions(window=16, stride=10, flip=flip)
    assert_best(label_maps(model, batch, options), total / count)


@torch.no_grad()
def test_scales_have_one_vote_each(model):
    """However many windows a scale takes: here one, and three by three with overlaps."""
    batch = images(16, 16)
    whole = scores(model, batch, (16, 16))
    double = F.interpolate(batch, size=(32, 32), mode="bilinear", antialias=True)
    total, count = torch.zeros_like(whole), torch.zeros(16, 16)
    for top in (0, 8, 16):
        for left in (0, 8, 16):
            # An output pixel is two pixels of the doubled image; its centre lies between them.
            score = scores(model, double[..., top : top + 16, left : left + 16], (8, 8))
            total[..., top // 2 : top // 2 + 8, left // 2 : left // 2 + 8] += score
            count[top // 2 : top // 2 + 8, left // 2 : left // 2 + 8] += 1
    options = InferenceOptions(window=16, stride=8, scales=[1.0, 2.0])
    assert_best(label_maps(model, batch, options), (whole + total / count) / 2)


@torch.no_grad()
def test_short_side_and_padding(model):
    batch = images(10, 15)
    resized = F.interpolate(batch, size=(18, 27), mode="bilinear", antialias=True)
    padded = F.pad(resized, (0, 1, 0, 2))
    score = scores(model, padded, (20, 28))[..., :18, :27]
    # Back at the image's own size every pixel reads the mask logits once, not resized scores.
    own = scores_at(model, padded, 18 / 10, 27 / 15, (10, 15))
    assert score.shape[-1] == 27
    assert_best(label_maps(model, batch, InferenceOptions(short_side=18)), own)


def scores_at(model, crop, row_step, column_step, size):
    output = model(crop)
    grid = output.mask_logits.shape[-2:]
    places = [
        (((torch.arange(n) + 0.5) * step / PATCH) - 0.5).clamp(0, cells - 1)
        for n, step, cells in zip(size, (row_step, column_step), grid, strict=True)
    ]
    normal = [2 * p / (cells - 1) - 1 for p, cells in zip(places, grid, strict=True)]
    where = torch.stack(torch.meshgrid(normal[1], normal[0], indexing="xy"), -1)[None].double()
    masks = F.grid_sample(output.mask_logits.double(), where, mode="bilinear", align_corners=True).sigmoid()
    probabilities = output.class_logits.double().softmax(-1)[..., :CLASSES]
    return torch.einsum("bqc,bqhw->bchw", probabilities, masks)


@torch.no_grad()
def test_many_passes_run_in_chunks(model, monkeypatch):
    batch, options = images(22, 37), InferenceOptions(window=16, flip=True, scales=[0.5, 1.5])
    expected = label_maps(model, batch, options)
    monkeypatch.setattr("segvit.inference.passes._IMAGES", 1)
    assert (label_maps(model, batch, options) == expected).float().mean() > 0.999


def test_mirroring_that_exchanges_classes_is_refused():
    names = ("ground", "left arm", "right arm")
    config = SegViTConfig.preset("vit_tiny", 3, width=32, depth=1, heads=1, taps=(0,), class_names=names)
    net, options = SegViT(config).eval(), InferenceOptions(flip=True)
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    refused = "flip: 'left arm' is 'right arm' in a mirrored picture; expected no mirroring"
    for run in (
        lambda: net.predict(picture, options),
        lambda: net.predict(picture, options, return_scores=True),
        lambda: net.compile_for_inference(32, options=options),
    ):
        with pytest.raises(ValueError, match=refused):
            run()
    assert net.predict(picture).shape == (32, 32)


def test_windows_cover_the_image_and_end_with_it():
    found = passes((100, 37), InferenceOptions(window=32, stride=20), PATCH)
    assert {run.top for run in found} == {0, 20, 40, 60, 68}
    assert {run.left for run in found} == {0, 5}
    assert all(run.crop == (32, 32) for run in found)
    (whole,) = passes((33, 20), InferenceOptions(window=64), PATCH)
    assert whole.crop == (36, 20), "a window does not grow beyond the image, padded to patches"
    both = passes((8, 8), InferenceOptions(scales=[1, 2], flip=True), PATCH)
    assert [run.group for run in both] == [0, 1, 2, 3]
    thirds = passes((96, 96), InferenceOptions(window=48), PATCH)
    assert {run.top for run in thirds} == {0, 32, 48}


@torch.no_grad()
def test_predict_takes_the_options(model):
    generator = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (3, 21, 30), dtype=torch.uint8, generator=generator)
    options = InferenceOptions(window=16, scales=[1.0, 1.5], flip=True)
    expected = label_maps(model, model.preprocess(picture[None]), options)[0]
    assert torch.equal(model.predict(picture, options), expected)
    assert torch.equal(model.predict([picture], options)[0], expected)
    assert not torch.equal(model.predict(picture), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 18}, "window: got 18, expected a multiple of the patch size 4"),
        ({"window": 0}, "window: got 0"),
        ({"stride": 4}, "stride: got 4 without a window"),
        ({"window": 16, "stride": 17}, "stride: got 17, expected 1 to 16"),
        ({"scales": [1.0, 0.0]}, r"scales: got \(1.0, 0.0\), expected more than 0"),
        ({"scales": []}, "scales: got"),
        ({"short_side": 0}, "short_side: got 0"),
    ],
)
def test_mistakes(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.predict(torch.zeros(3, 20, 20, dtype=torch.uint8), InferenceOptions(**options))
