// The tile instructions of AMX as ordinary code, so that its kernels are tested where no processor has them; a build of
// its own (`make tiles`). Sums are taken in the same order, numbers below the normal range count as zero.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace segvit::SEGVIT_ISA {

inline thread_local unsigned char emulated_tiles[8][1024];

inline void load_tile(int tile, const void* from, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) memcpy(emulated_tiles[tile] + i * 64, static_cast<const char*>(from) + i * stride, 64);
}

inline void store_tile(int tile, void* to, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, emulated_tiles[tile] + i * 64, 64);
}

inline float number(int8_t value) { return value; }
inline float number(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>((bits & 0x7f80) == 0 ? bits & 0x8000 : bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// sums (16, 16) += left (16, 4 bytes a column) times right, which has as many elements of the depth in a row.
template <class T, class Sum>
void multiply_tiles(int sums, int left, int right) {
  constexpr int kElements = 4 / sizeof(T);
  auto* c = reinterpret_cast<Sum*>(emulated_tiles[sums]);
  auto* a = reinterpret_cast<const T*>(emulated_tiles[left]);
  auto* b = reinterpret_cast<const T*>(emulated_tiles[right]);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int i = 0; i < kElements; ++i)
          c[m * 16 + n] += static_cast<Sum>(number(a[(m * 16 + k) * kElements + i]) * number(b[(k * 16 + n) * kElements + i]));
}

}  // namespace segvit::SEGVIT_ISA

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_zero(tile) memset(emulated_tiles[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) load_tile(tile, from, stride)
#define _tile_stream_loadd(tile, from, stride) load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) store_tile(tile, to, stride)
#define _tile_dpbssd(sums, left, right) multiply_tiles<int8_t, int32_t>(sums, left, right)
#define _tile_dpbf16ps(sums, left, right) multiply_tiles<uint16_t, float>(sums, left, right)
#define _tile_release()
