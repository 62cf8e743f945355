#include "subsample_norm.h"

#include "simd.h"

namespace segvit::SEGVIT_ISA {

namespace {

// The index of a token among the kept ones, or -1.
int64_t kept_index(const SubsampleGrid& grid, int64_t token) {
  if (token < grid.prefix) return token;
  int64_t row = (token - grid.prefix) / grid.width, column = (token - grid.prefix) % grid.width;
  if (row % grid.stride || column % grid.stride) return -1;
  return grid.prefix + row / grid.stride * grid.kept_width + column / grid.stride;
}

const float* row_of(const Tokens& tokens, int64_t image, int64_t token, int64_t channels, float* buffer) {
  int64_t offset = image * tokens.batch_stride + token * tokens.token_stride;
  return floats(tokens.type, tokens.data + offset * size_of(tokens.type), channels, buffer);
}

// f(i, n) for every register of a row: n == kWidth but for the last.
template <class F>
SEGVIT_INLINE void for_row(int64_t channels, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) f(i, int64_t{kWidth});
  if (i < channels) f(i, channels - i);
}

// The sum of f(i, n) over the registers of a row: four sums, of which none waits for another.
template <class F>
SEGVIT_INLINE float sum_over_row(int64_t channels, const F& f) {
  Vec sums[4]{};
  int64_t i = 0;
  for (; i + 4 * kWidth <= channels; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j) sums[j] += f(i + j * kWidth, int64_t{kWidth});
  for_row(channels - i, [&](int64_t c, int64_t n) { sums[0] += f(i + c, n); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

int64_t round_up(int64_t n) { return (n + 15) / 16 * 16; }

}  // namespace

void subsample_norm_fwd(const SubsampleNormFwd& args, int64_t begin, int64_t end, float* scratch) {
  const SubsampleGrid& grid = args.grid;
  int64_t channels = grid.channels, x_bytes = channels * size_of(args.x.type);
  int64_t out_bytes = channels * size_of(args.out_type);
  float* result = scratch + round_up(channels);
  for (int64_t i = begin; i < end; ++i) {
    int64_t image = i / grid.tokens, token = i % grid.tokens;
    const float* x = row_of(args.x, image, token, channels, scratch);
    float mean = sum_over_row(channels, [&](int64_t c, int64_t n) { return load_up_to(x + c, n); }) / channels;
    float squares = sum_over_row(channels, [&](int64_t c, int64_t n) {
      Vec d = (n == kWidth ? load(x + c) : load_some(x + c, n, mean)) - mean;
      return d * d;
    });
    float rstd = inverse_deviation(squares / channels + args.eps);
    args.mean[i] = mean;
    args.rstd[i] = rstd;
    char* normed = args.normed + i * out_bytes;
    if (args.out_type == Type::f32) result = reinterpret_cast<float*>(normed);
    for_row(channels, [&](int64_t c, int64_t n) {
      Vec y = (load_up_to(x + c, n) - mean) * rstd;
      if (args.weight) y *= load_up_to(args.weight + c, n);
      if (args.bias) y += load_up_to(args.bias + c, n);
      store_up_to(result + c, n, y);
    });
    put_floats(args.out_type, normed, channels, result);
    int64_t kept = kept_index(grid, token);
    if (kept < 0) continue;
    kept += image * grid.kept_tokens;
    __builtin_memcpy(args.normed_sub + kept * out_bytes, normed, out_bytes);
    int64_t offset = image * args.x.batch_stride + token * args.x.token_stride;
    __builtin_memcpy(args.x_sub + kept * x_bytes, args.x.data + offset * size_of(args.x.type), x_bytes);
  }
}

void subsample_norm_bwd(const SubsampleNormBwd& args, int64_t begin, int64_t end, float* scratch, float* sums) {
  const SubsampleGrid& grid = args.grid;
  int64_t channels = grid.channels, step = round_up(channels);
  bool normed = args.grad_normed.data || args.grad_normed_sub.data;
  for (int64_t i = begin; i < end; ++i) {
    int64_t image = i / grid.tokens, token = i % grid.tokens, kept = kept_index(grid, token);
    float* result = scratch + 3 * step;
    char* grad_x = args.grad_x + i * channels * size_of(args.x.type);
    if (args.x.type == Type::f32) result = reinterpret_cast<float*>(grad_x);
    const float* residual = nullptr;
    if (kept >= 0 && args.grad_x_sub.data)
      residual = row_of(args.grad_x_sub, image, kept, channels, scratch + 2 * step);
    const float *all = nullptr, *sub = nullptr;
    if (args.grad_normed.data) all = row_of(args.grad_normed, image, token, channels, scratch + step);
    if (kept >= 0 && args.grad_normed_sub.data) {
      // `result` holds the second summand until the sum is formed.
      sub = row_of(args.grad_normed_sub, image, kept, channels, all ? result : scratch + step);
      if (!all) all = sub, sub = nullptr;
    }
    if (!normed || !all) {
      for_row(channels, [&](int64_t c, int64_t n) {
        store_up_to(result + c, n, residual ? load_up_to(residual + c, n) : Vec{});
      });
      put_floats(args.x.type, grad_x, channels, result);
      continue;
    }
    const float* x = row_of(args.x, image, token, channels, scratch);
    float mean = args.mean[i], rstd = args.rstd[i];
    float* grad = scratch + step;
    Vec first{}, second{};  // Σ w∘g and Σ w∘g∘x̂
    for_row(channels, [&](int64_t c, int64_t n) {
      Vec g = load_up_to(all + c, n);
      if (sub) g += load_up_to(sub + c, n);
      store(grad + c, g);
      Vec normal = ((n == kWidth ? load(x + c) : load_some(x + c, n, mean)) - mean) * rstd;
      if (args.weight) {
        store_up_to(sums + c, n, load_up_to(sums + c, n) + g * normal);
        store_up_to(sums + channels + c, n, load_up_to(sums + channels + c, n) + g);
        g *= load_up_to(args.weight + c, n);
      }
      first += g;
      second += g * normal;
    });
    float m1 = sum(first) / channels, m2 = sum(second) / channels;
    for_row(channels, [&](int64_t c, int64_t n) {
      Vec g = load(grad + c);
      if (args.weight) g *= load_up_to(args.weight + c, n);
      Vec d = (g - m1 - (load_up_to(x + c, n) - mean) * rstd * m2) * rstd;
      if (residual) d += load_up_to(residual + c, n);
      store_up_to(result + c, n, d);
    });
    put_floats(args.x.type, grad_x, channels, result);
  }
}

}  // namespace segvit::SEGVIT_ISA
