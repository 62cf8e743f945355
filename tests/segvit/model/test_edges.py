"""Edge-aware down-sampling: what stays, where it is, what the edges learn, and every way of using it."""

import csv

import pytest
import torch
from samples import pictures, tiny_model
from torch.nn import functional as F

from segvit import InferenceOptions, SegViT, SegViTConfig
from segvit.cli import main
from segvit.exporting.graph import LabelGraph, Plan
from segvit.model.backbone import VisionTransformer
from segvit.model.losses import SegViTLoss, edge_pixels

ROTARY = {"rotary": {"rescale": 1.0}, "absolute_positions": False, "register_tokens": 2}


def edged(share=0.3, decoder="atm", setup=None, **fields):
    """Shrunk at block 1 of 3."""
    setup = {"shrink_at": 1, "shrink_edges": share, **(setup or {})}
    return tiny_model("edged", setup=setup, upsample=True, decoder=decoder, **fields)


@torch.no_grad()
@pytest.mark.parametrize("setup", [{}, ROTARY])
def test_with_every_token_kept_it_is_the_plain_vit(setup):
    """The tokens are in another order, and nowhere else."""
    model = edged(0.75, setup=setup, key_positions=True).double()
    plain = VisionTransformer(
        SegViTConfig.from_fields({**model.config.backbone.to_dict(), "shrink_at": None, "shrink_edges": 0.0,
                                  "num_classes": 2, "taps": (2,)}).backbone,
        model.config.image_size,
        model.config.taps,
    ).double()  # fmt: skip
    plain.load_state_dict(model.backbone.state_dict())
    images, grid = torch.randn(2, 3, 32, 48, dtype=torch.float64), (4, 6)
    places = []

    def keep(patches, grid):
        places.append(model.decoder.edges(patches, grid)[1])
        return places[0]

    found, expected = model.backbone(images, keep=keep), plain.eval()(images)
    order = places[0].argsort(1)
    assert not torch.equal(places[0], places[0].sort(1).values) and found[1].shape == expected[1].shape
    torch.testing.assert_close(found[0], expected[0])
    sorted_ = found[1].gather(1, order[:, :, None].expand_as(found[1]))
    torch.testing.assert_close(sorted_, expected[1], rtol=1e-9, atol=1e-9)
    # The decoder finds every token at its place, and misses it at another.
    whole, own, none = (
        model.decoder(features, grid, places=where)[-1].mask_logits
        for features, where in ((expected, None), (found, places[0]), (found, None))
    )
    torch.testing.assert_close(own, whole, rtol=1e-9, atol=1e-9)
    assert (none - whole).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_kept():
    decoder = edged(0.3).decoder
    patches, (height, width) = torch.randn(3, 35, 32), (5, 7)
    logits, places = decoder.edges(patches, (height, width))
    assert logits.shape == (3, 5, 7)
    regular = [row * 7 + column for row in (0, 2, 4) for column in (0, 2, 4, 6)]
    for image in range(3):
        own = places[image].tolist()
        assert own[:12] == regular and len(set(own)) == len(own) == 12 + 35 * 3 // 10
        rest = [place for place in range(35) if place not in regular]
        best = sorted(rest, key=lambda place: -float(logits[image].flatten()[place]))[:10]
        assert own[12:] == sorted(best)
    assert edged(0.75).decoder.edges(patches, (5, 7))[1].shape == (3, 35), "no more than there are"


def test_the_edge_term():
    labels = torch.zeros(2, 16, 24, dtype=torch.int64)
    labels[0, :, 12:] = 1  # inside the second patch of each row
    labels[0, 8:, 12:] = 255
    labels[1, 7, 23] = 2  # its neighbours: left and below
    edges = edge_pixels(labels, 255)
    assert edges[0].nonzero().tolist() == [[row, 11] for row in range(8)]
    assert edges[1].nonzero().tolist() == [[6, 23], [7, 22], [7, 23]]
    model = edged(0.3, setup={"shrink_at": 1}).requires_grad_(True).train()
    images = model.preprocess(pictures((16, 24)))
    output = model(images)
    output.edges.retain_grad()
    terms = SegViTLoss(6)(output, labels)
    target = torch.zeros(2, 2, 3)
    target[0, 0, 1] = target[1, 0, 2] = 1
    expected = F.binary_cross_entropy_with_logits(output.edges, target)
    torch.testing.assert_close(terms["edge"], expected)
    terms["total"].backward()
    torch.testing.assert_close(output.edges.grad, (output.edges.sigmoid() - target).detach() / 12)
    # Two halves of the batch add up to it.
    loss = SegViTLoss(6)
    with torch.no_grad():
        parts = [
            loss(model.eval()(images[i : i + 1]), labels[i : i + 1], loss.normalisers(labels)) for i in (0, 1)
        ]
        whole = loss(model(images), labels)
    torch.testing.assert_close(sum(part["edge"] for part in parts), whole["edge"])


@torch.no_grad()
def test_engine_windows_and_refusals():
    for fields in ({"decoder": "segvitv2"}, {"setup": ROTARY}, {"key_positions": True}):
        model, images = edged(**fields), pictures((37, 50))
        for options in (InferenceOptions(), InferenceOptions(window=32, flip=True)):
            _, scores = model.predict(images, options, return_scores=True)
            engine = model.compile_for_inference((37, 50), 2, options=options)
            graph = LabelGraph(model, Plan((37, 50), 2, options=options)).eval()
            for found in (engine(images), graph(images)[0]):
                assert (scores.amax(1) - scores.gather(1, found.long()[:, None])[:, 0]).max() < 1e-5
        assert torch.equal(model.fuse().predict(images), model.unfuse().predict(images))
    maps = model.similarity_maps(model.preprocess(pictures((32, 32))))
    assert maps[-1].shape == (2, 6, 4, 4)
    for fields, message in (
        ({"shrink_edges": 0.2, "shrink_at": None}, "shrink_edges needs shrink_at, got 0.2 without"),
        ({"shrink_edges": 0.9, "shrink_at": 6}, "shrink_edges must be between 0 and 0.75, got 0.9"),
        ({"shrink_edges": 0.2, "shrink_at": 6}, "shrink_edges needs upsample"),
        ({"shrink_edges": 0.2, "shrunk": True, "decoder": "linear"}, "of decoder atm or segvitv2"),
    ):
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            SegViTConfig.preset("vit_tiny", 3, **fields)


def test_training_converges(tmp_path):
    pytest.importorskip("lightning_fabric")
    run = tmp_path / "run"
    tiny = (
        "{width: 32, depth: 2, heads: 2, shrink_at: 1, shrink_edges: 0.25, patch_size: 8, decoder_dim: 32, "
        "decoder_depth: 2, key_positions: true, decoder: segvitv2}"
    )
    words = [
        "train", "--data", "synthetic", "--synthetic-images", "4", "--synthetic-validation", "2", "--shrunk",
        "--workers", "0", "--batch-size", "4", "--no-progress", "--image-size", "48", "--max-steps", "30",
        "--warmup-steps", "3", "--lr", "2e-3", "--log-every", "1", "--no-photometric", "--accelerator", "cpu",
        "--out", str(run), "--model", tiny,
    ]  # fmt: skip
    assert main(words) == 0
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    for name, share in (("loss", 0.85), ("edge", 0.95)):
        values = [float(row[name]) for row in rows]
        assert sum(values[-5:]) < share * sum(values[:5]), name
    assert SegViT.from_pretrained(run).config.backbone.shrink_edges == 0.25
