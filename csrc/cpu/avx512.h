// 32 numbers in two registers of float32, for the kernels that are compiled for AVX-512.
#pragma once

#include "simd.h"

namespace segvit::SEGVIT_ISA {

// Of a tile of AMX, in the layout of which AVX512-BF16 takes its operands too.
constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kTileDepth = 32;  // bfloat16 numbers of a row

struct Pair {
  Vec first, second;
};

// The first n of 32 numbers.
SEGVIT_INLINE __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// The lower and the upper half of 32 bfloat16 numbers.
SEGVIT_INLINE Vec lower(__m512i bits) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
}
SEGVIT_INLINE Vec upper(__m512i bits) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
}

// Those that are inside; the others are zero and are not touched in memory.
SEGVIT_INLINE Pair load_pair(const float* p, __mmask32 inside) {
  return {(Vec)_mm512_maskz_loadu_ps(inside, p), (Vec)_mm512_maskz_loadu_ps(inside >> 16, p + 16)};
}
SEGVIT_INLINE Pair load_pair(const bf16* p, __mmask32 inside) {
  __m512i bits = _mm512_maskz_loadu_epi16(inside, p);
  return {lower(bits), upper(bits)};
}
SEGVIT_INLINE Pair load_pair(const f16* p, __mmask32 inside) {
  __m512i bits = _mm512_maskz_loadu_epi16(inside, p);
  return {(Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))};
}

SEGVIT_INLINE __m512i join(HalfBits first, HalfBits second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
}
// Rounded to nearest; by the processor's own instruction numbers below the normal range become zero.
SEGVIT_INLINE __m512i rounded(Pair v, bf16) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
#else
  return join(to_half(v.first, bf16{}), to_half(v.second, bf16{}));
#endif
}
SEGVIT_INLINE __m512i rounded(Pair v, f16) { return join(to_half(v.first, f16{}), to_half(v.second, f16{})); }

// Those that are inside; past the caches where that is asked for and can be.
template <class T>
SEGVIT_INLINE void store_pair(T* p, __mmask32 inside, Pair v, bool stream) {
  __m512i bits = rounded(v, T{});
  if (stream && inside == ~0u && reinterpret_cast<uintptr_t>(p) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
  else
    _mm512_mask_storeu_epi16(p, inside, bits);
}
SEGVIT_INLINE void store_pair(float* p, __mmask32 inside, Pair v, bool stream) {
  if (stream && inside == ~0u && reinterpret_cast<uintptr_t>(p) % 64 == 0) {
    _mm512_stream_ps(p, (__m512)v.first), _mm512_stream_ps(p + 16, (__m512)v.second);
  } else {
    _mm512_mask_storeu_ps(p, inside, (__m512)v.first);
    _mm512_mask_storeu_ps(p + 16, inside >> 16, (__m512)v.second);
  }
}

}  // namespace segvit::SEGVIT_ISA
