// What kernels share that upsample masks: cells of a row for pixels, σ, and infinite logits.
#pragma once

#include "../simd.h"

// Unrolled early enough for arrays of registers to stay in registers.
#define SEGVIT_UNROLL_8 _Pragma("GCC unroll 8")

namespace segvit::SEGVIT_ISA {

constexpr float kHuge = 1e30f;  // stands for infinity, which times a share of 0 is not a number

SEGVIT_INLINE Vec finite(Vec v) { return vmin(vmax(v, splat(-kHuge)), splat(kHuge)); }

SEGVIT_INLINE Vec gather(const float* table, IVec index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (Vec)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = table[index[i]];
  return v;
#endif
}

#if defined(__AVX512F__)
// 2^(i / 16).
alignas(64) constexpr float kRoots[16] = {
    1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
    1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
#endif

// 1 / (1 + e^-x) to two units in the last place; 0 below -87.
SEGVIT_INLINE Vec sigmoid(Vec x) {
#if defined(__AVX512F__)
  // e^-x = 2^(i/16) 2^n e^r with r small; the sum with kRound holds 16 n + i in its low bits.
  constexpr float kSteps = 16 * 1.44269504f, kStepsLow = 16 * 1.92596299e-8f, kRound = 0x1.8p23f;
  constexpr float kOne = 0.0433216988f, kTwo = kOne * kOne / 2, kThree = kTwo * kOne / 3;  // kOne: ln 2 / 16
  Vec z = vmin(vmax(x, splat(-88)), splat(88));
  Vec shifted = kRound - z * kSteps, steps = shifted - kRound;
  Vec r = (-steps - z * kSteps) - z * kStepsLow;
  Vec p = ((kThree * r + kTwo) * r + kOne) * r + 1.0f;
  Vec root = permute(load(kRoots), (IVec)shifted);
  Vec d = 1 + (Vec)_mm512_scalef_ps((__m512)root, (__m512)(steps * 0.0625f)) * p;
  Vec y = (Vec)_mm512_rcp14_ps((__m512)d);
  __mmask16 positive = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87), _CMP_GT_OQ);
  return (Vec)_mm512_maskz_fmadd_ps(positive, (__m512)y, (__m512)(1 - d * y), (__m512)y);
#else
  return 1 / (1 + vexp(-x));
#endif
}

}  // namespace segvit::SEGVIT_ISA
