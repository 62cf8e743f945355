"""Exported programs that call the native library itself; compiled ones: tests/segvit/exporting/."""

import os
import subprocess
import sys

import pytest
import torch

from segvit_kernels import (
    BackendUnavailableError,
    View,
    Views,
    _native,
    backend,
    fused_atm,
    linear,
    lower_to_native,
    native_library,
    pack_weight,
    semantic_argmax,
    subsample_layer_norm,
)

REASON = _native.library().reason
built = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def export(function, *args):
    with torch.no_grad():
        return torch.export.export(Function(function).eval(), args)


def called(program):
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {str(target).removesuffix(".default") for target in targets if "segvit" in str(target)}


@built
def test_results_are_those_of_the_backend():
    """Tensors, lists of them, constants, several results, and arguments left out at their defaults."""
    views = Views([View.whole(0, (3, 4), (9, 11)), View.whole(0, (3, 4), (9, 11), group=1)], 1, (9, 11))

    def function(query, key, probs, tokens):
        output, masks = fused_atm(query, key, key)
        masks = masks.unflatten(-1, (3, 4))
        labels, scores = semantic_argmax(
            [masks, masks.flip(-1)], probs, (9, 11), views=views, return_scores=True
        )
        return output, labels, scores, *subsample_layer_norm(tokens, None, None, grid=(3, 4))

    torch.manual_seed(0)
    sizes = ((1, 5, 2, 8), (1, 12, 2, 8), (2, 5, 3), (1, 12, 8))
    arguments = [torch.rand(size) for size in sizes]
    program = export(function, *arguments)
    names = lower_to_native(program)
    assert names == ["atm_fwd", "semantic_argmax", "subsample_norm_fwd"]
    assert called(program) == {f"segvit_native.{name}" for name in names}
    assert lower_to_native(program) == []
    with backend("cpu"):
        expected = function(*arguments)
    for found, wanted in zip(program.module()(*arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@built
def test_packed_weights():
    if not _native.runs_isa("avx2"):
        pytest.skip(f"linear needs avx2; this processor runs {_native.library().isa}")
    weight, input = torch.randn(20, 40, dtype=torch.bfloat16), torch.randn(3, 40, dtype=torch.bfloat16)
    packed = pack_weight(weight, None if _native.runs_isa("avx512_fp16") else "avx2")
    program = export(lambda x: linear(x, weight, packed=packed, gelu=True), input)
    assert lower_to_native(program) == ["linear"]
    assert torch.equal(
        program.module()(input), linear(input, weight, packed=packed, gelu=True, backend="cpu")
    )


@built
def test_what_the_kernels_do_not_take_is_refused():
    query = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float32, float16 and bfloat16; query is torch\.float64"):
        lower_to_native(export(lambda q: fused_atm(q, q, q), query))


def test_without_the_library(monkeypatch):
    query = torch.randn(1, 3, 2, 8)
    program = export(lambda q: fused_atm(q, q, q), query)
    monkeypatch.setattr(
        _native, "library", lambda: _native._Library(_native.Path("absent"), "it is not built")
    )
    for call in (native_library, lambda: lower_to_native(program)):
        with pytest.raises(BackendUnavailableError, match="native library cannot be used: it is not built"):
            call()
    assert called(program) == {"segvit.atm_fwd"}
    with pytest.raises(BackendUnavailableError, match="no native kernels for meta tensors"):
        native_library("meta")


@built
def test_a_second_copy_of_the_library_binds_nothing(tmp_path):
    """An exported program brings one; the operators of a process are those of the first."""
    copy = tmp_path / "libsegvit_native.so"
    copy.write_bytes(native_library().read_bytes())
    code = (
        "import sys, torch\n"
        "sys.modules['segvit_kernels'] = None\n"
        "for path in sys.argv[1:]:\n"
        "    torch.ops.load_library(path)\n"
        "q = torch.ones(1, 2, 1, 16)\n"
        "call = torch.ops.segvit_native.atm_fwd\n"
        "print(call(q, q, q, None, None, 1.0, 0.0, True)[1].tolist())\n"
        "print('inactive' in torch._C._dispatch_dump('segvit_native::atm_fwd'))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(native_library()), str(copy)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "[[[16.0, 16.0], [16.0, 16.0]]]\nFalse\n"
