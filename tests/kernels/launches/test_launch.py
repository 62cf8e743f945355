"""Launch parameters of GPUs that are not the pinned ones, and kernels compiled ahead."""

from types import SimpleNamespace

import pytest
import torch
from test_stub import run

from segvit_kernels.triton import _launch, atm, mask_loss, query_attention, semantic_argmax, subsample_norm
from segvit_kernels.triton._launch import CDNA, pinned

AMD = ("gfx90a", "gfx950", "gfx1100", "gfx1201")


def entries(value, path=()):
    """(path, value) of everything pinned."""
    if not isinstance(value, dict):
        return [(path, value)]
    return [found for key, inner in value.items() for found in entries(inner, (*path, key))]


@pytest.mark.parametrize("arch", (CDNA, *AMD))
def test_amd_gpus_get_no_parameter_of_nvidia(arch):
    names = {path[-1]: value for path, value in entries(pinned(arch))}
    assert "maxnreg" not in names and names["precision"] == "ieee" and names["split"] is False
    assert pinned(arch) == pinned(CDNA)


def test_a_gpu_without_a_file_is_shaped_for_its_own_multiprocessors(monkeypatch):
    """One RTX 4090 has twice what the fallback's file says, and an H100 PCIe less than an H100 SXM."""
    device = torch.device("cuda", 3)
    properties = SimpleNamespace(major=8, minor=9, multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    _launch._gpu.cache_clear()
    assert _launch.architecture(device) == "sm_89"
    assert _launch.target(device) == "sm_89:128"
    _launch._gpu.cache_clear()
    default, found = pinned("default"), pinned("sm_89:128")
    assert found == {**default, "multiprocessors": 128}
    half = torch.bfloat16
    few, many = (1, 150, 6400, 4, 32), (1, 1600, 1600, 16, 32)
    assert [atm._fwd_config(few, half, f"sm_89:{n}")["splits"] for n in (32, 64, 128)] == [5, 11, 16]
    assert [query_attention._fwd_config(many, half, f"sm_89:{n}")["splits"] for n in (64, 1024)] == [1, 5]
    for name in ("mask_loss_fwd", "mask_loss_bwd", "mask_loss_matching"):
        assert mask_loss._config(name, "sm_89:128")["multiprocessors"] == 128
    argmax = ((1, 640, 640, 150, 150), half)
    assert semantic_argmax._config(*argmax, "sm_89:128", (0.1, 0.1))["programs"] == 256
    assert semantic_argmax._config(*argmax, "sm_90", (0.1, 0.1))["programs"] == 264
    norm = ((64, 1600, 1024), half)
    assert [subsample_norm._bwd_config(*norm, f"sm_89:{n}")["steps"] for n in (64, 128)] == [200, 100]


AHEAD = """
from triton import knobs
from triton.backends.compiler import GPUTarget
from segvit_kernels.testing import launches

CASES = (("subsample_norm", "odd"), ("atm", "ones"))
def everything():
    for operator, case in CASES:
        module = launches.module(operator)
        yield from module.launches(module.MORE[case], "sm_90")

ahead = [launch.compile(GPUTarget("cuda", 90, 32)).hash for launch in everything()]
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
device = torch.device
torch.device = lambda *names: device("cpu") if names == ("meta",) else device(*names)
called = [launch().hash for launch in everything()]
print(json.dumps({"same": ahead == called, "hits": hits, "launches": gpu.launches}))
"""


def test_a_kernel_compiled_ahead_is_what_the_jit_looks_for(tmp_path):
    """Sizes that 16 divides and does not, that are 1, arguments that are none: nothing is compiled twice."""
    found = run(AHEAD, TRITON_CACHE_DIR=str(tmp_path))
    assert found == {"same": True, "hits": [True] * 6, "launches": 6}


GFX90A = """
from triton.backends.compiler import GPUTarget
from segvit_kernels.testing import launches
kernels = []
for operator, case, kernel in (
    ("mask_loss", "masks", "_mask_matching_kernel"), ("semantic_argmax", "fp32", "_semantic_argmax_kernel")
):
    module = launches.module(operator)
    for launch in module.launches(module.EVERYWHERE[case], "gfx90a"):
        if launch.kernel.__name__ == kernel:
            found = launches.resources(launch.compile(GPUTarget("hip", "gfx90a", 64)))
            kernels.append([kernel, found["spills"], found["shared"] <= 65536])
print(json.dumps(kernels))
"""


def test_kernels_compile_for_an_amd_gpu_without_a_file():
    """The two that took what AMD's compiler refuses: TF32 in two terms, and TF32 in three products."""
    assert run(GFX90A) == [["_mask_matching_kernel", 0, True], ["_semantic_argmax_kernel", 0, True]]
