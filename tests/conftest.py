"""Fixtures and guards of the whole suite. How Triton runs is chosen before anything of ours imports it."""

import collections
import contextlib
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# Facts about data folders are found anew.
os.environ.setdefault("SEGVIT_CACHE", os.devnull)
os.environ.setdefault(
    "SEGVIT_KERNELS_CUDA_EMULATOR",
    str(Path(__file__).resolve().parents[1] / "build" / "native" / "libsegvit_emulated.so"),
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads that spin while they wait would cost the others more than they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def interpreted(given: str | None, device: bool, markers: str) -> bool:
    """Whether Triton kernels run in the interpreter.

    Args:
        given: ``TRITON_INTERPRET``, which wins; ``None`` where it is not set.
        device: whether there is a GPU.
        markers: the expression after ``pytest -m``. Tests marked ``gpu`` need compiled kernels, all others
            the interpreter; one process has one of them.
    """
    if given is not None:
        return given == "1"
    words = re.findall(r"\w+", markers)
    asked = any(w == "gpu" and before != "not" for before, w in zip(["", *words], words, strict=False))
    return not (device and asked)


CHOICES = {
    "SEGVIT_DTYPES": {"all"},
    "SEGVIT_GATE": {"quick", "all"},
    "SEGVIT_PTX": {"sm_80", "sm_90"},
    "SEGVIT_PTX_DTYPES": {"turns", "all"},
}


def unknown_choices(variables: Mapping[str, str]) -> list[str]:
    """Of variables that choose what is run those with another word, which would run less unseen."""
    return [
        f"{name} is {variables[name]!r}; expected {' or '.join(sorted(known))}"
        for name, known in CHOICES.items()
        if variables.get(name) and variables[name] not in known
    ]


def pytest_configure(config: pytest.Config) -> None:
    if unknown := unknown_choices(os.environ):
        raise pytest.UsageError("; ".join(unknown))
    if "SEGVIT_PTX" in os.environ:  # sm_80, sm_90: the PTX machine in place of the interpreter
        os.environ["TRITON_INTERPRET"] = "0"
        os.environ.setdefault("SEGVIT_KERNELS_BACKEND", "eager")
        return
    given = os.environ.get("TRITON_INTERPRET")
    if interpreted(given, torch.cuda.is_available(), config.option.markexpr):
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton"):
            import interpreter

            interpreter.quicken()
        # The operators' definition, whether the native library is built or not; tests name other backends.
        os.environ.setdefault("SEGVIT_KERNELS_BACKEND", "eager")


def assert_compiled() -> None:
    """No kernel that is loaded runs in the interpreter, which takes CUDA tensors too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("segvit_kernels.triton."):
            kernels = {n: type(v).__name__ for n, v in vars(module).items() if n.endswith("_kernel")}
            assert set(kernels.values()) <= {"JITFunction"}, f"{name}: {kernels}"


@pytest.fixture(autouse=True)
def compiled_on_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is not None:
        assert_compiled()


@pytest.fixture(scope="module")
def ptx_machines() -> Iterator[Callable[[str], None]]:
    """With ``SEGVIT_PTX=sm_90`` a backend's compiled kernels run on the PTX machine, from a call with its
    name to the end of the module: those of Triton, and those that nvcc makes of CUDA C++. With
    ``SEGVIT_PTX_NOISE=1``, a seed, approximate instructions err as they may on hardware."""
    arch, noise, running = os.environ.get("SEGVIT_PTX"), os.environ.get("SEGVIT_PTX_NOISE"), set()
    with contextlib.ExitStack() as stack:

        def start(name: str) -> None:
            if arch is None or name in running:
                return
            if name == "cuda":
                import ptx_native as machines

                if reason := machines.missing():
                    pytest.skip(reason)
            else:
                from segvit_kernels.testing import ptx as machines
            session = stack.enter_context(machines.machine(arch, noise=None if noise is None else int(noise)))
            stack.callback(importlib.import_module("ptx_coverage").record, session)
            running.add(name)

        yield start


@pytest.fixture(scope="module", autouse=True)
def ptx_machine(request: pytest.FixtureRequest, ptx_machines: Callable[[str], None]) -> None:
    """The machine of a file of Triton alone."""
    if request.module.__name__.endswith("_triton"):
        ptx_machines("triton")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Launch parameters that a test chose for the interpreter, where a GPU's shared memory is smaller. Pinned
    ones are held to it by the compile gate, and on the PTX machine by the batteries."""
    try:
        return (yield)
    except Exception as error:
        chosen = item.path.stem.endswith("_triton") and "SEGVIT_PTX" in os.environ
        if chosen and type(error).__name__ == "OutOfResources":
            pytest.skip(f"launch parameters for the interpreter: {error}")
        raise


@pytest.fixture
def backend(request: pytest.FixtureRequest, ptx_machines: Callable[[str], None]) -> object:
    """A row of the table in tests/kernels/backends.py, ready to run; skips where it cannot."""
    ptx_machines(request.param.name)
    if reason := request.param.why_not():
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device() -> str:
    """Of tests of compiled kernels: the GPU, or the CPU where the PTX machine is to run them."""
    return "cpu" if "SEGVIT_PTX" in os.environ else "cuda"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference figures, real images and weights that do not travel with the project."""
    path = Path(os.environ.get("SEGVIT_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no reference material at {path} (set SEGVIT_SHARED)")
    return path


@pytest.fixture(params=["cpu", "cuda"])
def native_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the native library that runs on CPU tensors; "cuda" where its emulator is built."""
    from segvit_kernels import _library

    reason = _library.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.nn.Module]]:
    """Watches modules without a hook, which folding would respect: the list of those called since."""

    def watch(*modules: torch.nn.Module) -> list[torch.nn.Module]:
        seen: list[torch.nn.Module] = []

        def forward(self: torch.nn.Module, *args: object, original: Callable, **kwargs: object) -> object:
            seen.extend(m for m in modules if m is self)
            return original(self, *args, **kwargs)

        for kind in {type(module) for module in modules}:
            watched = functools.partialmethod(forward, original=kind.forward)
            monkeypatch.setattr(kind, "forward", watched)
        return seen

    return watch


@pytest.fixture
def float32_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose bfloat16 products are no faster: what this one has must not choose an engine's dtype."""
    monkeypatch.setattr("segvit.inference.engine.runs_isa", lambda isa: False)
    capabilities = {**torch.cpu.get_capabilities(), "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so that an element nobody wrote shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def _backend_of(item: pytest.Item) -> object:
    """The row of tests/kernels/backends.py, or the name, that a test is for, by its name; ``None``: none."""
    call = getattr(item, "callspec", None)
    backend = call.params.get("backend") if call else None
    return getattr(backend, "id", backend)


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """One dtype of each case on each backend: the first case's first, the second's second, and so on.

    Of a test that has fewer cases than dtypes, all. What only the other dtypes of a case would show is the
    product of a shape and a dtype: every shape and every dtype of every kernel remain.
    """
    families: dict[object, dict[str, list[pytest.Item]]] = collections.defaultdict(dict)
    for item in items:
        given = dict((getattr(item, "callspec", None) and item.callspec.params) or {})
        if given.pop("dtype", None) in FLOATS:
            family = item.path, item.originalname, repr(given.pop("backend", None))
            families[family].setdefault(repr(sorted(given.items())), []).append(item)
    left_out: set[int] = set()
    for cases in families.values():
        if len(cases) >= max(map(len, cases.values())):
            for number, dtypes in enumerate(cases.values()):
                kept = dtypes[number % len(dtypes)]
                left_out |= {id(item) for item in dtypes if item is not kept}
    return [item for item in items if id(item) not in left_out]


# Files with tests of half a minute and more. Of two workers each has half of them first.
LONG = (
    ("test_ptx.py", "test_kill.py", "test_native.py", "test_wheel.py"),
    ("test_triton_compiles.py", "test_bench_gpu.py", "test_export_aot.py", "test_hub.py"),
)


def long_ones_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """So that no worker is left with one of them when the others are through."""
    first, second = ([item for item in items if item.path.name in names] for names in LONG)
    others = [item for item in items if item.path.name not in LONG[0] + LONG[1]]
    middle = max(0, len(items) // 2 - len(first))
    return [*first, *others[:middle], *second, *others[middle:]]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """The order last, of what is left to run: a half of that is where the second worker begins."""
    _choose(items)
    yield
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = long_ones_first(items)


def _choose(items: list[pytest.Item]) -> None:
    """Leaves out what another dtype shows, and skips what needs a GPU."""
    if "SEGVIT_PTX" in os.environ:
        if os.environ.get("SEGVIT_PTX_DTYPES") == "turns":
            items[:] = in_turn(items)
        return
    if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("SEGVIT_DTYPES") != "all":
        # What Python does of a kernel is the same in every dtype, and slow: each case in one of them.
        interpreted = [item for item in items if _backend_of(item) == "triton"]
        kept = {id(item) for item in in_turn(interpreted)}
        items[:] = [item for item in items if id(item) in kept or _backend_of(item) != "triton"]
    if not torch.cuda.is_available():
        reason = "needs a CUDA or ROCm device, this machine has none"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "Triton kernels are interpreted in this process: pytest -m gpu"
    else:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)
