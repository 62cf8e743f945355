"""The emulator of CUDA kernels: it computes what a GPU would, and it finds what a GPU would not forgive."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest
import torch
from backends import BY_ID
from test_atm import CASES
from test_atm import check as check_atm
from test_query_attention import check as check_query_attention

from segvit_kernels import _library
from segvit_kernels.testing import query_attention

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = r"""
#include <cstdio>
#include "common.cuh"

namespace segvit::cuda {

__global__ void sum(const float* in, float* out, int n) {
  float* partial = reinterpret_cast<float*>(shared_memory());
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float x = warp_sum(i < n ? in[i] : 0);
  if (lane_index() == 0) partial[warp_index()] = x;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1];
}

// d (16, 16) = a (16, 16) b, where b is given as (16, 16) or as its transpose.
template <class T>
__global__ void product(const T* a, const T* b, float* d, bool transposed) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  int lane = lane_index();
  for (int i = lane; i < 512; i += 32) shared[i] = i < 256 ? a[i] : b[i - 256];
  __syncwarp();
  uint32_t x[4], y[4];
  ldmatrix_x4(x, shared + lane % 16 * 16 + lane / 16 * 8);
  const T* second = shared + 256;
  if (transposed) ldmatrix_x4(y, second + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  else ldmatrix_x4_trans(y, second + lane % 16 * 16 + lane / 16 * 8);
  for (int n = 0; n < 2; ++n) {
    float acc[4] = {};
    mma_m16n8k16(acc, x, {y[2 * n], y[2 * n + 1]}, acc, T{});
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = acc[i];
  }
}

__global__ void early_exit() {
  if (threadIdx.x < 40) return;
  __syncthreads();
}
__global__ void different_collectives() {
  if (threadIdx.x % 2) __syncwarp();
  else warp_sum(1.0f);
}
__global__ void past_the_end() { shared_memory()[64 + threadIdx.x] = 1; }
__global__ void off_alignment() {
  uint32_t x[4];
  ldmatrix_x4(x, shared_memory() + 2);
}
__global__ void unwritten(float* out) {
  out[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[threadIdx.x];
}
__global__ void missing_barrier(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
}

__global__ void copied(const int* in, int* out, bool waits, bool both) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  copy_async16(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  copy_commit();
  copy_async16(shared + 128 + 4 * threadIdx.x, in, false);
  copy_commit();
  if (waits) copy_wait<1>();  // for the first one
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
  if (both) copy_wait();
  out[128 + threadIdx.x] = shared[128 + threadIdx.x];
}
__global__ void copy_outside(const int* in) { copy_async16(shared_memory() + 64, in, true); }

template <class T>
void try_product(const char* name) {
  T a[256], b[256], bt[256];
  float d[256];
  for (int i = 0; i < 256; ++i) {
    a[i] = from_float<T>(std::sin(1.3f * i));
    b[i] = bt[i % 16 * 16 + i / 16] = from_float<T>(std::cos(0.7f * i));
  }
  for (bool transposed : {false, true}) {
    launch(&product<T>, 1, 32, 1024, Stream{}, a, transposed ? bt : b, d, transposed);
    double worst = 0;
    for (int i = 0; i < 256; ++i) {
      double truth = 0;
      for (int k = 0; k < 16; ++k) truth += to_float(a[i / 16 * 16 + k]) * to_float(b[k * 16 + i % 16]);
      worst = std::fmax(worst, std::fabs(truth - d[i]));
    }
    std::printf("product %s %d: %s\n", name, transposed, worst < 1e-5 ? "right" : "wrong");
  }
}

template <class... Args>
void expect(const char* name, Args... args) {
  try {
    launch(args...);
    std::printf("%s: nothing\n", name);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

void main() {
  float in[200], out[64];
  int numbers[64];
  for (int i = 0; i < 200; ++i) in[i] = i;
  expect("early_exit", &early_exit, dim3(1), dim3(64), size_t{0}, Stream{});
  expect("different_collectives", &different_collectives, dim3(1), dim3(64), size_t{0}, Stream{});
  expect("past_the_end", &past_the_end, dim3(1), dim3(32), size_t{70}, Stream{});
  expect("off_alignment", &off_alignment, dim3(1), dim3(32), size_t{1024}, Stream{});
  alignas(16) int from[128], to[160];
  for (int i = 0; i < 128; ++i) from[i] = i;
  expect("copy_outside", &copy_outside, dim3(1), dim3(32), size_t{64}, Stream{}, from);
  expect("never_waits", &copied, dim3(1), dim3(32), size_t{1024}, Stream{}, from, to, true, false);
  for (bool waits : {false, true}) {
    launch(&copied, 1, 32, 1024, Stream{}, from, to, waits, true);
    std::printf("copied %d: %d %d %d\n", waits, to[0], to[127], to[128]);
  }
  launch(&sum, 4, 64, 8, Stream{}, in, out, 200);  // and kernels run after all this
  std::printf("sum: %g\n", out[0] + out[1] + out[2] + out[3]);
  try_product<half>("half");
  try_product<bf16>("bf16");
  launch(&unwritten, 1, 32, 128, Stream{}, out);
  std::printf("unwritten: %s\n", std::isnan(out[5]) ? "nan" : "a number");
  launch(&missing_barrier, 1, 64, 256, Stream{}, numbers);
  std::printf("missing_barrier: %s\n", numbers[0] == 32 ? "hidden" : "seen");
}

}  // namespace segvit::cuda

int main() { segvit::cuda::main(); }
"""

EXPECTED = {
    "early_exit": "threads of the block wait for others",
    "different_collectives": "lanes of a warp are in",
    "past_the_end": "a write past the end of shared memory",
    "off_alignment": "not aligned to 16 bytes",
    "copy_outside": "outside shared memory",
    "never_waits": "an asynchronous copy that nobody waited for",
    "copied 0": "-1 -1 0",
    "copied 1": "0 127 0",
    "sum": "19900",
    "product half 0": "right",
    "product half 1": "right",
    "product bf16 0": "right",
    "product bf16 1": "right",
    "unwritten": "nan",
    "missing_barrier": "seen",
}


@pytest.mark.skipif(os.name != "posix", reason="the emulator needs GCC on Linux")
def test_faults_are_found_and_products_are_right(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "csrc")
        torch_version = importlib.import_module("build").TORCH_VERSION
    torch_folder = Path(torch.__file__).parent
    source, program = tmp_path / "program.cu", tmp_path / "program"
    source.write_text(PROGRAM)
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-DSEGVIT_EMULATE", torch_version]
    command += [
        "-isystem",
        str(torch_folder / "include"),
        f"-I{ROOT / 'csrc' / 'cuda'}",
        "-x",
        "c++",
        str(source),
    ]
    command += [
        "-x",
        "none",
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        f"-Wl,-rpath,{torch_folder / 'lib'}",
    ]
    result = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    result = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    found = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert found.keys() == EXPECTED.keys()
    for name, text in EXPECTED.items():
        assert text in found[name], name


@pytest.fixture
def emulated(poisoned):
    if reason := _library.why_not("cuda", "cpu"):
        pytest.skip(f"backend cuda: {reason}")


@pytest.fixture
def without_tensor_cores(monkeypatch, emulated):
    """The kernels as a GPU older than sm_80 runs them."""
    monkeypatch.setenv("SEGVIT_KERNELS_EMULATED_CAPABILITY", "75")


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@HALVES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_atm_without_tensor_cores(case, dtype, without_tensor_cores):
    check_atm(case, dtype, BY_ID["cuda"])


@HALVES
@pytest.mark.parametrize("case", query_attention.CASES, ids=lambda c: c.name)
def test_query_attention_without_tensor_cores(case, dtype, without_tensor_cores):
    check_query_attention(case, dtype, BY_ID["cuda"])


@pytest.mark.parametrize("capability", ["75", "90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_huge_logits(dtype, capability, scale, emulated, monkeypatch):
    """Their rounding is no small number: that of the largest must be the one that is taken away from it."""
    monkeypatch.setenv("SEGVIT_KERNELS_EMULATED_CAPABILITY", capability)
    torch.manual_seed(0)
    query, key, value = ((torch.randn(1, 70, 1, 32) * size).to(dtype) for size in (3e7, 3e7, 1))
    fwd = torch.ops.segvit.query_attention_fwd
    found, expected = (fwd(query, key, value, None, scale, 0.0, backend=b)[0] for b in ("cuda", "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", ["75", "90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_logits_far_below_zero(dtype, capability, emulated, monkeypatch):
    """The weight of a key that is not there, in the last tile, would be infinite."""
    monkeypatch.setenv("SEGVIT_KERNELS_EMULATED_CAPABILITY", capability)
    query, key = torch.full((1, 5, 1, 32), 3.0, dtype=dtype), torch.full((1, 70, 1, 32), -3.0, dtype=dtype)
    value, gradient = torch.randn(1, 70, 1, 32).to(dtype), torch.randn(1, 5, 1, 32).to(dtype)
    ops, results = torch.ops.segvit, {}
    for backend in ("cuda", "eager"):
        output, lse = ops.query_attention_fwd(query, key, value, None, 1.0, 0.0, backend=backend)
        tensors = (gradient, query, key, value, output, lse)
        grads = ops.query_attention_bwd(*tensors, None, 1.0, 0.0, True, backend=backend)
        results[backend] = (output, lse, grads[1], grads[2])
        assert grads[0].abs().max() < 1e-2  # all keys are the same: nothing to gain from another query
    for found, expected in zip(results["cuda"], results["eager"], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
