// What atm and query_attention launch: the operators of segvit_kernels/ops/atm.py, masks or not.
#pragma once

#include "../../operators.h"

namespace segvit::cpu {

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key,
                                                     const Tensor& value, const Optional& previous_masks,
                                                     const Optional& seed, double scale, double dropout_p,
                                                     bool need_masks, const Optional& key_padding_mask);

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Optional& grad_output, const Optional& grad_masks,
                                                      const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& output,
                                                      const Tensor& lse, const Optional& seed, double scale,
                                                      double dropout_p, const Optional& key_padding_mask);

}  // namespace segvit::cpu
