// Attention-to-mask: attention.cpp with masks.
#include "attention_launch.h"

namespace segvit::cpu {

std::tuple<Tensor, Tensor, Tensor> atm_fwd(Tensor query, Tensor key, Tensor value, Optional previous_masks,
                                           Optional seed, double scale, double dropout_p, bool need_masks,
                                           Optional key_padding_mask) {
  return attention_forward(query, key, value, previous_masks, seed, scale, dropout_p, need_masks,
                           key_padding_mask);
}

std::tuple<Tensor, Tensor, Tensor> atm_bwd(Optional grad_output, Optional grad_masks, Tensor query,
                                           Tensor key, Tensor value, Tensor output, Tensor lse, Optional seed,
                                           double scale, double dropout_p, bool /*deterministic: always*/,
                                           Optional key_padding_mask) {
  return attention_backward(grad_output, grad_masks, query, key, value, output, lse, seed, scale, dropout_p,
                            key_padding_mask);
}

}  // namespace segvit::cpu
