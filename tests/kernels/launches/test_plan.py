"""Launchers that remember: a replay does what a call that remembers nothing does, on any tensors of its key.

A compiler that compiles nothing stands in for Triton's JIT: what it gives for a launch is named by all that
the JIT specialises on, so that a plan under a wrong key shows as a wrong kernel.
"""

import ctypes
import gc
import itertools
import random
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.compiler import CompiledKernel

from segvit_kernels.triton import (
    _launch,
    _plan,
    atm,
    mask_binarize,
    mask_iou,
    mask_loss,
    panoptic_argmax,
    query_attention,
    semantic_argmax,
    semantic_topk,
    subsample_norm,
)

ROW = 9  # arguments of CompiledKernel.run before those of the kernel


def specialised(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return ("one",) if value == 1 else (-(2**31) <= value < 2**31, value % 16 == 0)
    return type(value)


def row(launch):
    """What the driver would see, with tensors in place of their addresses."""
    values = {**launch.arguments, **launch.constants}
    values = [values[name] for name in launch.kernel.arg_names]
    kinds = tuple(specialised(v) for v in values)
    function = (launch.kernel.fn.__name__, str(launch.constants), str(launch.options), kinds)
    return [launch.programs, 1, 1, function, *values]


class Compiled(CompiledKernel):
    packed_metadata = None
    module = None

    def __init__(self, function, log):
        self.function, self.log = function, log

    def run(self, programs, y, z, stream, function, *rest):
        self.log.append([programs, y, z, function, *rest[ROW - 5 :]])
        self.log.streams.append(stream)
        self.log.zero.append([_zero(v, 4) for v in rest[ROW - 5 :] if isinstance(v, int) and v > 2**32])


class Log(list):
    def __init__(self):
        super().__init__()
        self.streams, self.zero, self.jit, self.device, self.stream = [], [], 0, 0, 7


def _zero(address, size):
    return not any(ctypes.string_at(address, size))


@pytest.fixture
def log(monkeypatch, poisoned):
    """The JIT, counted, and the driver, which notes what is launched. Memory nobody wrote is not zero."""
    log = Log()

    def jit(launch):
        log.jit += 1
        return Compiled(row(launch)[3], log)

    active = SimpleNamespace(
        get_current_device=lambda: log.device, get_current_stream=lambda device: 10 * device + log.stream
    )
    monkeypatch.setattr(_plan, "_INTERPRETED", False)
    monkeypatch.setattr(_plan, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(_launch.Launch, "__call__", jit)
    _plan.forget()
    yield log
    _plan.forget()


def flat(args):
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]


def labelled(rows, inputs, results, pointers):
    """Rows with addresses as (which tensor, offset); scratch memory by order of appearance."""
    known = [(("input", i), t) for i, t in enumerate(inputs)] + [
        (("result", i), t) for i, t in enumerate(results)
    ]
    scratch = {}

    def label(address):
        for name, t in known:
            if t.data_ptr() <= address < t.data_ptr() + max(1, t.untyped_storage().nbytes()):
                return *name, address - t.data_ptr()
        return "scratch", scratch.setdefault(address, len(scratch))

    named = [
        [label(v) if i in places else v for i, v in enumerate(r)]
        for r, places in zip(rows, pointers, strict=True)
    ]
    return named, scratch


def assert_replays(launcher, args, log, poisoned=True):
    """The launcher, which has a plan, against its builder on the same arguments."""
    results, launches = launcher.__wrapped__(*args)
    expected = [row(launch) for launch in launches]
    pointers = [{i for i, v in enumerate(r) if isinstance(v, torch.Tensor)} for r in expected]
    tensors = {v.data_ptr(): v for r in expected for v in r if isinstance(v, torch.Tensor)}
    expected = [[v.data_ptr() if isinstance(v, torch.Tensor) else v for v in r] for r in expected]
    fresh, fresh_scratch = labelled(expected, flat(args), results, pointers)

    log.clear()
    count = log.jit
    log.zero.clear()
    found = launcher(*args)
    assert log.jit == count, "not a replay"
    assert type(found) is type(results) and len(found) == len(results)
    for a, b in zip(found, results, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert not poisoned or bool((a == 0).all()) == bool((b == 0).all())
    replayed, scratch = labelled(log, flat(args), found, pointers)
    assert replayed == fresh
    zeros = [[_zero(v, 4) for v in r[4:] if isinstance(v, int) and v > 2**32] for r in expected]
    assert not poisoned or log.zero == zeros
    spans = sorted(
        (a, a + tensors[b].numel() * tensors[b].element_size())
        for a, b in zip(scratch, fresh_scratch, strict=True)
    )
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), "scratch overlaps"


def tensor(draw, *shape, dtype=torch.bfloat16):
    """A tensor of this shape: contiguous, with gaps between rows, beginning anywhere, or axes swapped."""
    kind = draw.choice(["plain", "plain", "gap", "offset", "swapped"])
    if kind == "plain" or len(shape) < 3:
        return torch.ones(shape, dtype=dtype)
    if kind == "gap":
        return torch.ones(*shape[:-2], shape[-2] + draw.choice([1, 8]), shape[-1], dtype=dtype)[
            ..., : shape[-2], :
        ]
    if kind == "offset":
        size, first = torch.Size(shape).numel(), draw.choice([1, 4, 8])
        return torch.ones(size + first, dtype=dtype)[first:].view(shape)
    return torch.ones(shape[0], *reversed(shape[1:-1]), shape[-1], dtype=dtype).transpose(1, -2)


def attention(draw, masks):
    batch, heads, dim = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice([16, 20])
    queries, keys = draw.choice([1, 17, 200]), draw.choice([16, 300])
    shared = draw.choice([1, batch])
    dtype = draw.choice([torch.bfloat16, torch.float32])
    query = tensor(draw, shared, queries, heads, dim, dtype=dtype)
    key, value = (tensor(draw, batch, keys, heads, dim, dtype=dtype) for _ in range(2))
    seed = draw.choice([None, torch.ones(1, dtype=torch.int64)])
    numbers = (seed, draw.choice([0.25, -1.0, 0.0]), 0.1 if seed is not None else 0.0)
    grad = tensor(draw, batch, queries, heads, dim, dtype=dtype)
    output, lse = torch.ones_like(grad), torch.ones(batch, heads, queries)
    deterministic = draw.choice([True, False])
    padding = draw.choice(
        [None, torch.zeros(batch, keys, dtype=torch.bool), torch.zeros(keys, batch).bool().T]
    )
    if not masks:
        backward = (grad, query, key, value, output, lse, *numbers, deterministic, padding)
        return [
            (query_attention.query_attention_fwd, (query, key, value, *numbers, padding)),
            (query_attention.query_attention_bwd, backward),
        ]
    previous = draw.choice([None, tensor(draw, batch, queries, keys, dtype=dtype)])
    grad_masks = draw.choice([None, tensor(draw, batch, queries, keys, dtype=dtype)])
    backward = (grad, grad_masks, query, key, value, output, lse, *numbers, deterministic, padding)
    need_masks = draw.choice([True, previous is not None])
    return [
        (atm.atm_fwd, (query, key, value, previous, *numbers, need_masks, padding)),
        (atm.atm_bwd, backward),
    ]


def losses(draw):
    batch, queries, count = draw.choice([1, 2]), 5, draw.choice([1, 3, 5])
    logits = [tensor(draw, batch, queries, 6, 8) for _ in range(count)]
    logits = draw.choice([list, tuple])(logits)
    labels = draw.choice([True, False])
    targets = torch.ones(batch, 24, 32, dtype=draw.choice([torch.uint8, torch.int64]))
    if not labels:
        targets = draw.choice([torch.ones(batch, 4, 24, 32), torch.ones(batch, 4, 24, 32, dtype=torch.bool)])
    matches = None if labels else torch.zeros(batch, queries, dtype=torch.int64)
    numbers = (queries if labels else 4, 0.25, draw.choice([2.0, 1.5]))
    sums, areas = torch.ones(count, batch, queries, 4), torch.ones(batch, numbers[0])
    return [
        (mask_loss.mask_loss_fwd, (logits, targets, matches, *numbers, labels)),
        (mask_loss.mask_loss_bwd, (sums, logits, targets, matches, areas, *numbers, labels)),
        (mask_loss.mask_matching_sums, (logits[0], targets, *numbers)),
    ]


def argmax(draw):
    batch, classes = draw.choice([1, 2]), draw.choice([21, 300])
    masks = [tensor(draw, batch, 37, 4, 6)]
    probs = tensor(draw, batch, 37, classes)
    options = (batch, 16, 24, [1.0, 1.0], True, draw.choice([True, False]), 0.0)
    return [(semantic_argmax.semantic_argmax, (masks, probs, [], *options))]


def topk(draw):
    ((_, arguments),) = argmax(draw)
    *given, _, prune = arguments
    return [(semantic_topk.semantic_topk, (*given, draw.choice([1, 3]), prune))]


def overlaps(draw):
    a, b = tensor(draw, 2, 5, 4, 6), draw.choice([tensor(draw, 2, 3, 4, 6), torch.ones(2, 3, 8, 9).bool()])
    options = (draw.choice([True, False]), draw.choice([0.0, 0.25]))
    return [(mask_iou.mask_iou, (a, b, 8, 9, *options))]


def panoptic(draw):
    masks, scores = tensor(draw, 2, 37, 4, 6), tensor(draw, 2, 37)
    resized = draw.choice([(4, 6), (8, 8)])
    first = draw.choice([True, False])
    options = (first, not first, draw.choice([0.5, 0.25]), draw.choice([True, False]))
    return [(panoptic_argmax.panoptic_argmax, (masks, scores, 16, 24, *resized, *resized, *options))]


def binaries(draw):
    logits = tensor(draw, draw.choice([1, 2]), 5, 4, 6)
    boxes = draw.choice([None, torch.ones(*logits.shape[:2], 4)])
    return [
        (
            mask_binarize.mask_binarize,
            (logits, boxes, 16, 24, draw.choice([0.0, 0.5]), draw.choice([0, 1, 2])),
        )
    ]


def norms(draw):
    batch, channels, place = draw.choice([1, 2]), draw.choice([33, 64]), (3, 4, 2, 1)
    x = tensor(draw, batch, 13, channels)
    weight = draw.choice([None, torch.ones(channels)])
    grads = [draw.choice([None, tensor(draw, batch, n, channels)]) for n in (13, 5, 5)]
    statistics = (torch.ones(batch, 13), torch.ones(batch, 13))
    return [
        (subsample_norm.subsample_norm_fwd, (x, weight, weight, *place, 1e-6, torch.bfloat16)),
        (subsample_norm.subsample_norm_bwd, (*grads, x, weight, *statistics, *place)),
    ]


def again(args):
    """Other tensors of the same key, elsewhere."""

    def other(value):
        if isinstance(value, (list, tuple)):
            return type(value)(other(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        shift = value.data_ptr() % 16 // value.element_size()
        size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        return torch.ones(size + shift, dtype=value.dtype)[shift:].as_strided(
            value.shape, value.stride(), shift
        )

    return tuple(other(a) for a in args)


DRAWN = {
    "atm": lambda draw: attention(draw, True),
    "query_attention": lambda draw: attention(draw, False),
    "mask_binarize": binaries,
    "mask_loss": losses,
    "semantic_argmax": argmax,
    "semantic_topk": topk,
    "panoptic_argmax": panoptic,
    "mask_iou": overlaps,
    "subsample_norm": norms,
}


@pytest.mark.parametrize("operator", DRAWN)
def test_a_replay_is_what_a_fresh_call_does(operator, log):
    """Plans of all draws are kept while others are drawn: a key that says too little would be found."""
    draw, planned = random.Random(3), 0
    for _ in range(40):
        for launcher, args in DRAWN[operator](draw):
            launcher(*args)
            key = _plan._key(args, 0)[0]
            plans = next(p for p in _plan._all_plans if key in p)
            if plans[key] is not None:
                planned += 1
                assert_replays(launcher, args, log)
                assert_replays(launcher, again(args), log)
    assert planned > 20 * len(DRAWN[operator](draw))


def qkv(dtype=torch.bfloat16, first=0):
    return [torch.ones(2 * 5 * 2 * 16 + first, dtype=dtype)[first:].view(2, 5, 2, 16) for _ in range(3)]


def call(q, k, v, scale=0.25):
    return atm.atm_fwd(q, k, v, None, None, scale, 0.0, True)


def check(log, q, k, v):
    assert_replays(atm.atm_fwd, (q, k, v, None, None, 0.25, 0.0, True), log)


def test_alignment_is_part_of_the_key(log, monkeypatch):
    call(*qkv())
    with pytest.raises(AssertionError, match="not a replay"):
        check(log, *qkv(first=1))
    monkeypatch.setattr(_plan, "_ALIGNMENT", 1)  # the planted bug
    _plan.forget()
    call(*qkv())
    with pytest.raises(AssertionError, match="_atm_fwd_kernel"):
        check(log, *qkv(first=1))


def test_one_tensor_for_two_arguments(log):
    q, k, v = qkv()
    call(q, k, k)
    check(log, q, k, v)
    check(log, *qkv())


def test_results_are_made_anew(log):
    q, k, v = qkv()
    found = [call(q, k, v) for _ in range(3)]
    assert len({r.data_ptr() for results in found for r in results}) == 9


def test_a_plan_keeps_no_tensor(log):
    import weakref

    q, k, v = qkv()
    kept = [weakref.ref(t) for t in (q, k, v, *call(q, k, v))]
    del q, k, v
    log.clear()
    assert [r() for r in kept] == [None] * 6


def test_a_plan_keeps_no_copy_either(log):
    call(*qkv(), scale=-1.0)  # queries are negated
    gc.collect()
    assert not [made for made in gc.get_objects() if type(made) is _plan._Made]
    assert_replays(atm.atm_fwd, (*qkv(), None, None, -1.0, 0.0, True), log)


def test_device_and_stream_are_those_of_the_call(log):
    q, k, v = qkv()
    call(q, k, v)
    assert log.jit == 1
    log.device = 1
    call(q, k, v)
    assert log.jit == 2
    log.stream = 3
    call(q, k, v)
    log.device = 0
    call(q, k, v)
    assert log.jit == 2 and log.streams == [13, 3]


def test_whoever_watches_sees_every_launch(log, monkeypatch):
    q, k, v = qkv()
    call(q, k, v)
    call(q, k, v)
    assert log.jit == 1
    hook = lambda *_: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call(q, k, v)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert log.jit == 2
    call(q, k, v)
    assert log.jit == 2
    monkeypatch.setattr(knobs.runtime, "debug", True)
    call(q, k, v)
    assert log.jit == 3


def test_other_launch_parameters_are_not_remembered(log):
    q, k, v = qkv()
    for _ in range(2):
        atm.atm_fwd(q, k, v, None, None, 0.25, 0.0, True, config={"block_m": 16})
    assert log.jit == 2
    call(q, k, v)
    assert log.jit == 3


def test_the_oldest_plan_goes(log, monkeypatch):
    monkeypatch.setattr(_plan, "MOST", 2)
    q, k, v = qkv()
    for scale in (1.0, 2.0, 3.0, 1.0):
        call(q, k, v, scale)
    assert log.jit == 4
    call(q, k, v, 3.0)
    assert log.jit == 4


def test_without_deterministic_algorithms(log):
    """Memory comes another way, and a plan made with them is another one."""
    q, k, v = qkv()
    call(q, k, v)
    torch.use_deterministic_algorithms(False)
    call(q, k, v)
    assert log.jit == 2
    assert_replays(atm.atm_fwd, (q, k, v, None, None, 0.25, 0.0, True), log, poisoned=False)


def test_what_cannot_be_repeated_is_not(log):
    @_plan.planned
    def writes(x):
        x.add_(1)
        return (x.new_empty(3),), []

    x = torch.zeros(2)
    for _ in range(3):
        writes(x)
    assert x.tolist() == [3.0, 3.0]
    _plan._all_plans.pop()


def test_the_interpreter_remembers_nothing(monkeypatch):
    _plan.forget()
    monkeypatch.setattr(_launch.Launch, "__call__", lambda launch: None)
    call(*qkv())
    assert not any(_plan._all_plans)


def test_threads(log):
    """Each thread's launches have its own tensors, whoever made the plan."""
    errors = []
    seen = threading.local()
    run = Compiled.run

    def noted(self, programs, y, z, stream, function, *rest):
        seen.rows.append(rest)

    interval = sys.getswitchinterval()

    def work(size):
        try:
            for i in range(60):
                q, k, v = (torch.ones(1, 1 + (i + size) % 3, 2, 16) for _ in range(3))
                seen.rows = []
                output = call(q, k, v)[0]
                for rest in seen.rows:
                    assert {q.data_ptr(), k.data_ptr(), v.data_ptr(), output.data_ptr()} <= set(rest)
        except Exception as error:
            errors.append(error)

    Compiled.run = noted
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        Compiled.run = run
        sys.setswitchinterval(interval)
    assert errors == []
