// What the attention kernels for half precision share that take one head with all of its keys.
#pragma once

#include "attention.h"
#include "../avx512.h"
#include "transpose.h"

namespace segvit::SEGVIT_ISA {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kUnseen = -1e38f;  // the largest score of a query that has seen none

// 2^v, relative error 4e-6: weights are rounded to 2^-9, and log-sum-exp errs by no more.
SEGVIT_INLINE Vec exp2_of(Vec v) {
  Vec r = (Vec)_mm512_reduce_ps((__m512)v, 9);  // v - floor(v)
  Vec p = splat(1.353417e-2f);
  p = p * r + 5.201146e-2f;
  p = p * r + 2.414428e-1f;
  p = p * r + 6.930038e-1f;
  p = p * r + 1.0000026f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)v);
}

SEGVIT_INLINE const bf16* row_of(const HeadsView& view, int64_t batch, int64_t token, int64_t head) {
  return reinterpret_cast<const bf16*>(view.data) + batch * view.batch_stride + token * view.token_stride +
         head * view.head_stride;
}

// Elements of two rows of 32 in turn: of their first halves.
alignas(64) constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                             8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Squares of 32-bit elements to rows of 64 bytes.
SEGVIT_INLINE void store_transposed(__m512i (&rows)[16], char* to) {
  Vec v[kWidth];
  for (int i = 0; i < kWidth; ++i) v[i] = (Vec)rows[i];
  transpose(v);
  for (int i = 0; i < kWidth; ++i) _mm512_store_si512(to + i * 64, (__m512i)v[i]);
}

}  // namespace segvit::SEGVIT_ISA
