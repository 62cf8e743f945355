// Vectors of float32 for the kernels: one register of the instruction set that the file is compiled for.
//
// Vec and IVec are vector types of GCC and Clang: + - * / and comparisons work on them, `mask ? a : b` selects.
// Products and sums contract to fused multiply-adds.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#define SEGVIT_NEON 1  // a part of every such processor: what "portable" is there
#endif

#define SEGVIT_ALWAYS_INLINE inline __attribute__((always_inline))
#define SEGVIT_INLINE static SEGVIT_ALWAYS_INLINE

namespace segvit::SEGVIT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kWidth)));

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class T>
SEGVIT_INLINE T min_of(T a, T b) { return a < b ? a : b; }
template <class T>
SEGVIT_INLINE T max_of(T a, T b) { return a > b ? a : b; }

// Not a sum with zeros, which would keep the load from being the broadcast.
SEGVIT_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

// 0, 1, 2, ...
SEGVIT_INLINE IVec iota() {
  IVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

SEGVIT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SEGVIT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

SEGVIT_INLINE Vec to_float(HalfBits bits, bf16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return (Vec)(__builtin_convertvector(bits, UVec) << 16);
#endif
}

// To nearest, ties to even; a NaN stays one.
SEGVIT_INLINE HalfBits to_half(Vec v, bf16) {
  UVec bits = (UVec)v;
  UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (UVec)(v != v) ? (UVec{} + 0x7fc0) : rounded;
  return __builtin_convertvector(rounded, HalfBits);
}

SEGVIT_INLINE Vec to_float(HalfBits bits, f16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)bits);
#elif defined(SEGVIT_NEON)
  return (Vec)vcvt_f32_f16((float16x4_t)bits);
#else
  // Move exponent and mantissa into place; a product mends the exponent's bias, subnormals included.
  UVec wide = __builtin_convertvector(bits, UVec);
  UVec magnitude = (wide & 0x7fff) << 13;
  Vec scaled = (Vec)magnitude * 0x1p112f;
  UVec special = (UVec)((wide & 0x7c00) == 0x7c00);  // infinity or NaN
  UVec value = special ? (magnitude | 0x7f800000) : (UVec)scaled;
  return (Vec)(value | ((wide & 0x8000) << 16));
#endif
}

SEGVIT_INLINE HalfBits to_half(Vec v, f16) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(SEGVIT_NEON)
  return (HalfBits)vcvt_f16_f32((float32x4_t)v);
#else
  UVec bits = (UVec)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  UVec normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  UVec subnormal = (UVec)((Vec)magnitude + 0.5f) - 0x3f000000;
  UVec half = (UVec)(magnitude < 0x38800000) ? subnormal : normal;
  half = (UVec)(magnitude >= 0x477ff000) ? (UVec{} + 0x7c00) : half;
  half = (UVec)(magnitude > 0x7f800000) ? (UVec{} + 0x7e00) : half;
  return __builtin_convertvector(half | sign, HalfBits);
#endif
}

template <class T>
SEGVIT_INLINE Vec load(const T* p) {
  HalfBits bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return to_float(bits, T{});
}
template <class T>
SEGVIT_INLINE void store(T* p, Vec v) {
  HalfBits bits = to_half(v, T{});
  __builtin_memcpy(p, &bits, sizeof bits);
}

// The first n elements, n < kWidth; the others are `fill` and are not touched in memory.
template <class T>
SEGVIT_INLINE Vec load_some(const T* p, int64_t n, float fill = 0) {
  T buffer[kWidth];
  __builtin_memset(buffer, 0, sizeof buffer);
  __builtin_memcpy(buffer, p, n * sizeof(T));
  Vec v = load(buffer);
  return fill == 0 ? v : (iota() < (int32_t)n ? v : splat(fill));
}
template <class T>
SEGVIT_INLINE void store_some(T* p, int64_t n, Vec v) {
  T buffer[kWidth];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

template <class T>
SEGVIT_INLINE Vec load_up_to(const T* p, int64_t n) { return n >= kWidth ? load(p) : load_some(p, n); }
template <class T>
SEGVIT_INLINE void store_up_to(T* p, int64_t n, Vec v) { n >= kWidth ? store(p, v) : store_some(p, n, v); }

SEGVIT_INLINE IVec load_ints(const int32_t* p) {
  IVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SEGVIT_INLINE void store_ints(int32_t* p, IVec v) { __builtin_memcpy(p, &v, sizeof v); }

// Elements of a register, by index below kWidth.
SEGVIT_INLINE Vec permute(Vec table, IVec index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
  return (Vec)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#elif defined(SEGVIT_NEON)
  return (Vec)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)((UVec)index * 0x04040404u + 0x03020100u));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = table[index[i]];
  return v;
#endif
}

SEGVIT_INLINE float load_one(const float* p) { return *p; }
template <class T>
SEGVIT_INLINE float load_one(const T* p) { return load_some(p, 1)[0]; }
SEGVIT_INLINE void store_one(float* p, float v) { *p = v; }
template <class T>
SEGVIT_INLINE void store_one(T* p, float v) { store_some(p, 1, splat(v)); }

// As the instructions do it: the second argument where one is not a number.
SEGVIT_INLINE Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
SEGVIT_INLINE Vec vmin(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
SEGVIT_INLINE Vec vabs(Vec v) { return (Vec)((UVec)v & 0x7fffffff); }
SEGVIT_INLINE Vec vsqrt(Vec v) {
#if defined(SEGVIT_NEON)
  return (Vec)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// A bit for each element of a mask, the first lowest.
SEGVIT_INLINE uint32_t bits_of(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(SEGVIT_NEON)
  return vaddvq_u32((uint32x4_t)((UVec)mask & UVec{1, 2, 4, 8}));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

// To the nearest integer; |v| below 2^22.
SEGVIT_INLINE Vec vround(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)v, 8);
#elif defined(__AVX2__)
  return (Vec)_mm256_round_ps((__m256)v, 8);
#elif defined(SEGVIT_NEON)
  return (Vec)vrndnq_f32((float32x4_t)v);
#else
  IVec nearest = __builtin_convertvector(v + (v < 0 ? splat(-0.5f) : splat(0.5f)), IVec);
  return __builtin_convertvector(nearest, Vec);
#endif
}

SEGVIT_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(SEGVIT_NEON)
  return vaddvq_f32((float32x4_t)v);
#else
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
#endif
}
// 1 / sqrt of a variance; of an infinite one NaN, as the numbers it is of would be.
SEGVIT_INLINE float inverse_deviation(float variance) {
  return variance == __builtin_inff() ? __builtin_nanf("") : 1 / __builtin_sqrtf(variance);
}
SEGVIT_INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(SEGVIT_NEON)
  return vmaxvq_f32((float32x4_t)v);
#else
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = max_of(m, v[i]);
  return m;
#endif
}

// e^v to about one unit in the last place; 0 below -104, infinity above 88.7.
SEGVIT_INLINE Vec vexp(Vec v) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
#if !defined(__AVX512F__)
  Vec x = v;
  v = vmin(vmax(v, splat(-87.3f)), splat(88.72f));
#endif
  Vec n = vround(v * kLog2e);
  Vec r = v - n * kLn2High - n * kLn2Low;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two steps: 2^128 is no float32.
  IVec exponent = __builtin_convertvector(n, IVec), half = exponent >> 1;
  p = p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
  p = x < -87.3f ? splat(0) : p;
  return x > 88.72f ? splat(__builtin_inff()) : p;
#endif
}

SEGVIT_INLINE int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// A row of n elements as float32: the row itself, or its conversion in `buffer`.
SEGVIT_INLINE const float* floats(Type type, const void* row, int64_t n, float* buffer) {
  if (type == Type::f32) return static_cast<const float*>(row);
  int64_t i = 0;
  if (type == Type::f16) {
    const f16* p = static_cast<const f16*>(row);
    for (; i + kWidth <= n; i += kWidth) store(buffer + i, load(p + i));
    if (i < n) store_some(buffer + i, n - i, load_some(p + i, n - i));
  } else {
    const bf16* p = static_cast<const bf16*>(row);
    for (; i + kWidth <= n; i += kWidth) store(buffer + i, load(p + i));
    if (i < n) store_some(buffer + i, n - i, load_some(p + i, n - i));
  }
  return buffer;
}

// The other way; nothing to do where `row` is where the numbers already are.
SEGVIT_INLINE void put_floats(Type type, void* row, int64_t n, const float* values) {
  int64_t i = 0;
  if (type == Type::f32) {
    if (row != values) __builtin_memcpy(row, values, n * sizeof(float));
  } else if (type == Type::f16) {
    f16* p = static_cast<f16*>(row);
    for (; i + kWidth <= n; i += kWidth) store(p + i, load(values + i));
    if (i < n) store_some(p + i, n - i, load_some(values + i, n - i));
  } else {
    bf16* p = static_cast<bf16*>(row);
    for (; i + kWidth <= n; i += kWidth) store(p + i, load(values + i));
    if (i < n) store_some(p + i, n - i, load_some(values + i, n - i));
  }
}

}  // namespace segvit::SEGVIT_ISA
