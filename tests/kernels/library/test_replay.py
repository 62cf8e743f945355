"""Calls of operators written down and repeated: bit by bit the function's results, or the function itself."""

import copy
import functools
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import (
    FusedATM,
    Replay,
    backend,
    pack_linears,
    record_backends,
    requested_backend,
    why_not,
)
from segvit_kernels._library import Operator


class Network(nn.Module):
    """Layers of ours and of PyTorch's; results of several tensors, lists of tensors, views, in place."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.atm = nn.LayerNorm(32), nn.Linear(32, 32), FusedATM(32, 4)
        self.tokens, self.calls = nn.Parameter(torch.randn(5, 32)), 0
        self.eval().requires_grad_(False)
        pack_linears(self)

    def forward(self, features):
        self.calls += 1
        features = F.gelu(self.first(self.norm(features))).mul_(2)
        left, right = features.split([16, 16], dim=-1)
        features = torch.cat([right, left.sigmoid()], dim=-1)
        tokens, masks = self.atm(self.tokens.expand(len(features), -1, -1), features)
        return masks + tokens.mean(-1, keepdim=True) * 0.5


def inputs(seed, shape=(2, 12, 32)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ready(function, shape=(2, 12, 32)):
    replay = Replay(function)
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(replay(inputs(seed, shape)), function(inputs(seed, shape)))
    return replay


@torch.no_grad()
def test_the_fourth_call_is_a_repetition():
    network = Network()
    replay, calls = ready(network), network.calls
    assert replay.repeats
    found = replay(inputs(3))
    assert network.calls == calls, "the function was called"
    assert torch.equal(found, network(inputs(3)))
    assert not torch.equal(found, network(inputs(4)))
    found.zero_()
    assert torch.equal(replay(inputs(3)), network(inputs(3))), "the result was not the caller's own"
    copied = copy.deepcopy(replay)
    assert not copied.repeats and torch.equal(copied(inputs(3)), network(inputs(3)))
    network.first.bias.add_(1)
    assert torch.equal(replay(inputs(3)), network(inputs(3))), "a weight changed in place"


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_kernels_are_called_without_choosing_them(monkeypatch, name):
    """Backends are chosen when the calls are written down; eager ones become PyTorch's operators."""
    if reason := why_not(name, "cpu"):
        pytest.skip(reason)
    monkeypatch.setenv("SEGVIT_KERNELS_BACKEND", name)
    network = Network()
    replay, expected = ready(network), network(inputs(3))
    monkeypatch.setattr(Operator, "select", lambda *_: pytest.fail("a backend was chosen"))
    assert replay.repeats and torch.equal(replay(inputs(3)), expected)


def cases():
    other = inputs(9, (3, 12, 32))
    yield "another shape", torch.no_grad, other
    yield "another dtype", torch.no_grad, inputs(9).double()
    yield "another layout", torch.no_grad, inputs(9).transpose(0, 1).contiguous().transpose(0, 1)
    yield "gradients", torch.enable_grad, inputs(9)
    yield "a backend", lambda: backend("eager" if requested_backend() is None else "cpu"), inputs(9)
    yield "recording", record_backends, inputs(9)
    yield "autocast", lambda: torch.autocast("cpu", torch.bfloat16), inputs(9)
    yield "a mode", lambda: FlopCounterMode(display=False), inputs(9)
    yield "negative to be", torch.no_grad, torch._neg_view(inputs(9))


@torch.no_grad()
@pytest.mark.parametrize(("around", "features"), [pytest.param(*rest, id=name) for name, *rest in cases()])
def test_calls_that_are_the_functions_own(around, features):
    calls = []

    def function(features):
        calls.append(1)
        return features.sin() + 1

    replay = ready(function)
    before = len(calls)
    with around():
        found = replay(features)
    assert torch.equal(found, features.sin() + 1) and len(calls) == before + 1
    assert torch.equal(replay(inputs(3)), inputs(3).sin() + 1) and len(calls) == before + 1


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x * x.max().item(), id="a number of a tensor"),
        pytest.param(lambda x: x * torch.from_numpy(x.numpy() + 1), id="out of PyTorch and back"),
        pytest.param(lambda x: x + 1 if x.sum() > 0 else x - 1, id="a choice by numbers"),
        pytest.param(lambda x: x, id="nothing"),
        pytest.param(lambda x: [x + 1][0] if x.ndim else None, id="sound"),
    ],
)
def test_a_function_that_depends_on_more_than_shapes_is_called(function, request):
    replay = Replay(function)
    for seed in range(6):
        assert torch.equal(replay(inputs(seed)), function(inputs(seed)))
    assert replay.repeats == ("sound" in request.node.name)


@torch.no_grad()
def test_random_numbers_are_drawn_anew():
    replay = Replay(lambda x: F.dropout(x, training=True))
    found = [replay(inputs(0)) for _ in range(6)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(found))


@torch.no_grad()
def test_errors_are_the_functions():
    replay = Replay(lambda x: x @ torch.ones(7))
    for _ in range(5):
        with pytest.raises(RuntimeError, match=r"size mismatch|shape"):
            replay(inputs(0))


@torch.no_grad()
def test_values_live_until_their_last_use():
    """Of a chain there are two links at a time, also while the calls are written down."""
    made, most = [], []

    def link(x):
        made.append(weakref.ref(out := x + 1))
        most.append(sum(one() is not None for one in made))
        return out

    with torch.library._scoped_library("replayed", "FRAGMENT") as library:
        library.define("link(Tensor x) -> Tensor")
        library.impl("link", link, "CPU")
        replay = ready(
            lambda x: functools.reduce(lambda value, _: torch.ops.replayed.link(value), range(6), x)
        )
        assert replay.repeats
        replay(inputs(3))
    assert most and max(most) <= 3, "in the third call there is the other result"
    assert max(most[-6:]) <= 2


def test_threads_share_it():
    network, failed = Network(), []
    replay = Replay(network)

    def work(first):
        with torch.no_grad():
            for seed in range(first, first + 20):
                if not torch.equal(replay(inputs(seed)), network(inputs(seed))):
                    failed.append(seed)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and replay.repeats
