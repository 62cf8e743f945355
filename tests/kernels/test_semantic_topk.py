"""semantic_topk, which is ``semantic_argmax(..., return_probabilities=k)``: the battery of every backend."""

import math

import pytest
import torch
from backends import HALVES, assert_threads_change_nothing, each_backend, each_dtype
from test_semantic_argmax import BY_NAME, few_tiles, named, normal, stacks  # noqa: F401

from segvit_kernels import BackendUnavailableError, record_backends
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax
from segvit_kernels.ops.semantic_topk import MOST
from segvit_kernels.testing.semantic_argmax import SemanticCase, assert_best_classes, oracle

NATIVE = ("eager", "cpu")


def run(inputs, backend, k, *, activation="sigmoid", prune=0.0):
    masks, probs, views = stacks(inputs["mask_logits"]), inputs["class_probs"], inputs.get("views")
    shape = (views.batch if views else len(probs), *inputs["size"])
    arguments = (views.tensors if views else [], *shape, views.reach if views else [])
    return backend.op("semantic_topk")(masks, probs, *arguments, activation == "sigmoid", k, prune)


def check(name, inputs, backend, k, **options):
    """Classes and probabilities within the error budget; returns them."""
    given = stacks(inputs["mask_logits"])[0].dtype
    computed = torch.float64 if given == torch.float64 else torch.float32
    if given in HALVES and backend.name == "triton":
        computed = torch.float16
    truth, ordinary = oracle(inputs, **options), oracle(inputs, computed, **options)
    classes, shares = run(inputs, backend, k, **options)
    differ = assert_best_classes(name, (classes, shares.to(computed)), truth, ordinary)
    assert shares.dtype == (torch.float64 if computed == torch.float64 else torch.float32)
    assert differ <= (0 if computed == torch.float64 else 0.02 * classes.numel() + 1), (
        f"{name}: {differ} differ"
    )
    return classes, shares


@each_dtype(*NATIVE, "triton-gpu")
@named()
def test_case(case, backend, dtype, poisoned):
    concentrated = dtype == torch.float32
    inputs = case.inputs(dtype, backend.device, concentrated=concentrated)
    for k in {1, min(3, case.classes), case.classes if backend.id != "triton-gpu" else 1}:
        classes, shares = check(case.name, inputs, backend, k)
        assert (shares[:, 1:] <= shares[:, :-1]).all()
    if k == case.classes:
        torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[:, 0]), rtol=0, atol=1e-5)
        assert torch.equal(classes.long().sort(1).values, torch.arange(k).view(-1, 1, 1).expand_as(classes))


@each_dtype("triton")
@pytest.mark.parametrize("name, k", [("one_cell", 8), ("mixed", 3), ("classes_300", 2)])
def test_case_in_triton(name, k, backend, dtype, poisoned):
    """One turn of classes and several, with views and without."""
    check(name, BY_NAME[name].inputs(dtype), backend, k)


@each_backend(*NATIVE)
@pytest.mark.parametrize("name, k", [("classes_171", 2), ("mixed", 7)])
def test_no_activation_and_prune(name, k, backend, poisoned):
    inputs = BY_NAME[name].inputs(torch.float32, concentrated=True)
    check(name, inputs, backend, k, prune=0.3)
    masks = [mask.sigmoid() for mask in stacks(inputs["mask_logits"])]
    check(name, {**inputs, "mask_logits": masks}, backend, k, activation="none")


@each_backend(*NATIVE)
@pytest.mark.parametrize("queries, classes, k", [(1030, 7, 7), (3, 2050, 5), (9, 1100, 1100)])
def test_large_numbers(queries, classes, k, backend, poisoned):
    """More queries or classes than are held at a time, and as many places as classes."""
    case = SemanticCase("large", ((1, 3, 4),), queries, classes, (6, 21))
    check(case.name, case.inputs(torch.float32), backend, k)


@each_backend("eager", "cpu", "triton")
def test_ties_go_to_lower_classes(backend, poisoned):
    """Between the classes of one turn and of several, and of those that fall out of the best."""
    probs = torch.full((1, 2, 300), 0.25, device=backend.device)
    probs[..., 280] = 0.75
    for best in ((150, 299), (200, 5)):
        probs[..., list(best)] = 0.5
    masks = torch.zeros(1, 2, 2, 2, device=backend.device)
    classes, shares = run({"mask_logits": masks, "class_probs": probs, "size": (3, 4)}, backend, 4)
    assert (classes == torch.tensor([280, 5, 150, 200]).view(1, 4, 1, 1)).all()
    total = 0.75 + 4 * 0.5 + 295 * 0.25
    exact = torch.tensor([0.75, 0.5, 0.5, 0.5]).view(1, 4, 1, 1).expand_as(shares) / total
    torch.testing.assert_close(shares.cpu(), exact, rtol=1e-6, atol=0)


@each_backend("eager", "cpu", "triton")
def test_no_evidence_is_shared_by_all(backend, poisoned):
    probs, masks = torch.zeros(1, 3, 5), normal(backend, 1, 3, 2, 2)
    classes, shares = run({"mask_logits": masks, "class_probs": probs, "size": (3, 4)}, backend, 3)
    assert (classes == torch.arange(3).view(1, 3, 1, 1)).all() and (shares == 0.2).all()


@each_backend("eager", "cpu", "triton")
@named("odd")
def test_not_a_number_gives_some_class(case, backend, poisoned):
    inputs = [case.inputs(torch.float32) for _ in range(2)]
    for masks in stacks(inputs[0]["mask_logits"]):
        masks[:, ::3, ::2] = math.nan
    inputs[1]["class_probs"][:, 3] = math.nan
    for one in inputs[: 1 if backend.name == "triton" else 2]:
        classes, shares = run(one, backend, 3)
        assert int(classes.min()) >= 0 and int(classes.max()) < case.classes
        assert shares.isfinite().all()


@each_backend(*NATIVE)
@named("odd", "classes_171", "mixed")
def test_the_first_is_the_label(case, backend, poisoned):
    """And its probability the score that the argmax gives, as a share."""
    inputs = case.inputs(torch.float32, concentrated=True)
    labels, scores = semantic_argmax(**inputs, return_scores=True, backend=backend.name)
    classes, shares = semantic_argmax(**inputs, return_probabilities=1, backend=backend.name)
    assert torch.equal(classes[:, 0], labels)
    torch.testing.assert_close(shares[:, 0], scores / oracle(inputs).sum(1).float(), rtol=1e-5, atol=0)


@each_backend("cpu")
@named("classes_171", "mixed")
def test_threads_change_nothing(case, backend):
    inputs = case.inputs(torch.float32)
    assert_threads_change_nothing(lambda: dict(enumerate(run(inputs, backend, 3))))


@each_dtype(*NATIVE, dtypes=(torch.float32, torch.bfloat16))
@named("odd", "mixed")
def test_layouts_give_the_same_and_inputs_are_not_changed(case, backend, dtype):
    inputs = case.inputs(dtype)
    masks, probs = stacks(inputs["mask_logits"]), inputs["class_probs"]
    function = {
        "views": inputs["views"],
        "size": case.size,
        "backend": backend.name,
        "return_probabilities": 3,
    }
    odd = [m.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for m in masks]
    turned = probs.transpose(1, 2).contiguous().transpose(1, 2)
    before = [t.clone() for t in (*odd, turned)]
    expected = semantic_argmax(masks, probs, **function)
    assert all(map(torch.equal, semantic_argmax(odd, turned, **function), expected))
    assert all(map(torch.equal, (*odd, turned), before))


@each_backend("eager", "cpu", "triton")
def test_empty_batch(backend):
    masks, probs = torch.empty(0, 5, 4, 4), torch.empty(0, 5, 300)
    classes, shares = run({"mask_logits": masks, "class_probs": probs, "size": (8, 9)}, backend, 3)
    assert classes.shape == shares.shape == (0, 3, 8, 9) and classes.dtype == torch.int16


@each_backend(*NATIVE)
@pytest.mark.parametrize("several", [False, True], ids=["plain", "views"])
def test_a_diagonal_is_its_matrix(several, backend, poisoned):
    masks, diagonal = (
        normal(backend, 2, 6, 3, 4),
        torch.rand(2, 6, generator=torch.Generator().manual_seed(0)),
    )
    views = Views([View.whole(0, (3, 4), (9, 10), g) for g in (0, 1)], 1, (9, 10)) if several else None
    given = {
        "size": (9, 10),
        "views": views,
        "return_probabilities": 3,
        "backend": backend.name,
        "prune": 0.3,
    }
    found, matrix = (semantic_argmax(masks, p, **given) for p in (diagonal, torch.diag_embed(diagonal)))
    assert torch.equal(found[0], matrix[0])
    torch.testing.assert_close(found[1], matrix[1], rtol=1e-6, atol=1e-7)


def test_no_gradient():
    masks = torch.randn(1, 3, 4, 4, requires_grad=True)
    probs = torch.rand(1, 3, 5, requires_grad=True)
    assert not semantic_argmax(masks, probs, (8, 8), return_probabilities=2)[1].requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"return_probabilities": -1}, ValueError, "return_probabilities is -1; expected 0 to 5, the number"),
        (
            {"return_probabilities": 6},
            ValueError,
            "return_probabilities is 6; expected 0 to 5, the number of",
        ),
        ({"return_probabilities": 1.0}, TypeError, r"return_probabilities is 1\.0; expected a whole number"),
        ({"return_probabilities": True}, TypeError, "return_probabilities is True; expected a whole number"),
        (
            {"return_probabilities": 2, "return_scores": True},
            ValueError,
            "return_scores is True; expected False",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        semantic_argmax(torch.randn(1, 3, 4, 4), torch.rand(1, 3, 5), (8, 8), **options)


def test_what_has_no_kernel_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = (torch.randn(1, 3, 4, 4), torch.rand(1, 3, 12), (8, 8))
    with pytest.raises(ValueError, match=f"'triton' gives at most {MOST} classes; return_probabilities is 9"):
        semantic_argmax(*given, return_probabilities=9, backend="triton")
    with pytest.raises(BackendUnavailableError, match="semantic_topk has no kernel for it"):
        semantic_argmax(*given, return_probabilities=2, backend="cuda")
    with pytest.raises(TypeError, match="mask_logits is float64"):
        semantic_argmax(given[0].double(), *given[1:], return_probabilities=2, backend="cpu")
    with record_backends() as taken:
        semantic_argmax(given[0].double(), *given[1:], return_probabilities=2)
    assert taken == {"semantic_topk": {"eager"}}


@each_backend(*NATIVE)
@named("odd", "mixed")
def test_opcheck(case, backend):
    inputs = case.inputs(torch.float32)
    masks, views = stacks(inputs["mask_logits"]), inputs["views"]
    batch = views.batch if views else len(masks[0])
    more = (views.tensors if views else [], batch, *case.size, views.reach if views else [], True, 3, 0.0)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.segvit.semantic_topk.default
    arguments = (masks, inputs["class_probs"], *more)
    torch.library.opcheck(op, arguments, {"backend": backend.name}, test_utils=utils)


def test_windows_share_the_probability_of_their_mean():
    """Two views of one pixel: the share is of the mean of scores, not the mean of shares."""
    views = Views([View.whole(0, (1, 1), (1, 1), group) for group in (0, 0)], 1, (1, 1))
    masks = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).view(2, 1, 2)
    classes, shares = semantic_argmax(
        masks, probs, (1, 1), views=views, activation="none", return_probabilities=2
    )
    assert classes.flatten().tolist() == [0, 1]
    torch.testing.assert_close(shares.flatten(), torch.tensor([1.0, 0.5]) / 1.5)


@pytest.mark.parametrize("classes", [150, 192, 300, 847])
def test_triton_sorts_no_more_classes_at_once_than_registers_hold(classes):
    kernels = pytest.importorskip("segvit_kernels.triton.semantic_topk")
    masks = torch.empty(4, 300, 40, 40, dtype=torch.bfloat16, device="meta")
    probs = torch.empty(4, 300, classes, dtype=torch.bfloat16, device="meta")
    config = kernels.found_config(masks, probs, [], 4, 640, 640, [], "sm_90")
    assert sum(config["parts"]) <= 192 and sum(config["parts"]) * config["turns"] >= classes
    assert (config["turns"] == 1) == (classes <= 192)
