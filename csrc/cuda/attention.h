// Both attention operators on CUDA, forward and backward: for sources that the C++ compiler takes, without kernels.
#pragma once

#include "../operators.h"

namespace segvit::cuda {

// Output, masks and log-sum-exp; in attention_fwd.cu.
std::tuple<Tensor, Tensor, Tensor> attention_fwd(Tensor query, Tensor key, Tensor value,
                                                 Optional previous_masks, Optional seed, double scale,
                                                 double dropout_p, bool need_masks, Optional padding);

// Gradients of query, key and value; in attention_bwd.cu.
std::tuple<Tensor, Tensor, Tensor> attention_bwd(Optional grad_output, Optional grad_masks, Tensor query,
                                                 Tensor key, Tensor value, Tensor output, Tensor lse,
                                                 Optional seed, double scale, double dropout_p,
                                                 Optional padding);

}  // namespace segvit::cuda
