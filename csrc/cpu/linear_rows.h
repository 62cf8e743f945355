// Rows of a linear layer in float32: LayerNorm before the product, and bias, GELU, scale and residual behind it.
#pragma once

#include "avx512.h"
#include "gelu.h"
#include "linear.h"

namespace segvit::SEGVIT_ISA {

template <class T>
const T* row_of(const Linear& args, int64_t r) {
  return reinterpret_cast<const T*>(args.input) + r / args.rows_per_outer * args.outer_stride +
         r % args.rows_per_outer * args.row_stride;
}

struct Statistics {
  Vec mean, rstd;
};

// Of a row, in float32; the squares are those of centred numbers.
template <class T>
SEGVIT_INLINE Statistics statistics(const T* row, int64_t depth, float eps) {
  Vec sums[2] = {}, squares[2] = {};
  for (int64_t k = 0; k < depth; k += 32) {
    Pair x = load_pair(row + k, first_of_32(depth - k));
    sums[0] += x.first, sums[1] += x.second;
  }
  Vec mean = splat(sum(sums[0] + sums[1]) / depth);
  for (int64_t k = 0; k < depth; k += 32) {
    __mmask32 inside = first_of_32(depth - k);
    Pair x = load_pair(row + k, inside);
    Vec a = (Vec)_mm512_maskz_sub_ps(inside, (__m512)x.first, (__m512)mean);
    Vec b = (Vec)_mm512_maskz_sub_ps(inside >> 16, (__m512)x.second, (__m512)mean);
    squares[0] += a * a, squares[1] += b * b;
  }
  return {mean, splat(1 / __builtin_sqrtf(sum(squares[0] + squares[1]) / depth + eps))};
}

// f(first of the depth, 32 numbers, which of them there are) for a row, normalised if that is asked for.
template <class T, class F>
SEGVIT_INLINE void for_row(const Linear& args, const T* row, const F& f) {
  Statistics stats{};
  if (args.norm_weight) stats = statistics(row, args.depth, args.norm_eps);
  for (int64_t k = 0; k < args.depth; k += 32) {
    __mmask32 inside = first_of_32(args.depth - k);
    Pair x = load_pair(row + k, inside);
    if (args.norm_weight) {
      auto part = [&](const char* from) { return load_pair(reinterpret_cast<const T*>(from) + k, inside); };
      Pair weight = part(args.norm_weight), bias = args.norm_bias ? part(args.norm_bias) : Pair{};
      x.first = (x.first - stats.mean) * stats.rstd * weight.first + bias.first;
      x.second = (x.second - stats.mean) * stats.rstd * weight.second + bias.second;
    }
    f(k, x, inside);
  }
}

// A row in int8, 64 numbers each `step` bytes: divided by a 127th of the largest magnitude and rounded, the signs' bits
// flipped by `flip`. `values` is memory for the row in float32. Returns the scale, not a number where one in the row
// is not finite.
template <class T>
SEGVIT_INLINE float pack_row_int8(const Linear& args, const T* row, float* values, char* to, int64_t step, char flip) {
  Vec most{}, sum_of_zeros{};
  for_row(args, row, [&](int64_t k, Pair x, __mmask32 inside) {
    x.first = (Vec)_mm512_maskz_mov_ps(inside, (__m512)x.first);
    x.second = (Vec)_mm512_maskz_mov_ps(inside >> 16, (__m512)x.second);
    store(values + k, x.first), store(values + k + 16, x.second);
    most = vmax(most, vmax(vabs(x.first), vabs(x.second)));
    sum_of_zeros += x.first * 0 + x.second * 0;
  });
  float scale = largest(most) / 127 + sum(sum_of_zeros);
  Vec factor = splat(scale > 1e-37f ? 1 / scale : 0);  // below, numbers count as zero
  __m128i signs = _mm_set1_epi8(flip);
  int64_t end = (args.depth + 31) / 32 * 32;
  for (int64_t k = 0; k < end; k += 16) {
    __m512i nearest = _mm512_cvtps_epi32((__m512)(load(values + k) * factor));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + k / 64 * step + k % 64),
                    _mm_xor_si128(_mm512_cvtsepi32_epi8(nearest), signs));
  }
  if (end % 64) _mm256_store_si256(reinterpret_cast<__m256i*>(to + end / 64 * step + 32), _mm256_setzero_si256());
  return scale;
}

// 32 columns of a row, from `column` on; the row's scale is that of int8 numbers.
template <class T, bool kInt8>
SEGVIT_INLINE void finish(const Linear& args, const float* sums, int64_t row, float row_scale, int64_t column) {
  __mmask32 inside = first_of_32(args.columns - column);
  auto part = [&](const char* from) { return load_pair(reinterpret_cast<const T*>(from) + column, inside); };
  Pair x{load(sums), load(sums + 16)};
  if (kInt8) {
    x.first = __builtin_convertvector((IVec)x.first, Vec) * (load(args.factors + column) * row_scale);
    x.second = __builtin_convertvector((IVec)x.second, Vec) * (load(args.factors + column + 16) * row_scale);
  }
  if (args.bias) {
    Pair bias = part(args.bias);
    x.first += bias.first, x.second += bias.second;
  }
  if (args.gelu) x.first = gelu(x.first), x.second = gelu(x.second);
  if (args.scale) {
    Pair scale = part(args.scale);
    x.first *= scale.first, x.second *= scale.second;
  }
  int64_t before = row * args.columns;
  if (args.residual) {
    Pair residual = part(args.residual + before * sizeof(T));
    x.first += residual.first, x.second += residual.second;
  }
  store_pair(reinterpret_cast<T*>(args.output) + before + column, inside, x, args.stream);
}

}  // namespace segvit::SEGVIT_ISA
