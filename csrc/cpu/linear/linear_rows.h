// Rows of a linear layer in float32: LayerNorm before the product, and bias, GELU, scale and residual behind it.
#pragma once

#include "block32.h"
#include "gelu.h"
#include "linear.h"

namespace segvit::SEGVIT_ISA {

template <class T>
const T* row_of(const Linear& args, int64_t r) {
  return reinterpret_cast<const T*>(args.input) + r / args.rows_per_outer * args.outer_stride +
         r % args.rows_per_outer * args.row_stride;
}

SEGVIT_INLINE Vec sum_of_parts(const Block& x) {
  Vec total = x.part[0];
  for (int i = 1; i < kParts; ++i) total += x.part[i];
  return total;
}

struct Statistics {
  Vec mean, rstd;
};

// Of a row, in float32; the squares are those of centred numbers.
template <class T>
SEGVIT_INLINE Statistics statistics(const T* row, int64_t depth, float eps) {
  Block sums{}, squares{};
  for (int64_t k = 0; k < depth; k += 32) {
    Block x = load_block(row + k, inside_of(depth - k));
    for_parts([&](int i) { sums.part[i] += x.part[i]; });
  }
  Vec mean = splat(sum(sum_of_parts(sums)) / depth);
  for (int64_t k = 0; k < depth; k += 32) {
    Inside inside = inside_of(depth - k);
    Block x = load_block(row + k, inside);
    for_parts([&](int i) { x.part[i] -= mean; });
    keep(x, inside);
    for_parts([&](int i) { squares.part[i] += x.part[i] * x.part[i]; });
  }
  return {mean, splat(inverse_deviation(sum(sum_of_parts(squares)) / depth + eps))};
}

// f(first of the depth, 32 numbers, which of them there are) for a row, normalised if that is asked for.
template <class T, class F>
SEGVIT_INLINE void for_row(const Linear& args, const T* row, const F& f) {
  Statistics stats{};
  if (args.norm_weight) stats = statistics(row, args.depth, args.norm_eps);
  for (int64_t k = 0; k < args.depth; k += 32) {
    Inside inside = inside_of(args.depth - k);
    Block x = load_block(row + k, inside);
    if (args.norm_weight) {
      auto block = [&](const char* from) { return load_block(reinterpret_cast<const T*>(from) + k, inside); };
      Block weight = block(args.norm_weight), bias = args.norm_bias ? block(args.norm_bias) : Block{};
      for_parts([&](int i) {
        x.part[i] = (x.part[i] - stats.mean) * stats.rstd * weight.part[i] + bias.part[i];
      });
    }
    f(k, x, inside);
  }
}

// A row in float32 to `values`, zeros up to a multiple of 32, for int8: returns a 127th of its largest magnitude, not
// a number where one in the row is not finite.
template <class T>
SEGVIT_INLINE float scale_of_row(const Linear& args, const T* row, float* values) {
  Block most{}, sum_of_zeros{};
  for_row(args, row, [&](int64_t k, Block x, Inside inside) {
    keep(x, inside);
    for_parts([&](int i) {
      store(values + k + i * kWidth, x.part[i]);
      most.part[i] = vmax(most.part[i], vabs(x.part[i]));
      sum_of_zeros.part[i] += x.part[i] * 0;
    });
  });
  Vec all = most.part[0];
  for (int i = 1; i < kParts; ++i) all = vmax(all, most.part[i]);
  return largest(all) / 127 + sum(sum_of_parts(sum_of_zeros));
}
// What its numbers are multiplied by; below, they count as zero.
SEGVIT_INLINE Vec factor_of(float scale) { return splat(scale > 1e-37f ? 1 / scale : 0); }

#if defined(__AVX512F__)
// A row in bfloat16, 32 numbers each `step` bytes.
SEGVIT_INLINE void pack_row_bf16(const Linear& args, const bf16* row, char* to, int64_t step) {
  if (!args.norm_weight) {
    for (int64_t k = 0; k < args.depth; k += 32, to += step)
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(first_of_32(args.depth - k), row + k));
    return;
  }
  for_row(args, row, [&](int64_t k, Block x, Inside inside) {
    __m512i bits = rounded(Pair{x.part[0], x.part[1]}, bf16{});
    _mm512_store_si512(to + k / 32 * step, _mm512_maskz_mov_epi16(inside, bits));
  });
}

// A row in int8, 64 numbers each `step` bytes, rounded; the signs' bits flipped by `flip`. `values` is memory for the
// row in float32. Returns the scale.
template <class T>
SEGVIT_INLINE float pack_row_int8(const Linear& args, const T* row, float* values, char* to, int64_t step, char flip) {
  float scale = scale_of_row(args, row, values);
  Vec factor = factor_of(scale);
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
#endif

// 32 columns of a row, from `column` on; the row's scale is that of int8 numbers.
template <class T, bool kInt8>
SEGVIT_INLINE void finish(const Linear& args, const float* sums, int64_t row, float row_scale, int64_t column) {
  Inside inside = inside_of(args.columns - column);
  auto block = [&](const char* from) { return load_block(reinterpret_cast<const T*>(from) + column, inside); };
  Block x;
  for_parts([&](int i) {
    x.part[i] = load(sums + i * kWidth);
    if (kInt8)
      x.part[i] = __builtin_convertvector((IVec)x.part[i], Vec) * (load(args.factors + column + i * kWidth) * row_scale);
  });
  if (args.bias) {
    Block bias = block(args.bias);
    for_parts([&](int i) { x.part[i] += bias.part[i]; });
  }
  constexpr bool kFloat = sizeof(T) == 4 && !kInt8;
  if (args.gelu) for_parts([&](int i) { x.part[i] = kFloat ? gelu_float(x.part[i]) : gelu(x.part[i]); });
  if (args.scale) {
    Block scale = block(args.scale);
    for_parts([&](int i) { x.part[i] *= scale.part[i]; });
  }
  int64_t before = row * args.columns;
  if (args.residual) {
    Block residual = block(args.residual + before * sizeof(T));
    for_parts([&](int i) { x.part[i] += residual.part[i]; });
  }
  store_block(reinterpret_cast<T*>(args.output) + before + column, inside, x, args.stream);
}

}  // namespace segvit::SEGVIT_ISA
