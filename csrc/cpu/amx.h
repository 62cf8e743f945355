// Tiles of AMX: eight registers of 16 rows of 64 bytes.
//
// A product takes rows of its left factor as they are, 32 bfloat16 a row, and the right factor by pairs of the
// depth: row i holds elements 2i and 2i + 1 of 16 columns. It adds them to 16 x 16 float32 sums; each sum takes
// its terms in the order of the depth. Numbers below the normal range count as zero.
#pragma once

#include "simd.h"

namespace segvit::SEGVIT_ISA {

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kTileDepth = 32;  // bfloat16 numbers of a row

// All eight registers as whole tiles, for as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// 32 numbers, the first 16 in the lower half, rounded to nearest.
SEGVIT_INLINE __m512i to_bf16(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// The first n of 32 numbers; the others are zero and are not touched in memory.
SEGVIT_INLINE __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// The lower and the upper half of 32 numbers.
SEGVIT_INLINE Vec lower(__m512i bits) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
}
SEGVIT_INLINE Vec upper(__m512i bits) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
}

}  // namespace segvit::SEGVIT_ISA
