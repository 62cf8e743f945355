// Binds the operators to the schemas that segvit_kernels/_library.py defines in the namespace segvit_native.
//
// Only the stable ABI of LibTorch is used: one binary for every Python and for torch 2.11 and later.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "operators.h"

namespace {

using torch::stable::detail::StableLibrary;

#define SEGVIT_BIND(name) m.impl(#name, TORCH_BOX(&name))

#if !defined(SEGVIT_EMULATE)
void bind_cpu(StableLibrary& m) {
  using namespace segvit::cpu;
  SEGVIT_BIND(subsample_norm_fwd);
  SEGVIT_BIND(subsample_norm_bwd);
}
#endif

#if defined(SEGVIT_EMULATE) || defined(SEGVIT_CUDA_ARCHS)
void bind_cuda(StableLibrary& m) {
  using namespace segvit::cuda;
}
#endif

}  // namespace

#if defined(SEGVIT_EMULATE)
// The CUDA kernels, run thread by thread on the CPU: for tests.
#define SEGVIT_CUDA_ARCHS "emulated"
STABLE_TORCH_LIBRARY_IMPL(segvit_emulated, CPU, m) { bind_cuda(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(segvit_native, CPU, m) { bind_cpu(m); }
#if defined(SEGVIT_CUDA_ARCHS)
STABLE_TORCH_LIBRARY_IMPL(segvit_native, CUDA, m) { bind_cuda(m); }
#else
#define SEGVIT_CUDA_ARCHS ""
#endif
#endif

// For segvit_kernels/_native.py: what is inside.
#define SEGVIT_EXPORT extern "C" __attribute__((visibility("default")))
SEGVIT_EXPORT const char* segvit_native_isa() { return segvit::isa_name(segvit::isa()); }
SEGVIT_EXPORT const char* segvit_native_cuda_archs() { return SEGVIT_CUDA_ARCHS; }
