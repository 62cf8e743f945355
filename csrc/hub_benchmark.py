"""Benchmarks in the Kernel Hub's form: ``kernels benchmark OWNER/segvit-kernels``, or a built folder.

csrc/hub.py copies this file to ``benchmarks/``. Sizes are those of SegViT-B on a picture of 512² and of
Mask2Former; each result is compared with the plain formula, whose time is given beside it. What is
published comes from ``python -m bench``.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class SegViT(Benchmark):
    """One picture, inference."""

    seed = 0
    image = 512
    queries, heads, width, side = 150, 12, 64, 32

    def draw(self, *shape):
        dtype = torch.float32 if self.device == "cpu" else torch.float16
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def setup_fused_atm(self):
        self.q = self.draw(1, self.queries, self.heads, self.width)
        self.k, self.v = (self.draw(1, self.side**2, self.heads, self.width) for _ in range(2))

    @torch.no_grad()
    def benchmark_fused_atm(self):
        self.out = self.kernel.fused_atm(self.q, self.k, self.v)[0]

    @torch.no_grad()
    def verify_fused_atm(self):
        return self.kernel.atm_reference(self.q, self.k, self.v)[0]

    def setup_semantic_argmax(self):
        self.masks = 4 * self.draw(1, self.queries, self.side, self.side)
        self.probs = self.draw(1, self.queries, self.queries + 1).softmax(-1)[..., :-1]
        self.size = (self.image, self.image)

    setup_best_classes = setup_semantic_argmax

    def _scores(self):
        masks = F.interpolate(self.masks, self.size, mode="bilinear").sigmoid()
        return torch.einsum("bqc,bqhw->bchw", self.probs, masks)

    def benchmark_semantic_argmax(self):
        _, self.out = self.kernel.semantic_argmax(self.masks, self.probs, self.size, return_scores=True)

    def verify_semantic_argmax(self):
        return self._scores().amax(1).float()

    def benchmark_best_classes(self):
        given = (self.masks, self.probs, self.size)
        _, self.out = self.kernel.semantic_argmax(*given, return_probabilities=3)

    def verify_best_classes(self):
        scores = self._scores()
        return (scores / scores.sum(1, keepdim=True)).topk(3, dim=1).values.float()


class Mask2Former(Benchmark):
    """Training and instances at 1024²."""

    seed = 0
    queries, grid, side = 100, 256, 1024

    def setup_mask_loss(self):
        self.masks = torch.randn(1, self.queries, self.grid, self.grid, device=self.device)
        self.targets = torch.randn(1, 20, self.side, self.side, device=self.device) > 1
        self.matches = torch.full((1, self.queries), -1, device=self.device)
        self.matches[:, :20] = torch.arange(20)

    @torch.no_grad()
    def benchmark_mask_loss(self):
        found = self.kernel.mask_loss(self.masks, self.targets, matches=self.matches)
        self.out = torch.stack([found.bce, found.dice])

    @torch.no_grad()
    def verify_mask_loss(self):
        found = self.kernel.mask_loss_reference(self.masks, self.targets, matches=self.matches)
        return torch.stack([found.bce, found.dice])

    def setup_mask_binarize(self):
        self.masks = torch.randn(1, self.queries, self.grid, self.grid, device=self.device)

    def benchmark_mask_binarize(self):
        self.out = self.kernel.mask_binarize(self.masks, (self.side, self.side)).areas / self.side**2

    def verify_mask_binarize(self):
        masks = F.interpolate(self.masks, (self.side, self.side), mode="bilinear") > 0
        return masks.float().mean((2, 3))
