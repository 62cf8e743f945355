// 32 numbers of float32 in as many registers as they take, whatever the instruction set.
#pragma once

#if defined(__AVX512F__)
#include "../avx512.h"
#else
#include "../simd.h"
#endif

namespace segvit::SEGVIT_ISA {

constexpr int kParts = 32 / kWidth;

struct Block {
  Vec part[kParts];
};

// f(part) for every register.
template <class F>
SEGVIT_INLINE void for_parts(const F& f) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) f(i);
}

// Which of the 32 there are. Those that are not are zero, and are not touched in memory.
#if defined(__AVX512F__)

typedef __mmask32 Inside;
SEGVIT_INLINE Inside inside_of(int64_t n) { return first_of_32(n); }
template <class T>
SEGVIT_INLINE Block load_block(const T* p, Inside inside) {
  Pair x = load_pair(p, inside);
  return {x.first, x.second};
}
template <class T>
SEGVIT_INLINE void store_block(T* p, Inside inside, const Block& x, bool stream) {
  store_pair(p, inside, {x.part[0], x.part[1]}, stream);
}
SEGVIT_INLINE void keep(Block& x, Inside inside) {
  x.part[0] = (Vec)_mm512_maskz_mov_ps(inside, (__m512)x.part[0]);
  x.part[1] = (Vec)_mm512_maskz_mov_ps(inside >> 16, (__m512)x.part[1]);
}

#else

typedef int64_t Inside;
SEGVIT_INLINE Inside inside_of(int64_t n) { return min_of<int64_t>(n, 32); }
template <class T>
SEGVIT_INLINE Block load_block(const T* p, Inside inside) {
  Block x;
  for_parts([&](int i) {
    int64_t n = inside - i * kWidth;
    x.part[i] = n >= kWidth ? load(p + i * kWidth) : n > 0 ? load_some(p + i * kWidth, n) : Vec{};
  });
  return x;
}
template <class T>
SEGVIT_INLINE void store_block(T* p, Inside inside, const Block& x, bool) {
  for_parts([&](int i) {
    int64_t n = inside - i * kWidth;
    if (n > 0) store_up_to(p + i * kWidth, n, x.part[i]);
  });
}
SEGVIT_INLINE void keep(Block& x, Inside inside) {
  for_parts([&](int i) { x.part[i] = iota() + i * kWidth < (int32_t)inside ? x.part[i] : splat(0); });
}

#endif

}  // namespace segvit::SEGVIT_ISA
