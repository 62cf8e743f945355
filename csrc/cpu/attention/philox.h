// Philox4x32-10, one counter a lane: the dropout bits of segvit_kernels/ops/_philox.py.
#pragma once

#include "../simd.h"

namespace segvit::SEGVIT_ISA {

// High and low word of a · b.
SEGVIT_INLINE void multiply(UVec a, uint32_t b, UVec& high, UVec& low) {
  low = a * b;
#if defined(__AVX512F__)
  __m512i factor = _mm512_set1_epi64(b);
  __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  high = (UVec)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  __m256i factor = _mm256_set1_epi64x(b);
  __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (UVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#elif defined(SEGVIT_NEON)
  uint32x4_t factor = vdupq_n_u32(b);
  uint64x2_t first = vmull_u32(vget_low_u32((uint32x4_t)a), vget_low_u32(factor));
  uint64x2_t second = vmull_high_u32((uint32x4_t)a, factor);
  high = (UVec)vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
#else
  for (int i = 0; i < kWidth; ++i) high[i] = static_cast<uint32_t>(uint64_t{a[i]} * b >> 32);
#endif
}

// The four words of counters (c0, c1, 0, 0).
SEGVIT_INLINE void philox(uint32_t k0, uint32_t k1, UVec c0, UVec c1, UVec (&words)[4]) {
  UVec c2{}, c3{};
  for (int round = 0; round < 10; ++round) {
    UVec high0, low0, high2, low2;
    multiply(c0, 0xD2511F53, high0, low0);
    multiply(c2, 0xCD9E8D57, high2, low2);
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace segvit::SEGVIT_ISA
