"""semantic_argmax where bounds decide: scores near each other, and few tokens with nearly all class mass."""

import pytest
import torch
from backends import BY_ID, each_backend
from test_semantic_argmax import BY_NAME, NATIVE, check, normal, run

from segvit_kernels.ops import _class_scores
from segvit_kernels.ops import semantic_argmax as module
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax


class TestNearTies:
    """Scores closer to each other than 8 bits tell apart, further than float32 rounds."""

    @each_backend(*NATIVE)
    @pytest.mark.parametrize("queries", [5, 64, 150])
    @pytest.mark.parametrize("gap", [3e-5, 1e-3])
    def test_all_classes_near_the_first(self, gap, queries, backend, poisoned):
        """Of classes that are nearly copies the best one wins everywhere, wherever it stands."""
        base = torch.rand(1, queries, 1, generator=torch.Generator().manual_seed(1)).to(backend.device) + 0.5
        masks = normal(backend, 1, queries, 4, 5)
        for best in (0, 7, 39):
            near = normal(backend, 1, 1, 40).abs().clamp(max=1) * 0.5
            probs = base.expand(-1, -1, 40) * (1 + gap * near)
            probs[..., best] = base[..., 0] * (1 + gap)
            inputs = {"mask_logits": masks, "class_probs": probs, "size": (19, 70)}
            assert (run(inputs, backend) == best).all()
            assert (run(inputs, backend, scores=True)[0] == best).all()

    @each_backend(*NATIVE)
    @pytest.mark.parametrize("seed", range(4))
    def test_noise_below_a_step(self, seed, backend, poisoned):
        """Two classes differ by noise that 8 bits round away, with a winner of every pixel's own."""
        generator = torch.Generator().manual_seed(seed)
        probs = torch.rand(1, 96, 30, generator=generator)
        probs[..., 20] = probs[..., 3] = probs[..., 3] + 0.4
        noise = torch.rand(1, 96, generator=generator) * 4e-3
        probs[..., 20] += noise - noise.mean()
        masks = normal(backend, 1, 96, 6, 5, seed=seed) * 4
        inputs = {"mask_logits": masks, "class_probs": probs.to(backend.device), "size": (41, 37)}
        labels = check("noise", inputs, backend)
        assert 0 < (labels == 20).sum() < labels.numel() and ((labels == 3) | (labels == 20)).all()

    @each_backend(*NATIVE)
    def test_sigmas_between_steps(self, backend, poisoned):
        """Probabilities that 8 bits hold exactly, σ that they round up for one class and down for another."""
        steps = torch.tensor([0.49] * 32 + [0.51] * 16 + [0.40] * 16) + torch.arange(64) % 16 * 9 + 40
        masks = (steps / 255).logit().view(1, 64, 1, 1).expand(1, 64, 3, 3).to(backend.device)
        probs = torch.zeros(1, 64, 8, device=backend.device)
        probs[:, :32, 5] = probs[:, 32:, 2] = probs[:, 32:, 7] = 1
        labels = check("between", {"mask_logits": masks, "class_probs": probs, "size": (5, 20)}, backend)
        assert (labels == 5).all()

    @each_backend(*NATIVE)
    @pytest.mark.parametrize("seed", range(4))
    def test_heavy_tails(self, seed, backend, poisoned):
        """A single large probability makes the steps of its class coarse."""
        generator = torch.Generator().manual_seed(seed)
        probs = torch.rand(1, 120, 50, generator=generator) * 2e-3
        rows = torch.randperm(120, generator=generator)[:50]
        probs[0, rows, torch.arange(50)] = 1.0
        masks = normal(backend, 1, 120, 6, 6, seed=seed) * 2
        masks[:, rows] = -9 + 0.1 * masks[:, rows]  # the large ones are silent: the small ones decide
        inputs = {"mask_logits": masks, "class_probs": probs.to(backend.device), "size": (33, 47)}
        check("heavy", inputs, backend)

    @each_backend(*NATIVE)
    def test_small_sigmas(self, backend, poisoned):
        """σ of 1e-6 is nothing in 8 bits."""
        inputs = BY_NAME["classes_150"].inputs(torch.float32, backend.device)
        inputs["mask_logits"] = inputs["mask_logits"].clamp(-3, 3) - 14
        check("small", inputs, backend)
        inputs["class_probs"] *= 1e-20
        check("tiny", inputs, backend)

    @each_backend(*NATIVE)
    def test_flat(self, backend, poisoned):
        """Every class is a rival everywhere."""
        inputs = BY_NAME["classes_171"].inputs(torch.float32, backend.device)
        inputs["class_probs"] = 1 / 171 + inputs["class_probs"] * 1e-3
        check("flat", inputs, backend)


@pytest.fixture
def shortcuts(monkeypatch):
    """The number of pixels that the eager form's shortcut decided and left open, per block."""
    blocks, decide = [], module._decide

    def recorded(head, scores):
        labels, undecided = decide(head, scores)
        blocks.append((labels.numel() - len(undecided), len(undecided)))
        return labels, undecided

    monkeypatch.setattr(module, "_decide", recorded)
    return blocks


class TestHead:
    """Few tokens with nearly all class mass; others must still be able to decide."""

    @each_backend("eager", *NATIVE)
    @pytest.mark.parametrize("light", [1, 120])
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("scale", [0.5, 0.98, 1.02, 2.0])
    def test_the_tail_may_flip_the_winner(self, scale, count, light, backend, shortcuts, poisoned):
        """Class 0 leads by the heavy queries; light ones, on in the right half, all vote for class 1."""
        probs = torch.zeros(count, 124, 9, device=backend.device)
        probs[:, 0, 0], probs[:, 1, 1] = 0.9, 0.9 - 0.2 / count
        probs[:, 2:4, 2] = 0.5
        probs[0, 4 : 4 + light, 1] = 0.2 * scale / light  # in the first view only
        masks = torch.full((count, 124, 6, 8), -20.0, device=backend.device)
        masks[:, :2] = 20.0
        masks[:, 4:, :, 4:] = 20.0
        size = (13, 50)
        views = None if count == 1 else Views([View.whole(0, (6, 8), size)] * count, 1, size)
        inputs = {"mask_logits": masks, "class_probs": probs, "size": size}
        labels = check("flipped", {**inputs, "views": views and views.to(backend.device)}, backend)
        assert (labels[..., 40:] == (1 if scale > 1 else 0)).all()
        assert shortcuts or backend.id != "eager"  # it was tried

    @each_backend("eager", *NATIVE)
    @pytest.mark.parametrize("seed", range(6))
    def test_margins_as_small_as_the_tail(self, seed, backend, shortcuts, poisoned):
        """Two heavy classes everywhere within the mass of the tail of each other, by little more or less."""
        dtype = torch.float64 if backend.id == "eager" else torch.float32
        generator = torch.Generator().manual_seed(seed)
        probs = torch.rand(1, 64, 40, generator=generator) ** 8 * 3e-3
        probs[0, 0, 7], probs[0, 1, 3] = 1.0, 1.0
        masks = torch.randn(1, 64, 5, 5, generator=generator)
        masks[:, :2] = 2 + 0.02 * torch.randn(1, 2, 5, 5, generator=generator)
        tensors = {"mask_logits": masks, "class_probs": probs}
        inputs = {name: t.to(backend.device, dtype) for name, t in tensors.items()}
        check("close", {**inputs, "size": (61, 47)}, backend)
        assert shortcuts or backend.id != "eager"

    @each_backend("eager", *NATIVE)
    def test_a_class_outside_the_head_wins_where_the_head_is_silent(self, backend, shortcuts, poisoned):
        probs = torch.full((1, 80, 50), 1e-3, device=backend.device)
        probs[0, 0, 10] = 1.0
        probs[0, 1:, 20] = 2e-3
        masks = torch.full((1, 80, 4, 10), -30.0, device=backend.device)
        masks[0, 0, :, 1:] = 30.0
        masks[0, 1:] = 0.0
        labels = check("silent", {"mask_logits": masks, "class_probs": probs, "size": (20, 100)}, backend)
        assert labels[0, 0, 0] == 20 and labels[0, 0, 99] == 10
        assert backend.id != "eager" or shortcuts[0][0] > 0 < shortcuts[0][1]

    @each_backend("eager", *NATIVE)
    def test_negative_values_have_no_bound(self, backend, poisoned):
        inputs = BY_NAME["classes_171"].inputs(torch.float32, backend.device, concentrated=True)
        inputs["class_probs"][0, 0, 0] = -1e-3
        inputs["class_probs"][1] = normal(backend, 171, 171)
        check("negative", inputs, backend)


class TestShortcut:
    """Of the eager form."""

    def test_decides_most_pixels_of_a_trained_model(self, shortcuts):
        semantic_argmax(**BY_NAME["classes_171"].inputs(torch.float32, concentrated=True))
        decided, left = map(sum, zip(*shortcuts, strict=True))
        assert decided > 9 * left

    @pytest.mark.parametrize("options", [{"return_scores": True}, {"activation": "none"}])
    def test_is_not_taken_where_it_has_no_bound(self, options, shortcuts):
        semantic_argmax(**BY_NAME["classes_171"].inputs(torch.float32, concentrated=True), **options)
        inputs = BY_NAME["classes_171"].inputs(torch.float32, concentrated=True)
        inputs["class_probs"][0, 0, 0] = -1e-3
        semantic_argmax(
            **{**inputs, "mask_logits": inputs["mask_logits"][:1], "class_probs": inputs["class_probs"][:1]}
        )
        assert not shortcuts

    def test_is_not_taken_on_spread_mass(self, shortcuts):
        semantic_argmax(**BY_NAME["classes_150"].inputs(torch.float32))
        assert not shortcuts

    def test_is_given_up_where_it_leaves_most_pixels_open(self, shortcuts, monkeypatch):
        monkeypatch.setattr(_class_scores, "_BUDGET", 2**12)  # many blocks
        inputs = BY_NAME["classes_150"].inputs(torch.float64, concentrated=True)
        inputs["mask_logits"] = torch.full_like(inputs["mask_logits"], -8) + inputs["mask_logits"] * 1e-2
        check("flat", inputs, BY_ID["eager"])
        assert len(shortcuts) == 1 and shortcuts[0][1] > shortcuts[0][0]
