// Query attention; what is computed stands in segvit_kernels/ops/query_attention.py, how in attention_fwd.cu
// and attention_bwd.cu.
#include "attention.h"

namespace segvit::cuda {

std::tuple<Tensor, Tensor> query_attention_fwd(Tensor query, Tensor key, Tensor value, Optional seed,
                                               double scale, double dropout_p, Optional key_padding_mask) {
  auto [output, masks, lse] =
      attention_fwd(query, key, value, std::nullopt, seed, scale, dropout_p, false, key_padding_mask);
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> query_attention_bwd(Tensor grad_output, Tensor query, Tensor key,
                                                       Tensor value, Tensor output, Tensor lse, Optional seed,
                                                       double scale, double dropout_p, bool,
                                                       Optional key_padding_mask) {
  return attention_bwd(grad_output, std::nullopt, query, key, value, output, lse, seed, scale, dropout_p,
                       key_padding_mask);
}

}  // namespace segvit::cuda
