"""Windows of tue-mps/eomt and LightlyTrain, neither of which is installed: against their formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from segvit_kernels.integrations import window_label_maps

SIDE, QUERIES, CLASSES = 32, 9, 5


def scaled(size):
    """The size of an image whose shorter side is a window's."""
    return tuple(round(side * SIDE / min(size)) for side in size)


def windows(sizes):
    """Origins of evenly spaced windows along the longer side, as few as cover it."""
    found = []
    for image, size in enumerate(sizes):
        length = max(scaled(size))
        count = math.ceil(length / SIDE)
        step = (length - SIDE) / max(1, count - 1)
        found += [(image, int(i * step), int(i * step) + SIDE) for i in range(count)]
    return found


def outputs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = 4 * torch.randn(count, QUERIES, 8, 8, generator=generator, dtype=torch.float64)
    return masks, 3 * torch.randn(count, QUERIES, CLASSES + 1, generator=generator, dtype=torch.float64)


def expected(masks, classes, origins, sizes, classes_kept):
    """Every score, averaged where the windows lie, interpolated to the image."""
    probs = classes.softmax(-1)[..., :classes_kept]
    scores = torch.einsum(
        "nqc,nqhw->nchw", probs, F.interpolate(masks, (SIDE, SIDE), mode="bilinear").sigmoid()
    )
    found = []
    for image, size in enumerate(sizes):
        total = torch.zeros(2, classes_kept, *scaled(size), dtype=masks.dtype)
        for own, origin in zip(scores, origins, strict=True):
            if origin[0] == image:
                part = (
                    total[..., slice(*origin[1:3]), :]
                    if size[0] > size[1]
                    else total[..., slice(*origin[1:3])]
                )
                part += torch.stack([own, torch.ones_like(own)])
        mean = (total[0] / total[1])[None]
        found.append(F.interpolate(mean, size, mode="bilinear")[0].argmax(0))
    return found


@pytest.mark.parametrize(
    "sizes",
    [[(32, 32)], [(40, 130), (90, 41)], [(64, 33), (33, 32), (200, 150)]],
    ids=["square", "two", "three"],
)
@pytest.mark.parametrize("last_class", [False, True])
def test_the_labels_are_those_of_all_scores(sizes, last_class):
    origins = windows(sizes)
    masks, classes = outputs(len(origins))
    truth = expected(masks, classes, origins, sizes, CLASSES + last_class)
    if last_class:  # LightlyTrain's
        origins = [(*origin, sizes[origin[0]][0] > sizes[origin[0]][1]) for origin in origins]
    found = window_label_maps(masks, classes, origins, sizes, (SIDE, SIDE), last_class=last_class)
    assert len(found) == len(truth) and all(map(torch.equal, found, truth))
    assert len(truth[0].unique()) > 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"origins": [(0, 0, 32)]}, "origins has length 1; expected 2, the windows of mask_logits"),
        (
            {"origins": [(0, 0, 32), (1, 8, 40)]},
            r"origins\[1\] is \(1, 8, 40\); .* image below 1",
        ),
        ({"origins": [(0, 0, 32), (0, 8, 41)]}, r"origins\[1\] is \(0, 8, 41\); expected"),
        ({"img_sizes": [(32, 40), (9, 9)]}, "origins has no window of image 1"),
        (
            {"img_sizes": [(32, 90)]},
            r"img_sizes\[0\] has \(32, 90\); its windows are those of an image of 32",
        ),
        ({"img_sizes": [(32, 0)]}, r"img_sizes\[0\] is \(32, 0\); expected \(height, width\)"),
        ({"img_size": 32}, r"img_size is 32; expected \(height, width\)"),
    ],
)
def test_bad_arguments(changes, message):
    masks, classes = outputs(2)
    given = {"origins": [(0, 0, 32), (0, 8, 40)], "img_sizes": [(32, 40)], "img_size": (SIDE, SIDE)}
    with pytest.raises(ValueError, match=message):
        window_label_maps(masks, classes, **given | changes)
