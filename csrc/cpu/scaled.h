// Numbers scaled by a power of two into the range of float16, for kernels on AVX512-FP16.
#pragma once

#include "avx512.h"

namespace segvit::SEGVIT_ISA {

constexpr float kTop = 3;  // scaled numbers lie below 2^4

constexpr uint16_t infinity_of(f16) { return 0x7c00; }
constexpr uint16_t infinity_of(bf16) { return 0x7f80; }

// The largest finite magnitudes of rows, lane by lane.
template <class T>
struct Largest {
  __m512i bits = _mm512_setzero_si512();

  SEGVIT_ALWAYS_INLINE void add(const T* row, int64_t depth) {
    __m512i infinity = _mm512_set1_epi16(infinity_of(T{}));
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i some = _mm512_maskz_loadu_epi16(first_of_32(depth - k), row + k);
      some = _mm512_and_si512(some, _mm512_set1_epi16(0x7fff));
      __mmask32 finite = _mm512_cmplt_epu16_mask(some, infinity);
      bits = _mm512_mask_max_epu16(bits, finite, bits, some);
    }
  }

  // The exponent of the largest; 0 where all are zero.
  SEGVIT_ALWAYS_INLINE float exponent() const {
    HalfBits halves[2];
    __builtin_memcpy(halves, &bits, sizeof halves);
    float most = max_of(largest(to_float(halves[0], T{})), largest(to_float(halves[1], T{})));
    return most == 0 ? 0 : _mm_cvtss_f32(_mm_getexp_ss(_mm_setzero_ps(), _mm_set_ss(most)));
  }
};

// The first 32 of a row, zeros from `count` on, by 2^(kTop - exponent).
template <class T>
SEGVIT_INLINE __m512i scaled(const T* row, int64_t count, float exponent) {
  Pair x = load_pair(row, first_of_32(count));
  __m512 by = _mm512_set1_ps(kTop - exponent);
  return rounded({(Vec)_mm512_scalef_ps((__m512)x.first, by), (Vec)_mm512_scalef_ps((__m512)x.second, by)}, f16{});
}

}  // namespace segvit::SEGVIT_ISA
