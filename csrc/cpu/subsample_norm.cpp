// LayerNorm of all tokens and of a strided subset; what is computed stands in segvit_kernels/ops/subsample_norm.py.
//
// One task is a run of tokens. The backward sums the gradients of weight and bias over kRuns runs, whatever the
// number of threads, and adds these in order: results do not depend on threads.
#include "subsample_norm.h"

#include "../operators.h"
#include "common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kRuns = 64;

// With unit last stride; the tensor is kept by the caller.
Tokens tokens_of(const Optional& tensor) {
  if (!tensor) return {nullptr, 0, 0, Type::f32};
  return {static_cast<const char*>(tensor->data_ptr()), tensor->stride(0), tensor->stride(1), type_of(*tensor)};
}

SubsampleGrid grid_of(const Tensor& x, int64_t height, int64_t width, int64_t stride, int64_t prefix) {
  int64_t kept_height = (height + stride - 1) / stride, kept_width = (width + stride - 1) / stride;
  return {x.size(1), prefix + kept_height * kept_width, x.size(2), width, kept_width, stride, prefix};
}

template <class F>
void over_runs(int64_t tokens, const F& f) {
  int64_t length = std::max<int64_t>(1, (tokens + kRuns - 1) / kRuns);
  parallel((tokens + length - 1) / length, [&](int64_t run) {
    f(run, run * length, std::min(tokens, (run + 1) * length));
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> subsample_norm_fwd(
    Tensor x, Optional weight, Optional bias, int64_t height, int64_t width,
    int64_t stride, int64_t prefix_tokens, double eps, ScalarType dtype) {
  x = unit_stride(x);
  auto w = as_float(weight), b = as_float(bias);
  SubsampleGrid grid = grid_of(x, height, width, stride, prefix_tokens);
  int64_t batch = x.size(0);
  Tensor normed = empty(x, {batch, grid.tokens, grid.channels}, dtype);
  Tensor normed_sub = empty(x, {batch, grid.kept_tokens, grid.channels}, dtype);
  Tensor x_sub = empty(x, {batch, grid.kept_tokens, grid.channels});
  Tensor mean = empty(x, {batch, grid.tokens}, ScalarType::Float);
  Tensor rstd = empty(x, {batch, grid.tokens}, ScalarType::Float);
  SubsampleNormFwd args{grid, tokens_of(x), data<float>(w), data<float>(b), data<char>(normed),
                        data<char>(normed_sub), data<char>(x_sub), type_of(dtype), data<float>(mean),
                        data<float>(rstd), static_cast<float>(eps)};
  auto* kernel = SEGVIT_PICK(subsample_norm_fwd);
  over_runs(batch * grid.tokens, [&](int64_t, int64_t begin, int64_t end) {
    Scratch scratch(2 * round_up(grid.channels) * sizeof(float));
    kernel(args, begin, end, scratch.as<float>());
  });
  return {normed, normed_sub, x_sub, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> subsample_norm_bwd(
    Optional grad_normed, Optional grad_normed_sub, Optional grad_x_sub,
    Tensor x, Optional weight, Tensor mean, Tensor rstd, int64_t height, int64_t width,
    int64_t stride, int64_t prefix_tokens) {
  x = unit_stride(x);
  grad_normed = unit_stride(grad_normed);
  grad_normed_sub = unit_stride(grad_normed_sub);
  grad_x_sub = unit_stride(grad_x_sub);
  auto w = as_float(weight);
  mean = torch::stable::contiguous(mean);
  rstd = torch::stable::contiguous(rstd);
  SubsampleGrid grid = grid_of(x, height, width, stride, prefix_tokens);
  int64_t batch = x.size(0), channels = grid.channels, size = weight ? channels : 0;
  Tensor grad_x = empty(x, {batch, grid.tokens, channels});
  Tensor grad_weight = empty(mean, {size}), grad_bias = empty(mean, {size});
  std::vector<float> sums(kRuns * 2 * channels, 0.0f);
  SubsampleNormBwd args{grid, tokens_of(grad_normed), tokens_of(grad_normed_sub), tokens_of(grad_x_sub),
                        tokens_of(x), data<float>(w), data<float>(mean), data<float>(rstd), data<char>(grad_x)};
  auto* kernel = SEGVIT_PICK(subsample_norm_bwd);
  over_runs(batch * grid.tokens, [&](int64_t run, int64_t begin, int64_t end) {
    Scratch scratch(4 * round_up(channels) * sizeof(float));
    kernel(args, begin, end, scratch.as<float>(), sums.data() + run * 2 * channels);
  });
  float *gw = data<float>(grad_weight), *gb = data<float>(grad_bias);
  for (int64_t c = 0; c < size; ++c) {
    double total = 0, bias_total = 0;
    for (int64_t run = 0; run < kRuns; ++run) {
      total += sums[run * 2 * channels + c];
      bias_total += sums[run * 2 * channels + channels + c];
    }
    gw[c] = static_cast<float>(total);
    gb[c] = static_cast<float>(bias_total);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace segvit::cpu
