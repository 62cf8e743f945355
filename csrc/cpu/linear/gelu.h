// The exact GELU.
#pragma once

#include "../simd.h"

namespace segvit::SEGVIT_ISA {

// x Φ(x) = max(x, 0) - |x| Φ(-|x|), the tail Φ(-z) = t P(t) 2^(-z²/2 log2 e) with t = 1 / (1 + 3/8 z). Relative
// error of the tail 1e-4, a quarter of float16's rounding.
SEGVIT_INLINE Vec gelu(Vec x) {
  Vec z = vmin(splat(20), vabs(x));  // there the tail is 0; a NaN stays one
#if defined(__AVX512F__)
  Vec t = (Vec)_mm512_rcp14_ps((__m512)(z * 0.375f + 1.0f));
#else
  Vec t = 1.0f / (z * 0.375f + 1.0f);
#endif
  Vec p = splat(-0.090317704f);
  p = p * t + 0.19955836f;
  p = p * t + 0.084123343f;
  p = p * t + 0.15755840f;
  p = p * t + 0.14907965f;
  Vec power = z * z * -0.72134752f;
#if defined(__AVX512F__)
  Vec r = (Vec)_mm512_reduce_ps((__m512)power, 9);  // the fraction, in [0, 1)
  Vec e = splat(0.013426688f);
  e = e * r + 0.052242465f;
  e = e * r + 0.24128021f;
  e = e * r + 0.69304484f;
  e = e * r + 1.0f;
  e = (Vec)_mm512_scalef_ps((__m512)e, (__m512)power);
#else
  Vec e = vexp(power * 0.69314718f);
#endif
  return vmax(splat(0), x) - z * t * p * e;
}

// The same for float32 results: t = 1 / (1 + 7/20 z), and a relative error of the tail of 4e-7 + 3e-8 z².
SEGVIT_INLINE Vec gelu_float(Vec x) {
  Vec z = vmin(splat(20), vabs(x)), d = z * 0.35f + 1.0f;
#if defined(__AVX512F__)
  Vec t = (Vec)_mm512_rcp14_ps((__m512)d);
  t *= 2.0f - d * t;
#else
  Vec t = 1.0f / d;
#endif
  Vec p = splat(-0.029145928f);
  p = p * t + 0.14397168f;
  p = p * t - 0.25571424f;
  p = p * t + 0.15917413f;
  p = p * t - 0.023109814f;
  p = p * t + 0.10550799f;
  p = p * t + 0.11983287f;
  p = p * t + 0.13986187f;
  p = p * t + 0.13962141f;
  return vmax(splat(0), x) - z * t * p * vexp(z * z * -0.5f);
}

}  // namespace segvit::SEGVIT_ISA
