// Query attention: attention.cpp without masks.
#include "attention_launch.h"

namespace segvit::cpu {

std::tuple<Tensor, Tensor> query_attention_fwd(Tensor query, Tensor key, Tensor value, Optional seed,
                                               double scale, double dropout_p, Optional key_padding_mask) {
  auto [output, masks, lse] =
      attention_forward(query, key, value, {}, seed, scale, dropout_p, false, key_padding_mask);
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> query_attention_bwd(Tensor grad_output, Tensor query, Tensor key,
                                                       Tensor value, Tensor output, Tensor lse, Optional seed,
                                                       double scale, double dropout_p,
                                                       bool /*deterministic: always*/, Optional key_padding_mask) {
  return attention_backward(grad_output, {}, query, key, value, output, lse, seed, scale, dropout_p,
                            key_padding_mask);
}

}  // namespace segvit::cpu
