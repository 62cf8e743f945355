// Tiles of AMX: eight registers of 16 rows of 64 bytes.
//
// A product takes rows of its left factor as they are, 32 bfloat16 a row, and the right factor by pairs of the
// depth: row i holds elements 2i and 2i + 1 of 16 columns. It adds them to 16 x 16 float32 sums; each sum takes
// its terms in the order of the depth. Numbers below the normal range count as zero.
#pragma once

#include "avx512.h"
#if defined(SEGVIT_EMULATE_TILES)
#include "tiles.h"
#endif

namespace segvit::SEGVIT_ISA {

// All eight registers as whole tiles, for as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
#if !defined(SEGVIT_EMULATE_TILES)
    asm volatile("ldtilecfg %0" : : "m"(shapes));
#endif
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace segvit::SEGVIT_ISA
