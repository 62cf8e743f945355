"""The native library itself: found, refused with a reason, on every instruction set, on random inputs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segvit_kernels import (
    _native,
    fused_atm,
    mask_loss,
    mask_matching_cost,
    query_attention,
    semantic_argmax,
    subsample_layer_norm,
)

ROOT = Path(__file__).resolve().parents[1]
REASON = _native.library().reason
built = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")
ON_X86 = os.uname().machine in ("x86_64", "AMD64")


def run(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("SEGVIT_KERNELS_BACKEND", None)
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_without_the_library(tmp_path):
    """Calls run on eager; a request for the backend names the reason: a missing file, or a broken one."""
    script = (
        "import torch, segvit_kernels as k\n"
        "q = torch.randn(1, 2, 1, 16)\n"
        "print(k.fused_atm(q, q, q).output.shape)\n"
        "k.fused_atm(q, q, q, backend='cpu')\n"
    )
    (tmp_path / "broken.so").write_bytes(b"\x7fELF but not really")
    for name, reason in (("missing.so", "there is no such file"), ("broken.so", "does not load into torch")):
        result = run(["-c", script], SEGVIT_KERNELS_LIBRARY=str(tmp_path / name))
        assert result.stdout.strip() == "torch.Size([1, 2, 1, 16])"
        last = result.stderr.strip().splitlines()[-1]
        assert "BackendUnavailableError" in last and reason in last and name in last
        report = run(["-m", "segvit_kernels"], SEGVIT_KERNELS_LIBRARY=str(tmp_path / name))
        assert report.returncode == 0 and f"cpu missing: {_start(reason, tmp_path / name)}" in report.stdout


def _start(reason, path):
    return f"SEGVIT_KERNELS_LIBRARY is {path}" if "file" in reason else str(path)


@built
def test_a_library_built_for_something_else_is_refused(monkeypatch, tmp_path):
    """After `git pull` it would run, and compute something else: other arguments, or other sources."""
    path = _native.library().path
    assert _native._Library(path, "").reason is None
    with monkeypatch.context() as patch:
        patch.setitem(_native.SCHEMAS, "atm_fwd", _native.SCHEMAS["atm_fwd"].replace("scale", "factor"))
        assert f"{path} was built for another version" in _native._Library(path, "").reason
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "segvit_kernels" / "_native.py"))
    assert _native._Library(path, "").reason is None
    with (tmp_path / "csrc" / "cpu" / "attention.h").open("a") as file:
        file.write("\n")
    reason = _native._Library(path, "").reason
    assert "was built from other sources" in reason and "make native" in reason


@built
def test_what_the_report_says():
    report = run(["-m", "segvit_kernels"]).stdout
    assert f"native library: {_native.library().path}" in report
    assert "segvit::atm_fwd              cpu\n" in report and "cpu missing" not in report


@built
def test_double_precision_runs_on_eager_unless_asked_for():
    q = torch.randn(1, 3, 2, 16, dtype=torch.float64)
    assert fused_atm(q, q, q).output.dtype == torch.float64
    with pytest.raises(
        TypeError, match=r"backend 'cpu' takes float32, float16 and bfloat16; query is torch.float64"
    ):
        fused_atm(q, q, q, backend="cpu")


@built
@pytest.mark.skipif(not ON_X86, reason="one instruction set only, this is no x86 processor")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The batteries' first cases on code for lesser processors than this one."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*_native.py"))
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "test_case and cpu", *files]
    result = run(command, SEGVIT_KERNELS_ISA=isa, PYTEST_ADDOPTS="")
    assert result.returncode == 0, result.stdout[-3000:]
    script = "from segvit_kernels import _native; print(_native.library().isa)"
    found = run(["-c", script], SEGVIT_KERNELS_ISA=isa).stdout.strip()
    order = ["portable", "avx2", "avx512", "avx512_bf16", "avx512_fp16"]
    assert order.index(found) == min(order.index(isa), order.index(_native.library().isa))


# Random shapes, strides and dtypes, held against the eager backend in double precision


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
fuzz = settings(
    max_examples=int(os.environ.get("SEGVIT_FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@st.composite
def layouts(draw):
    """How a tensor lies in memory: the order of its axes, gaps between rows, an offset, a stride of 0."""
    return {
        "seed": draw(st.integers(0, 2**31)),
        "swap": draw(st.booleans()),
        "gap": draw(st.integers(0, 3)),
        "last": draw(st.booleans()),
        "broadcast": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.1, 10.0])),
    }


def tensor(layout, shape, dtype, scale=True):
    """Random numbers of a shape in that layout; what lies between them in memory is not a number."""
    generator = torch.Generator().manual_seed(layout["seed"])
    values = torch.randn(shape, generator=generator) * (layout["scale"] if scale else 1)
    memory = list(shape)
    if layout["broadcast"]:
        values = values[:1].expand(shape)
        memory[0] = min(1, shape[0])
    order = list(range(len(shape)))
    if layout["swap"] and len(shape) > 2:
        order[0], order[1] = order[1], order[0]
    if layout["last"]:
        order[-1], order[-2] = order[-2], order[-1]
    sizes = [memory[i] for i in order]
    sizes[-1] += layout["gap"]
    backing = torch.full(sizes, torch.nan, dtype=dtype)
    view = backing[..., : sizes[-1] - layout["gap"]] if layout["gap"] else backing
    view = view.permute([order.index(i) for i in range(len(shape))]).expand(shape)
    if view.numel():
        view[:1].copy_(values[:1]) if layout["broadcast"] else view.copy_(values)
    return view


def agree(function, inputs, gradient_seed, dtype, differentiable):
    """Values and gradients of ``function(backend=..., **inputs)`` on cpu and on eager in float64."""

    def evaluate(backend, cast):
        leaves = {
            n: (cast(t) if t.is_floating_point() else t).detach().requires_grad_(n in differentiable)
            for n, t in inputs.items()
        }
        outputs = [o for o in function(backend=backend, **leaves) if o is not None]
        generator = torch.Generator().manual_seed(gradient_seed)
        used = [o for o in outputs if o.requires_grad]
        weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in used]
        grads = torch.autograd.grad(used, [leaves[n] for n in differentiable], weights) if used else ()
        return [*outputs, *grads]

    found = evaluate("cpu", lambda t: t)
    expected = evaluate("eager", lambda t: t.double())
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        # Where terms of order one cancel, their rounding is left, and that of a half-precision output.
        norm = b.double().norm() + (0.05 if dtype == torch.float32 else 0.5) * b.numel() ** 0.5
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * norm, (
            (a.double() - b.double()).abs().max()
        )


@built
@fuzz
@given(st.data(), DTYPES, st.integers(0, 3), st.integers(1, 70), st.integers(1, 140), st.integers(1, 5))
def test_fuzz_attention(data, dtype, batch, queries, keys, heads):
    dim = data.draw(st.integers(1, 128))
    layout = [data.draw(layouts()) for _ in range(4)]
    for entry in layout[:3]:
        entry["scale"] = min(
            entry["scale"], 1.0
        )  # softmax of large scores amplifies the rounding of half inputs
    query_batch = data.draw(st.sampled_from([1, batch])) if batch else 1
    shapes = {"query": (query_batch, queries), "key": (batch, keys), "value": (batch, keys)}
    inputs = {
        n: tensor(entry, (*s, heads, dim), dtype)
        for (n, s), entry in zip(shapes.items(), layout, strict=False)
    }
    names = tuple(inputs)
    agree(lambda **x: (query_attention(**x),), inputs, 1, dtype, names)
    if data.draw(st.booleans()):
        inputs["previous_masks"] = tensor(layout[3], (batch, queries, keys), dtype)
    agree(fused_atm, inputs, 2, dtype, names)


@built
@fuzz
@given(st.data(), DTYPES, st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 90))
def test_fuzz_subsample_norm(data, dtype, batch, height, width, channels):
    prefix, stride = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    x = tensor(data.draw(layouts()), (batch, prefix + height * width, channels), dtype)
    inputs = {"x": x}
    if data.draw(st.booleans()):
        inputs |= {n: tensor(data.draw(layouts()), (channels, 1), dtype)[:, 0] for n in ("weight", "bias")}
    options = {"grid": (height, width), "stride": stride, "prefix_tokens": prefix, "eps": 1e-3}

    def call(weight=None, bias=None, **rest):
        return subsample_layer_norm(weight=weight, bias=bias, **rest, **options)

    agree(call, inputs, 3, dtype, tuple(inputs))


@built
@fuzz
@given(st.data(), DTYPES, st.integers(0, 3), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40))
def test_fuzz_mask_loss(data, dtype, batch, queries, height, width):
    grids = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
    logits = {f"l{i}": tensor(data.draw(layouts()), (batch, queries, *g), dtype) for i, g in enumerate(grids)}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    kind = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.int64, torch.bool, torch.float32]))
    options = {"focal_gamma": data.draw(st.sampled_from([0.0, 1.0, 2.0, 2.5]))}
    if kind in (torch.bool, torch.float32):
        targets = torch.rand(batch, queries, height, width, generator=generator)
        targets = (targets > 0.6) if kind == torch.bool else targets
        extra = {}
    else:
        targets = torch.randint(0, queries + 1, (batch, height, width), generator=generator)
        targets[targets == queries] = 255
        if kind == torch.int16 and data.draw(st.booleans()):
            targets = targets.transpose(1, 2).contiguous().transpose(1, 2)
        targets = targets.to(kind)
        options["mask_ignored"] = data.draw(st.booleans())
        extra = {"num_classes": queries}

    def call(backend, **entries):
        result = mask_loss(list(entries.values()), targets, reduction="none", backend=backend, **options)
        return [*result.focal, *result.bce, *result.dice]

    agree(call, logits, 4, dtype, tuple(logits))
    first = {"mask_logits": logits["l0"].detach()}
    agree(lambda **x: mask_matching_cost(targets=targets, **extra, **x), first, 5, dtype, ())


@built
@fuzz
@given(st.data(), DTYPES, st.integers(0, 2), st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_fuzz_semantic_argmax(data, dtype, batch, queries, classes, height):
    width = data.draw(st.integers(1, 40))
    grid = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    masks = tensor(data.draw(layouts()), (batch, queries, *grid), dtype)
    sharp = data.draw(st.sampled_from([0.0, 1.0, 8.0]))
    layout = data.draw(layouts())
    layout["scale"] = 1.0
    probs = (tensor(layout, (batch, queries, classes), torch.float32) * sharp).softmax(-1)
    found, score = semantic_argmax(masks, probs, (height, width), return_scores=True, backend="cpu")
    labels = semantic_argmax(masks, probs, (height, width), backend="cpu")
    assert torch.equal(labels, found)
    if not batch:
        return
    upsampled = torch.nn.functional.interpolate(masks.double(), size=(height, width), mode="bilinear")
    scores = torch.einsum("bqc,bqhw->bchw", probs.double(), upsampled.sigmoid())
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    best = scores.amax(1)
    # Half-precision masks are exact numbers too: the budget is that of float32 arithmetic in every dtype.
    assert (best - chosen).max() <= 1e-5 * best.max()
    torch.testing.assert_close(score.double(), best, rtol=1e-5, atol=1e-6)
