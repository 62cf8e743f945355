// The products of attention in bfloat16 (attention_bf16.h) by AVX512-BF16's dot products, which AMD's processors make at
// twice the rate of float32's multiply-adds (Intel's at the same rate: there AVX512-FP16 or AMX go before).
//
// A lane of a register is a query, and holds two neighbours of the depth. Eight rows of the left factor by 32 queries are
// 16 sums; a step of the depth takes two loads and eight broadcasts of a pair for 16 products. Numbers below the normal
// range count as zero, as AMX has it.
#include "attention_bf16.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = 8;

SEGVIT_INLINE __m512bh pairs_at(const char* from) { return (__m512bh)_mm512_load_si512(from); }

// sums += kRows rows of a tile times 16 pairs of rows of the right factor, `stride` bytes apart, and `beside` it.
SEGVIT_INLINE void multiply(const char* rows, const char* right, int64_t beside, int64_t stride, Vec (&sums)[kRows][2]) {
  auto* left = reinterpret_cast<const int32_t*>(rows);
#pragma GCC unroll 4
  for (int64_t k = 0; k < 16; ++k, right += stride) {
    __m512bh first = pairs_at(right), second = pairs_at(right + beside);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      auto row = (__m512bh)_mm512_set1_epi32(left[i * 16 + k]);
      sums[i][0] = (Vec)_mm512_dpbf16_ps((__m512)sums[i][0], row, first);
      sums[i][1] = (Vec)_mm512_dpbf16_ps((__m512)sums[i][1], row, second);
    }
  }
}

SEGVIT_INLINE void load_rows(const char* from, Vec (&sums)[kRows][2]) {
  auto* at = reinterpret_cast<const float*>(from);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i][0] = load(at + i * kColumns), sums[i][1] = load(at + i * kColumns + kWidth);
}
SEGVIT_INLINE void store_rows(char* to, const Vec (&sums)[kRows][2]) {
  auto* at = reinterpret_cast<float*>(to);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) store(at + i * kColumns, sums[i][0]), store(at + i * kColumns + kWidth, sums[i][1]);
}

__attribute__((noinline)) void score(const char* key_tiles, const char* query_tiles, int64_t keys, int64_t parts,
                                     char* scores) {
  for (int64_t i = 0; i < keys; i += kRows, scores += kRows * kRowBytes) {
    const char* rows = key_tiles + i / 16 * parts * kTileBytes + i % 16 * 64;
    Vec sums[kRows][2] = {};
    for (int64_t k = 0; k < parts; ++k)
      multiply(rows + k * kTileBytes, query_tiles + k * 2 * kTileBytes, kTileBytes, 64, sums);
    store_rows(scores, sums);
  }
}

__attribute__((noinline)) void accumulate(const char* value_tiles, const char* weights, int64_t keys, int64_t parts,
                                          char* output) {
  for (int64_t d = 0; d < parts * 32; d += kRows, output += kRows * kRowBytes) {
    Vec sums[kRows][2];
    load_rows(output, sums);
    const char* rows = value_tiles + d / 16 * kTileBytes + d % 16 * 64;
    for (int64_t i = 0; i < keys; i += 32)
      multiply(rows + i / 16 * parts * kTileBytes, weights + i * kRowBytes, 64, 2 * kRowBytes, sums);
    store_rows(output, sums);
  }
}

}  // namespace

void attention(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t query_end, char* scratch) {
  attention_of(args, batch, head, query, query_end, scratch, score, accumulate);
}

}  // namespace segvit::SEGVIT_ISA
