"""Operators in code that inductor generates: compiled once, all of them in one graph."""

import sys

import pytest
import torch

from segvit_kernels import FusedATM, mask_loss, query_attention, semantic_argmax
from segvit_kernels.testing import mask_loss as losses
from segvit_kernels.testing import semantic_argmax as labels


def case(module, name):
    (found,) = (case for case in module.CASES if case.name == name)
    return found.inputs(torch.float32)


def test_generated_code():
    """Forward and backward; two calls draw two dropouts; lists of tensors and views go in."""
    if sys.platform != "linux":
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    layer = FusedATM(32, 2, attn_drop=0.5)
    tokens, features = torch.randn(1, 5, 32), torch.randn(2, 40, 32)
    query, key = torch.randn(1, 5, 2, 16, requires_grad=True), torch.randn(2, 9, 2, 16)
    pictures = case(labels, "mixed")

    def step(**inputs):
        output, masks = layer(tokens, features)
        attended = query_attention(query, key, key, dropout_p=0.5)
        return output, masks, attended, semantic_argmax(**pictures).long() + 1, mask_loss(**inputs)

    compiled, given, found = torch.compile(step, fullgraph=True), case(losses, "soft_masks"), []

    def run(**inputs):
        """All calls in one form, so that code is generated once."""
        *rest, result = compiled(**inputs)
        (rest[0].sum() + rest[2].sum()).backward(retain_graph=True)
        found.append(rest)
        return result

    expected, expected_grads = losses.with_gradients(mask_loss, given)
    for _ in range(2):
        result, grads = losses.with_gradients(run, given)
        torch.testing.assert_close(losses.stacked(result), losses.stacked(expected))
        torch.testing.assert_close(grads, expected_grads)
    (output, masks, attended, maps), (other, _, other_attended, _) = found
    assert output.shape == (2, 5, 32) and not torch.equal(output, other)
    assert attended.shape == (2, 5, 2, 16) and not torch.equal(attended, other_attended)
    torch.testing.assert_close(masks, layer(tokens, features).mask_logits)
    assert torch.equal(maps, semantic_argmax(**pictures).long() + 1)
    assert layer.v.weight.grad.norm() > 0 and query.grad.norm() > 0
