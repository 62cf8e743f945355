"""What every operator promises: clear refusals, dispatch without silent fallbacks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention import BAD_ARGUMENTS, tensors
from imports import imports_of

import segvit_kernels
from segvit_kernels import (
    BackendUnavailableError,
    _library,
    attention_weights,
    backend,
    fused_atm,
    query_attention,
    record_backends,
    without_autocast,
)
from segvit_kernels._library import ENVIRONMENT_VARIABLE, operators, requested_backend

ROOT = Path(__file__).resolve().parents[3]


MASKS = [
    ({"previous_masks": torch.randn(2, 5, 8)}, ValueError, r"previous_masks has shape .* \(2, 5, 9\)"),
    ({"previous_masks": torch.randn(2, 5, 9), "need_masks": False}, ValueError, "need_masks=True"),
]


@pytest.mark.parametrize(("changes", "error", "message"), [*BAD_ARGUMENTS, *MASKS])
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        fused_atm(**tensors(**changes))


def test_autocast_takes_no_other_dtypes():
    whole, half = torch.ones(1, 2, 1, 4, dtype=torch.int64), torch.ones(1, 2, 1, 4)
    calls = (
        lambda: fused_atm(half, half, whole),
        lambda: query_attention(whole, half, half),
        lambda: attention_weights(half, whole),
    )
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"torch.int64"):
            call()


def test_unsupported_by_a_backend(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = {n: torch.randn(1, 3, 1, 160) for n in ("query", "key", "value")}
    with pytest.raises(ValueError, match=r"head dims up to 128; query has shape .* head dim 160"):
        fused_atm(**wide, backend="triton")
    with pytest.raises(TypeError, match=r"query is torch\.float64"):
        fused_atm(**tensors(torch.float64), backend="triton")
    assert fused_atm(**wide).output.shape == (1, 3, 1, 160)


def test_an_unavailable_backend_raises_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        fused_atm(**tensors(), backend="triton")


def test_what_is_no_backend_instruction_set_or_device_is_said(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cutlass'; expected one of eager"):
        segvit_kernels.why_not("cutlass", "cpu")
    with pytest.raises(ValueError, match="isa is 'sse'; expected one of portable, avx2"):
        segvit_kernels.runs_isa("sse")

    def without_driver(index):
        raise RuntimeError("Found no NVIDIA driver on your system.\nInstall one")

    monkeypatch.setattr(_library, "_compute_capability", without_driver)
    reason = "there is no device cuda: Found no NVIDIA driver on your system."
    assert {segvit_kernels.why_not(name, "cuda") for name in ("triton", "cuda", "cpu")} == {reason}
    with pytest.raises(BackendUnavailableError, match=reason):
        segvit_kernels.native_library("cuda")


def test_argument_outranks_context_outranks_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert requested_backend() == "triton"
    with backend("eager"):
        assert requested_backend() == "eager"
        assert requested_backend("triton") == "triton"
        with pytest.raises(RuntimeError), backend("triton"):
            raise RuntimeError
        assert requested_backend() == "eager"
    assert requested_backend() == "triton"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cutlass")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} is 'cutlass'; expected one of"):
        fused_atm(**tensors())
    with pytest.raises(ValueError, match="backend is 'cutlass'"), backend("cutlass"):
        pass


def test_blocks_of_two_threads_end_in_any_order(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    first, second = backend("eager"), backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert requested_backend() == "cpu"
    second.__exit__(None, None, None)
    assert requested_backend() == "triton"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "eager")
    outer, inner = record_backends(), record_backends()
    seen, own = outer.__enter__(), inner.__enter__()
    outer.__exit__(None, None, None)
    fused_atm(**tensors())
    inner.__exit__(None, None, None)
    fused_atm(**tensors())
    assert seen == {} and own == {"atm_fwd": {"eager"}}


def test_without_autocast_is_nothing_where_it_is_off():
    class Product(torch.nn.Module):
        def forward(self, x):
            with without_autocast(x.device):
                return x @ x

    x = torch.randn(2, 2)
    assert "autocast" not in str(torch.export.export(Product(), (x,)).graph)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Product()(x), Product()(x.clone()).float()) and Product()(x).dtype == x.dtype


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    operator = segvit_kernels._library._operators["atm_fwd"]
    called = []
    fake = lambda *a: called.append("triton") or operator.eager(*a)  # noqa: E731
    monkeypatch.setitem(operator.kernels, "triton", fake)
    fused_atm(**tensors())
    assert called == []
    with backend("triton"):
        fused_atm(**tensors())
    assert called == ["triton"]


def test_report_of_this_machine():
    def run(**environment):
        import os

        return subprocess.run(
            [sys.executable, "-m", "segvit_kernels"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    good = run()
    assert good.returncode == 0 and "segvit::atm_fwd" in good.stdout and torch.__version__ in good.stdout
    bad = run(**{ENVIRONMENT_VARIABLE: "nonsense"})
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "nonsense" in bad.stderr


def test_importing_the_kernels_needs_only_torch_and_numpy():
    code = (
        "import sys; import torch, numpy; loaded = set(sys.modules)\n"
        "import segvit_kernels\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - loaded if m[0] != '_'}\n"
        "extra = new - set(sys.stdlib_module_names) - {'segvit_kernels', 'torch', 'numpy', 'triton'}\n"
        "assert not extra, extra\n"
        "assert not torch.cuda.is_initialized()\n"
        "from torch.optim.optimizer import _global_optimizer_post_hooks\n"
        "assert not _global_optimizer_post_hooks"  # before anything is folded
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )


def test_setup_does_not_import_torch():
    found = imports_of("setup", (ROOT / "setup.py").read_text(encoding="utf-8"), is_package=False)
    assert not any(name.partition(".")[0] == "torch" for name, inner in found if not inner)


def test_moved_modules_are_found_under_their_earlier_names():
    code = (
        "import segvit, sys; from importlib import import_module as get\n"
        "import segvit.model.backbone as new; spec = new.__spec__\n"
        "from segvit.backbone import VisionTransformer\n"
        "assert VisionTransformer is segvit.VisionTransformer and new.__spec__ is spec\n"
        "for name, room in segvit._ROOMS.items():\n"
        "    assert get(name) is get(f'segvit.{room}.{name.split(\".\")[1]}'), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_operators_parts_are_found_by_its_name():
    """ops/<stem>.py and triton/<stem>.py, wherever the plain implementation stands."""
    for operator in operators():
        folders = ["ops", *(["triton"] if "triton" in operator.backends else [])]
        for folder in folders:
            assert (ROOT / "segvit_kernels" / folder / f"{operator.stem}.py").exists(), operator.name
