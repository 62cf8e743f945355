"""The inference engine: the labels of `predict`, constants for one size, no synchronisation, CUDA graphs."""

import contextlib
import copy
import functools
import itertools
import sys
import threading
import types

import pytest
import torch
from samples import assert_same_up_to_ties, pictures, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segvit import InferenceOptions
from segvit.inference import engine as engine_module
from segvit_kernels import backend, why_not

pytestmark = pytest.mark.usefixtures("float32_engines")

SIZES = ((32, 32), (37, 50), (64, 40))
KINDS = ("plain", "shrunk", "linear")


def logits(engine, images):
    """What the engine's network predicts just before label maps are made of it."""
    seen = []
    network = engine.function.network
    network.labels = lambda outputs, *rest: (
        seen.extend(outputs) or type(network).labels(network, outputs, *rest)
    )
    try:
        engine(images)
    finally:
        del network.labels
    return seen


# The labels of predict


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models(kind, size):
    """In float64, padding and a position grid of another size included."""
    model, images = tiny_model(kind).double(), pictures(size)
    expected = model(model.pad_to_patches(model.preprocess(images)))
    (found,) = logits(model.compile_for_inference(size, 2), images)
    if kind == "linear":
        expected, found = [expected], [found]
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_predict_up_to_ties(kind, size):
    model = tiny_model(kind)
    engine = model.compile_for_inference(size, 2, dtype=torch.float32)
    for seed in range(2):
        images = pictures(size, seed=seed)
        labels = engine(images)
        assert (labels == model.predict(images)).float().mean() > 0.995
        assert torch.equal(engine(images.to(memory_format=torch.channels_last)), labels)
    assert_same_up_to_ties(labels, model, images)


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("key_positions", [True, False])
def test_shrunk_queries_are_folded_on_the_grid_of_the_size(resize, key_positions):
    model = tiny_model("shrunk", resize_queries=resize, key_positions=key_positions)
    engine = model.compile_for_inference((64, 40))
    upsample, calls = engine.function.network.decoder.upsample, []
    upsample.stages[0].layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    images = pictures((64, 40), 1)
    assert (engine(images) == model.predict(images)).float().mean() > 0.995
    assert not calls, "the first self-attention still runs"
    assert upsample.grid == ((8, 5) if resize else (4, 4))


@pytest.mark.parametrize(
    "options",
    [
        InferenceOptions(window=32, stride=16),
        InferenceOptions(window=32, flip=True),
        InferenceOptions(scales=[0.75, 1.5], flip=True),
        InferenceOptions(short_side=48),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "shrunk"])
def test_windows_and_scales(kind, options):
    model, images = tiny_model(kind).double(), pictures((37, 50))
    labels = model.compile_for_inference((37, 50), 2, options=options)(images)
    expected = model.predict(images, options)
    assert (labels == expected).float().mean() > 0.999
    assert (expected != model.predict(images)).float().mean() > 0.01


def test_many_classes_take_int16():
    model = tiny_model("linear", num_classes=300)
    labels = model.compile_for_inference(32)(pictures((32, 32), 1))
    assert labels.dtype == torch.int16 and labels.max() > 255


def test_precision(monkeypatch):
    model, images = tiny_model(), pictures((37, 50))
    half = model.compile_for_inference((37, 50), 2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.function.parameters()} == {torch.bfloat16}
    assert (half(images) == model.predict(images)).float().mean() > 0.9
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    for amx, dots, expected in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx})
        monkeypatch.setattr(engine_module, "runs_isa", lambda isa, dots=dots: dots and isa == "avx512_bf16")
        assert model.compile_for_inference(32).dtype == expected
        with backend("eager"):
            assert model.compile_for_inference(32).dtype == (torch.bfloat16 if amx else torch.float32)
    assert tiny_model().double().compile_for_inference(32).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_autocast_around_a_call_changes_nothing(dtype):
    """Nor where the engine is made."""
    model, images = tiny_model(), pictures((37, 50))
    engine = model.compile_for_inference((37, 50), 2, dtype=dtype)
    expected = engine(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(engine(images), expected)
        made = model.compile_for_inference((37, 50), 2, dtype=dtype)
    assert torch.equal(made(images), expected)


def test_a_converted_function_is_one_of_that_precision():
    images = pictures((37, 50))
    expected = tiny_model().compile_for_inference((37, 50), 2, dtype=torch.bfloat16).function(images)
    function = tiny_model().compile_for_inference((37, 50), 2).function.to(torch.bfloat16)
    assert len(expected.unique()) > 1 and (function(images) == expected).float().mean() > 0.95
    assert not any(value.isnan().any() for value in function.state_dict().values())


def test_half_precision_loses_nothing_to_folding():
    """The engine in bfloat16 is as close to float32 as the model in bfloat16 is."""
    model, images = tiny_model(), pictures((37, 50))
    exact = model(model.pad_to_patches(model.preprocess(images))).mask_logits
    half = model.compile_for_inference((37, 50), 2, dtype=torch.bfloat16)
    (found,) = logits(half, images)
    same = tiny_model().to(torch.bfloat16)
    usual = same(same.pad_to_patches(same.preprocess(images))).mask_logits
    assert (found.mask_logits - exact).norm() <= 1.5 * (usual - exact).norm()


# What an engine is


def test_model_stays_as_it_is():
    for fused in (False, True):
        model = tiny_model("shrunk").requires_grad_(True)
        images = pictures((37, 50))
        if fused:
            model.fuse()
        before = model.predict(images)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        names = [name for name, _ in model.named_buffers()]
        model.compile_for_inference((37, 50), 2, dtype=torch.bfloat16)(images)
        assert torch.equal(model.predict(images), before)
        assert [name for name, _ in model.named_buffers()] == names
        assert all(parameter.requires_grad for parameter in model.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
    model.train()
    assert (model.compile_for_inference((37, 50), 2)(images) == before).float().mean() > 0.999
    assert model.training


@torch.no_grad()
def test_engine_keeps_the_weights_of_its_moment():
    model, images = tiny_model(), pictures((32, 32))
    engine = model.compile_for_inference(32, 2)
    before = engine(images)
    for parameter in model.parameters():
        parameter.normal_()
    assert torch.equal(engine(images), before)
    assert not torch.equal(model.predict(images), before)


def test_engines_of_several_sizes_coexist():
    model = tiny_model("shrunk")
    engines = {size: model.compile_for_inference(size, batch) for batch, size in enumerate(SIZES, start=1)}
    for seed in range(2):
        for size, engine in engines.items():
            images = pictures(size, engine.batch, seed)
            assert (engine(images) == model.predict(images)).float().mean() > 0.995


@pytest.mark.parametrize("kind", ["plain", "shrunk"])
def test_only_the_last_stage_classifies(kind):
    model, calls = tiny_model(kind), []
    model.decoder.class_head.register_forward_hook(lambda *_: calls.append(1))
    model.predict(pictures((32, 32)))
    assert len(calls) == 2
    calls.clear()
    model.compile_for_inference(32, 2)(pictures((32, 32)))  # hooks are copied too
    assert len(calls) == 1


def test_results_are_ordinary_tensors():
    model, images = tiny_model(), pictures((32, 32))
    labels = model.compile_for_inference(32, 2)(images)
    assert not labels.is_inference()
    labels[labels == 1] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_synchronisation(kind):
    """On meta, where reading a value raises."""
    model = tiny_model(kind).to("meta")
    for options in (InferenceOptions(), InferenceOptions(window=32, scales=[1.0, 1.5], flip=True)):
        engine = model.compile_for_inference((37, 50), 2, options=options)
        assert engine(pictures((37, 50)).to("meta")).shape == (2, 37, 50)
    engine.function.network.backbone.norm.register_forward_hook(
        lambda module, args, out: out * out.max().item()
    )
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        engine(pictures((37, 50)).to("meta"))


@torch._dynamo.config.patch(recompile_limit=1)
def test_compile_is_one_graph(monkeypatch):
    """fullgraph is asked for, and engines do not use up each other's recompilations."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = tiny_model()
    engines = [model.compile_for_inference(size, 1, method="compile") for size in SIZES[:2]]
    for _, engine in itertools.product(range(2), engines):
        images = pictures(engine.size, 1)
        assert (engine(images) == model.predict(images)).float().mean() > 0.995


@pytest.mark.parametrize(
    "options",
    [InferenceOptions(), InferenceOptions(window=16, stride=8), InferenceOptions(scales=[1, 1.5], flip=True)],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(why_not("cpu", "cpu") is not None, reason=f"backend cpu: {why_not('cpu', 'cpu')}")
def test_on_a_cpu_calls_are_repeated(monkeypatch, kind, options):
    monkeypatch.setenv("SEGVIT_KERNELS_BACKEND", "cpu")  # where no operator asks for values
    model = tiny_model(kind)
    engine, plain = (
        model.compile_for_inference((37, 50), 2, method=method, options=options)
        for method in ("auto", "eager")
    )
    for seed in range(3):
        engine(pictures((37, 50), seed=seed))
    calls = []
    engine.function.register_forward_hook(lambda *_: calls.append(1))
    found = engine(pictures((37, 50), seed=3))
    assert torch.equal(found, plain(pictures((37, 50), seed=3)))
    assert engine._run.repeats and not calls
    copied = copy.deepcopy(engine)
    assert torch.equal(copied(pictures((37, 50), seed=3)), found) and not copied._run.repeats


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: got 0, expected height and width"),
        ({"size": (32,)}, r"size: got \(32,\)"),
        ({"size": (32.0, 32)}, r"size: got \(32.0, 32\)"),
        ({"batch": 0}, "batch: got 0, expected at least 1"),
        ({"dtype": torch.int8}, r"dtype: got torch.int8, expected one of torch.float32"),
        ({"method": "fast"}, "method: got 'fast', expected one of auto, eager, graph, compile"),
        ({"fp8": True}, "fp8: got a model on cpu; expected torchao and a GPU of compute capability 8.9"),
        ({"options": InferenceOptions(window=12)}, "window: got 12, expected a multiple of the patch size 8"),
    ],
)
def test_mistakes_in_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().compile_for_inference(**{"size": 32, **arguments})


def test_a_graph_is_for_gpus_and_cpus():
    with pytest.raises(ValueError, match="method: got 'graph' for a model on mps; expected cuda or cpu"):
        engine_module._method("graph", torch.device("mps"), False)
    methods = {
        kind: engine_module._method("auto", torch.device(kind), False) for kind in ("cuda", "cpu", "mps")
    }
    assert methods == {"cuda": "graph", "cpu": "graph", "mps": "eager"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 3, 32, 40, dtype=torch.uint8),
            r"got shape \(2, 3, 32, 40\), expected \(2, 3, 32, 32\)",
        ),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"got shape \(1, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"got shape \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32), r"got torch.float32, expected torch.uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta"), "got device meta, expected cpu"),
        ("street.jpg", "got str, expected torch.uint8"),
    ],
)
def test_mistakes_at_the_call(images, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().compile_for_inference(32, 2)(images)


def test_fp8_says_what_is_missing(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for capability, dtype, message in (
        (
            (8, 6),
            torch.bfloat16,
            "compute capability 8.6; expected torchao and a GPU of compute capability 8.9",
        ),
        ((9, 0), torch.float32, "got dtype torch.float32, expected torch.bfloat16"),
        ((9, 0), torch.bfloat16, "torchao cannot be imported .*: pip install torchao"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ValueError, match=message):
            engine_module._check_fp8(cuda, dtype)


def test_fp8_takes_the_backbones_ordinary_blocks(monkeypatch):
    quantised = []
    torchao = types.SimpleNamespace(
        Float8DynamicActivationFloat8WeightConfig=lambda granularity: ("fp8", granularity),
        PerRow=lambda: "rows",
        quantize_=lambda module, config: quantised.append((module, config)),
    )
    monkeypatch.setattr(engine_module, "import_module", lambda name: torchao)
    model = tiny_model("shrunk")
    engine_module._quantise_backbone(model)
    blocks = model.backbone.blocks
    assert quantised == [(blocks[0], ("fp8", "rows")), (blocks[2], ("fp8", "rows"))]


# CUDA graphs


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph on the CPU: keeps every operator call with its tensors, and runs them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(results), strict=True):
                if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@pytest.fixture
def log(monkeypatch):
    """`torch.cuda`'s part in a capture, replaced; what it is told, in order."""
    events = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            events.append(f"{self.name} waits for event {event}")

        def record_event(self):
            events.append(f"{self.name} records event {len(events)}")
            return len(events) - 1

    @contextlib.contextmanager
    def noted(start, end):
        events.append(start)
        yield
        events.append(end)

    @contextlib.contextmanager
    def graph(recording):
        with noted("capture", "captured"), recording:
            yield

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda s: noted(f"on {s.name}", f"off {s.name}"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return events


@torch.no_grad()
def test_graph_replays_the_whole_call(log):
    """Everything between the image and the label map is in the graph, nothing of the first image is baked in,
    and results stay what they were."""
    model = tiny_model("shrunk")
    function = model.compile_for_inference((37, 50), 2, dtype=torch.float32).function
    called = []
    function.register_forward_pre_hook(lambda *_: called.append(len(log)))
    graph = engine_module._Graph(function, (2, 3, 37, 50), torch.device("cpu"))
    assert log == [
        "side waits for current",
        "on side",
        "off side",
        "current waits for side",
        "capture",
        "captured",
        "current records event 6",
    ]
    assert called == [2] * engine_module._WARM_UP + [5], "warm-up on the side stream, then one capture"
    images = [pictures((37, 50), seed=seed) for seed in range(3)]
    expected = [model.predict(batch) for batch in images]
    assert not torch.equal(expected[0], expected[1])
    found = [graph(batch) for batch in images]
    for a, b in zip(found, expected, strict=True):
        assert (a == b).float().mean() > 0.995
    assert torch.equal(graph(images[0].to(memory_format=torch.channels_last)), found[0])
    assert len(called) == engine_module._WARM_UP + 1, "Python runs again"
    assert log[7:11] == [
        "current waits for event 6",
        "current records event 8",
        "current waits for event 8",
        "current records event 10",
    ], "a call on another stream would not wait for the buffers"


def test_threads_take_turns_at_the_buffers_of_a_graph(log, monkeypatch):
    """A call that comes between another's image and its replay waits, and each has its own result."""
    graph = engine_module._Graph(lambda images: images + 1, (2,), torch.device("cpu"))
    images, found, others = [torch.tensor([n, n], dtype=torch.uint8) for n in (3, 7)], {}, []

    def call(n):
        found[n] = graph(images[n]).tolist()

    def replay(plain=graph.graph.replay):
        if not others:
            others.append(threading.Thread(target=call, args=(1,)))
            others[0].start()
            others[0].join(0.1)
        plain()

    monkeypatch.setattr(graph.graph, "replay", replay)
    call(0)
    others[0].join()
    assert found == {0: [4, 4], 1: [8, 8]}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_graph_on_a_gpu(kind, size):
    model = tiny_model(kind).to("cuda")
    engine = model.compile_for_inference(size, 2, dtype=torch.float32)
    assert engine.method == "graph"
    images = [pictures(size, seed=seed).to("cuda") for seed in range(2)]
    expected = [model.predict(batch) for batch in images]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [engine(batch) for batch in images]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, expected, strict=True):
        assert (a == b).float().mean() > 0.995
    assert torch.equal(engine(images[0].to(memory_format=torch.channels_last)), found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["eager", "graph", "compile"])
def test_methods_on_a_gpu(method):
    model = tiny_model("shrunk").to("cuda")
    options = InferenceOptions(window=32, flip=True)
    engines = [
        model.compile_for_inference((37, 50), 2, method=method, options=options),
        model.compile_for_inference((64, 40), 1, method=method),
    ]
    for seed, (engine, choice) in itertools.product(range(2), zip(engines, (options, None), strict=True)):
        images = pictures(engine.size, engine.batch, seed).to("cuda")
        assert (engine(images) == model.predict(images, choice)).float().mean() > 0.9


@pytest.mark.gpu
def test_fp8_on_a_gpu():
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    model, images = tiny_model().to("cuda"), pictures((32, 32)).to("cuda")
    engine = model.compile_for_inference(32, 2, dtype=torch.bfloat16, fp8=True)
    assert engine.method == "compile"
    assert (engine(images) == model.predict(images)).float().mean() > 0.8
