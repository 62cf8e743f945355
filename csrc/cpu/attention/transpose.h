// Vectors as rows of a square, for kernels.
#pragma once

#include "../simd.h"

namespace segvit::SEGVIT_ISA {

#if defined(__AVX512F__)
#define SEGVIT_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SEGVIT_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define SEGVIT_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SEGVIT_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define SEGVIT_LOW 0, 4, 1, 5
#define SEGVIT_HIGH 2, 6, 3, 7
#endif

// Elements of a and b side by side. GCC knows Clang's builtin from version 12 on.
#if defined(__clang__)
#define SEGVIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SEGVIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IVec){__VA_ARGS__})
#endif

// Rows become columns: perfect shuffles, as often as halving takes to get from kWidth to 1.
SEGVIT_INLINE void transpose(Vec (&v)[kWidth]) {
#pragma GCC unroll 4
  for (int step = kWidth; step > 1; step /= 2) {
    Vec w[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      w[2 * i] = SEGVIT_SHUFFLE(v[i], v[i + kWidth / 2], SEGVIT_LOW);
      w[2 * i + 1] = SEGVIT_SHUFFLE(v[i], v[i + kWidth / 2], SEGVIT_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) v[i] = w[i];
  }
}

#undef SEGVIT_LOW
#undef SEGVIT_HIGH

}  // namespace segvit::SEGVIT_ISA
