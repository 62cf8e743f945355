#pragma once

#include "isa.h"

namespace segvit {

// Tokens (batch, prefix + height·width, channels) with unit last stride; strides in elements.
struct Tokens {
  const char* data;  // null: there is none
  int64_t batch_stride, token_stride;
  Type type;
};

struct SubsampleGrid {
  int64_t tokens, kept_tokens, channels, width, kept_width, stride, prefix;
};

struct SubsampleNormFwd {
  SubsampleGrid grid;
  Tokens x;
  const float *weight, *bias;  // null: 1 and 0
  char *normed, *normed_sub, *x_sub;
  Type out_type;
  float *mean, *rstd;
  float eps;
};

struct SubsampleNormBwd {
  SubsampleGrid grid;
  Tokens grad_normed, grad_normed_sub, grad_x_sub, x;
  const float *weight, *mean, *rstd;
  char* grad_x;
};

}  // namespace segvit

// Tokens begin...end of the batch laid end to end. `scratch`: 2 (forward) or 4 (backward) times the channels,
// each rounded up to 16. The backward adds to `sums`, gradients of weight and bias: (2, channels).
SEGVIT_KERNEL(subsample_norm_fwd, const SubsampleNormFwd& args, int64_t begin, int64_t end, float* scratch)
SEGVIT_KERNEL(subsample_norm_bwd, const SubsampleNormBwd& args, int64_t begin, int64_t end, float* scratch,
              float* sums)
