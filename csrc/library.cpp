// Defines the operators in a namespace of their own, by default segvit_native, so that a program without Python has
// them too, and binds them. Their schemas stand in segvit_kernels/ops; csrc/build.py passes them and the namespace on.
//
// Only the stable ABI of LibTorch is used: one binary for every Python and for torch 2.11 and later.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "operators.h"

namespace {

using torch::stable::detail::StableLibrary;

#define SEGVIT_TEXT(name) #name
#define SEGVIT_TEXT_OF(macro) SEGVIT_TEXT(macro)

// Exported models carry a copy of this library. In a program that loads two copies the first one's operators are
// used, and the other, whose schemas may be another version's, binds nothing.
class Definitions {
 public:
  Definitions() {
    aoti_torch_library_init_fragment(SEGVIT_TEXT_OF(SEGVIT_NAMESPACE), __FILE__, __LINE__, &library_);
    for (const char* schema : {SEGVIT_DEFINITIONS})
      first = first && aoti_torch_library_def(library_, schema) == AOTI_TORCH_SUCCESS;
  }
  ~Definitions() { aoti_torch_delete_library_object(library_); }
  Definitions(const Definitions&) = delete;
  Definitions& operator=(const Definitions&) = delete;

  bool first = true;

 private:
  TorchLibraryHandle library_;
};
const Definitions definitions;

#define SEGVIT_BIND(name) m.impl(#name, TORCH_BOX(&name));
#if defined(SEGVIT_WITH_atm)
#define SEGVIT_BIND_ATM SEGVIT_BIND(atm_fwd) SEGVIT_BIND(atm_bwd)
#else
#define SEGVIT_BIND_ATM
#endif
#if defined(SEGVIT_WITH_linear)
#define SEGVIT_BIND_LINEAR SEGVIT_BIND(linear)
#else
#define SEGVIT_BIND_LINEAR
#endif
#if defined(SEGVIT_WITH_query_attention)
#define SEGVIT_BIND_QUERY_ATTENTION SEGVIT_BIND(query_attention_fwd) SEGVIT_BIND(query_attention_bwd)
#else
#define SEGVIT_BIND_QUERY_ATTENTION
#endif
#if defined(SEGVIT_WITH_mask_binarize)
#define SEGVIT_BIND_MASK_BINARIZE SEGVIT_BIND(mask_binarize)
#define SEGVIT_BIND_MASK_RLE SEGVIT_BIND(mask_rle)
#else
#define SEGVIT_BIND_MASK_BINARIZE
#define SEGVIT_BIND_MASK_RLE
#endif
#if defined(SEGVIT_WITH_mask_loss)
#define SEGVIT_BIND_MASK_LOSS \
  SEGVIT_BIND(mask_loss_fwd) SEGVIT_BIND(mask_loss_bwd) SEGVIT_BIND(mask_matching_sums)
#else
#define SEGVIT_BIND_MASK_LOSS
#endif
#if defined(SEGVIT_WITH_mask_iou)
#define SEGVIT_BIND_MASK_IOU SEGVIT_BIND(mask_iou)
#else
#define SEGVIT_BIND_MASK_IOU
#endif
#if defined(SEGVIT_WITH_panoptic_argmax)
#define SEGVIT_BIND_PANOPTIC_ARGMAX SEGVIT_BIND(panoptic_argmax)
#else
#define SEGVIT_BIND_PANOPTIC_ARGMAX
#endif
#if defined(SEGVIT_WITH_semantic_argmax)
#define SEGVIT_BIND_SEMANTIC_ARGMAX SEGVIT_BIND(semantic_argmax)
#define SEGVIT_BIND_SEMANTIC_TOPK SEGVIT_BIND(semantic_topk)
#else
#define SEGVIT_BIND_SEMANTIC_ARGMAX
#define SEGVIT_BIND_SEMANTIC_TOPK
#endif
#if defined(SEGVIT_WITH_subsample_norm)
#define SEGVIT_BIND_SUBSAMPLE_NORM SEGVIT_BIND(subsample_norm_fwd) SEGVIT_BIND(subsample_norm_bwd)
#else
#define SEGVIT_BIND_SUBSAMPLE_NORM
#endif

#if !defined(SEGVIT_EMULATE)
void bind_cpu(StableLibrary& m) {
  if (!definitions.first) return;
  using namespace segvit::cpu;
  SEGVIT_BIND_ATM
  SEGVIT_BIND_LINEAR
  SEGVIT_BIND_MASK_BINARIZE
  SEGVIT_BIND_MASK_RLE
  SEGVIT_BIND_QUERY_ATTENTION
  SEGVIT_BIND_MASK_LOSS
  SEGVIT_BIND_MASK_IOU
  SEGVIT_BIND_PANOPTIC_ARGMAX
  SEGVIT_BIND_SEMANTIC_ARGMAX
  SEGVIT_BIND_SEMANTIC_TOPK
  SEGVIT_BIND_SUBSAMPLE_NORM
}
#endif

#if defined(SEGVIT_EMULATE) || defined(SEGVIT_CUDA_ARCHS)
void bind_cuda(StableLibrary& m) {
  if (!definitions.first) return;
  using namespace segvit::cuda;
  SEGVIT_BIND_ATM
  SEGVIT_BIND_MASK_BINARIZE
  SEGVIT_BIND_QUERY_ATTENTION
  SEGVIT_BIND_MASK_LOSS
  SEGVIT_BIND_MASK_IOU
  SEGVIT_BIND_PANOPTIC_ARGMAX
  SEGVIT_BIND_SEMANTIC_ARGMAX
  SEGVIT_BIND_SUBSAMPLE_NORM
}
#endif

}  // namespace

#if defined(SEGVIT_EMULATE)
// The CUDA kernels, run thread by thread on the CPU: for tests.
#define SEGVIT_CUDA_ARCHS "emulated"
STABLE_TORCH_LIBRARY_IMPL(SEGVIT_NAMESPACE, CPU, m) { bind_cuda(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(SEGVIT_NAMESPACE, CPU, m) { bind_cpu(m); }
#if defined(SEGVIT_CUDA_ARCHS)
STABLE_TORCH_LIBRARY_IMPL(SEGVIT_NAMESPACE, CUDA, m) { bind_cuda(m); }
#else
#define SEGVIT_CUDA_ARCHS ""
#endif
#endif

// For segvit_kernels/_native.py: what is inside.
#define SEGVIT_EXPORT extern "C" __attribute__((visibility("default")))
SEGVIT_EXPORT const char* segvit_native_isa() { return segvit::isa_name(segvit::isa()); }
SEGVIT_EXPORT const char* segvit_native_isas() { return segvit::isa_names(); }
SEGVIT_EXPORT const char* segvit_native_cuda_archs() { return SEGVIT_CUDA_ARCHS; }
// From build.py: hashes of the schemas it was built for and of the sources.
SEGVIT_EXPORT const char* segvit_native_schemas() { return SEGVIT_SCHEMAS; }
SEGVIT_EXPORT const char* segvit_native_sources() { return SEGVIT_SOURCES; }
