"""Calls of the mask loss's operators with random contents, and what they must give."""

import dataclasses

import torch
from torch.nn import functional as F

from segvit_kernels.testing import assert_within_budget

SUMS = ("focal", "bce", "overlap", "total")


@dataclasses.dataclass
class Call:
    """Positional arguments of the operators, with random contents."""

    logits: list
    targets: torch.Tensor
    matches: torch.Tensor | None
    num_targets: int
    alpha: float = 0.25
    gamma: float = 2.0
    mask_ignored: bool = False

    @classmethod
    def draw(
        cls, batch, queries, grids, size, targets=torch.uint8, num_targets=None, matched=False, present=6,
        dtype=torch.float32, seed=0, **options,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        count = num_targets or queries
        logits = [(3 * torch.randn(batch, queries, *g, generator=generator)).to(dtype) for g in grids]
        if targets == torch.bool or targets.is_floating_point:
            values = torch.rand(batch, count, *size, generator=generator)
            values = values > 0.6 if targets == torch.bool else values.to(targets)
        else:
            # Some classes out of all, and some pixels that belong to none.
            classes = torch.randint(0, count, (present,), generator=generator)
            classes = torch.cat([classes, torch.tensor([count, 255 if targets == torch.uint8 else -1])])
            values = classes[torch.randint(0, len(classes), (batch, *size), generator=generator)].to(targets)
        matches = torch.randint(-1, count, (batch, queries), generator=generator) if matched else None
        return cls(logits, values, matches, count, **options)

    def options(self):
        return self.num_targets, self.alpha, self.gamma, self.mask_ignored

    def forward(self, backend):
        arguments = (self.logits, self.targets, self.matches, *self.options())
        return backend.op("mask_loss_fwd")(*arguments)

    def backward(self, grad_sums, areas, backend):
        arguments = (grad_sums, self.logits, self.targets, self.matches, areas, *self.options())
        return backend.op("mask_loss_bwd")(*arguments)

    def matching(self, backend):
        arguments = (self.logits[0], self.targets, self.num_targets, self.alpha, self.gamma)
        return backend.op("mask_matching_sums")(*arguments)

    def everything(self, backend):
        """Sums, areas and the gradients."""
        sums, areas = self.forward(backend)
        return sums, areas, *self.backward(self.grad_sums(), areas, backend)

    def grad_sums(self):
        shape = (len(self.logits), *self.logits[0].shape[:2], 4)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def masks(self, dtype):
        if self.targets.ndim == 4:
            return self.targets.to(dtype)
        index = torch.arange(self.num_targets)[:, None, None]
        return (self.targets.long()[:, None] == index).to(dtype)

    def truth(self, dtype=torch.float64, grad_sums=None):
        """Sums, areas and gradients by autograd through ``F.interpolate``, computed in ``dtype``."""
        (batch, queries), size = self.logits[0].shape[:2], self.targets.shape[-2:]
        every = self.masks(dtype)
        areas = every.sum((2, 3))
        matches = torch.arange(queries).expand(batch, -1) if self.matches is None else self.matches
        t = every[torch.arange(batch)[:, None], matches.clamp(min=0)]
        active = matches >= 0
        if self.targets.ndim == 3:
            active = active & (t.sum((2, 3)) > 0)
        valid = every.sum(1, keepdim=True) if self.mask_ignored else torch.ones_like(t[:, :1])
        sums, gradients = [], []
        grad_sums = self.grad_sums() if grad_sums is None else grad_sums
        for logits, g in zip(self.logits, grad_sums.to(dtype), strict=True):
            leaf = logits.to(dtype).requires_grad_()
            x = F.interpolate(leaf, size=size, mode="bilinear", align_corners=False)
            p, q = x.sigmoid(), (-x).sigmoid()
            bce = F.softplus(-x) * t + F.softplus(x) * (1 - t)
            m = q * t + p * (1 - t)
            focal = (self.alpha * t + (1 - self.alpha) * (1 - t)) * m**self.gamma * bce
            value = torch.stack([(v * valid).sum((2, 3)) for v in (focal, bce, p * t, p)], -1)
            value = value * active[..., None]
            gradients.append(torch.autograd.grad((value * g).sum(), leaf)[0])
            sums.append(value.detach())
        return torch.stack(sums), areas, gradients


def check(call, backend):
    """Both operators within the error budget; what they gave."""
    inputs = (*call.logits, call.targets, *(() if call.matches is None else (call.matches,)))
    before = [t.clone() for t in inputs]
    sums, areas, *grads = call.everything(backend)
    truth, true_areas, true_grads = call.truth()
    # Sums are float32 whatever the logits; gradients have the dtype of the logits.
    plain, _, plain_grads = call.truth(torch.float32)
    assert sums.dtype == areas.dtype == torch.float32
    for k, name in enumerate(SUMS):
        assert_within_budget(name, sums[..., k], truth[..., k], plain[..., k])
    torch.testing.assert_close(areas.double(), true_areas, rtol=1e-6, atol=0)
    for i, (g, t, p) in enumerate(zip(grads, true_grads, plain_grads, strict=True)):
        assert g.dtype == call.logits[i].dtype and g.is_contiguous()
        assert_within_budget(f"gradient {i}", g, t, p.to(g.dtype))
    inactive = ~truth.any(-1)
    assert not sums[inactive].any()
    assert all(not g[i].any() for g, i in zip(grads, inactive, strict=True))
    assert all(map(torch.equal, inputs, before))
    return sums, areas, *grads


def same(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), i


def check_matching(call, backend):
    """The sums of every query with every target within the error budget."""
    results = []
    for dtype in (torch.float64, torch.float32):
        x = F.interpolate(call.logits[0].to(dtype), size=call.targets.shape[-2:], mode="bilinear")
        y, u = x.flatten(2), call.masks(dtype).flatten(2)
        p, q = y.sigmoid(), (-y).sigmoid()
        positive = call.alpha * q**call.gamma * F.softplus(-y)
        negative = (1 - call.alpha) * p**call.gamma * F.softplus(y)
        products = torch.stack([a @ u.mT for a in (positive - negative, -y, p)])
        totals = torch.stack([negative.sum(2), F.softplus(y).sum(2), p.sum(2)])
        results.append((products, totals, u.sum(2)))
    found = call.matching(backend)
    for name, actual, truth, plain in zip(("products", "totals", "areas"), found, *results, strict=True):
        assert actual.dtype == torch.float32 and actual.is_contiguous()
        for i, values in enumerate(zip(actual, truth, plain, strict=True)):
            assert_within_budget(f"{name} {i}", *values, ulps=4 if name == "products" else 2)
