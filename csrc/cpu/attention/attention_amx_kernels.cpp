// The products of attention in bfloat16 (attention_bf16.h) on AMX.
//
// Of 32 x 32 scores with 64 channels: 128 cycles of products each for S and O, 128 for moving S, and about 6 for each of
// 64 vectors of exponentials, which decide.
#include "../amx.h"
#include "attention_bf16.h"

namespace segvit::SEGVIT_ISA {

namespace {

// Four tiles, side by side and one below the other, rows `stride` bytes apart.
SEGVIT_INLINE void load_four(const char* at, int64_t stride) {
  _tile_loadd(0, at, stride);
  _tile_loadd(1, at + 64, stride);
  _tile_loadd(2, at + kTileRows * stride, stride);
  _tile_loadd(3, at + kTileRows * stride + 64, stride);
}
SEGVIT_INLINE void store_four(char* at, int64_t stride) {
  _tile_stored(0, at, stride);
  _tile_stored(1, at + 64, stride);
  _tile_stored(2, at + kTileRows * stride, stride);
  _tile_stored(3, at + kTileRows * stride + 64, stride);
}
// Two tiles of rows times two of columns.
SEGVIT_INLINE void multiply(const char* upper, const char* lower, const char* left, const char* right, int64_t stride) {
  _tile_loadd(4, upper, 64);
  _tile_loadd(6, left, stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, right, stride);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, lower, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// scores (keys, kColumns) of whole tiles of keys.
__attribute__((noinline)) void score(const char* key_tiles, const char* query_tiles, int64_t keys, int64_t parts,
                                     char* scores) {
  for (int64_t i = 0; i < keys; i += 32) {
    const char* upper = key_tiles + i / 16 * parts * kTileBytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < parts; ++k) {
      const char* right = query_tiles + k * 2 * kTileBytes;
      multiply(upper + k * kTileBytes, upper + (parts + k) * kTileBytes, right, right + kTileBytes, 64);
    }
    store_four(scores + i * kRowBytes, kRowBytes);
  }
}

// output (channels, kColumns) += values times weights, which lie where the scores were, a pair of keys in the first
// of two rows.
__attribute__((noinline)) void accumulate(const char* value_tiles, const char* weights, int64_t keys, int64_t parts,
                                          char* output) {
  for (int64_t part = 0; part < parts; ++part) {
    load_four(output + part * 32 * kRowBytes, kRowBytes);
    for (int64_t i = 0; i < keys; i += 32) {
      const char *upper = value_tiles + (i / 32 * parts + part) * 2 * kTileBytes, *pairs = weights + i * kRowBytes;
      multiply(upper, upper + kTileBytes, pairs, pairs + 64, 2 * kRowBytes);
    }
    store_four(output + part * 32 * kRowBytes, kRowBytes);
  }
}

}  // namespace

void attention(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t query_end, char* scratch) {
  Tiles tiles;
  attention_of(args, batch, head, query, query_end, scratch, score, accumulate);
}

}  // namespace segvit::SEGVIT_ISA
