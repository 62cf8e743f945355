"""Random outputs of transformers' mask classifiers: blobs on top of each other, of many sizes, and noise."""

import torch
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.eomt_dinov3.modeling_eomt_dinov3 import EomtDinov3ForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.models.oneformer.modeling_oneformer import OneFormerForUniversalSegmentationOutput

TARGETS = [(50, 61), (33, 90)]
SIZE = {"shortest_edge": 64, "longest_edge": 64}
OUTPUTS = {
    "maskformer": MaskFormerForInstanceSegmentationOutput,
    "mask2former": Mask2FormerForUniversalSegmentationOutput,
    "oneformer": OneFormerForUniversalSegmentationOutput,
    "eomt": EomtForUniversalSegmentationOutput,
    "eomt_dinov3": EomtDinov3ForUniversalSegmentationOutput,
}


def blobs(seed, queries, grid, logits, classes, radii, score):
    """Masks (2, queries, *grid) and class logits (2, queries, logits): every second query has a blob of a
    radius between two, and one of the first classes by about `score`."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(2, queries, *grid, generator=generator)
    scores = torch.randn(2, queries, logits, generator=generator)
    y, x = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    least, most = radii
    for b in range(2):
        for q in range(0, queries, 2):
            place, share = torch.rand(2, generator=generator), torch.rand(1, generator=generator)
            distance = ((y - place[0] * grid[0]) ** 2 + (x - place[1] * grid[1]) ** 2).sqrt()
            masks[b, q] += 2 * (least + (most - least) * share - distance)
            scores[b, q, torch.randint(classes, (1,), generator=generator)] += score + q / 8
    return masks, scores
