// Attention of bfloat16 numbers, forward, without masks and dropout: one head, all of its keys. The products are those of
// the file that includes it: AMX's tiles or AVX512-BF16's dot products, which take the same operands.
//
// Scores lie transposed, S^T = K Q^T: a key a row, queries side by side in vectors, so that the statistics of the
// softmax are vectors too. A product takes its left factor by rows and its right one by pairs of rows, so keys are
// taken as they are, and the weights of two keys, rounded to bfloat16, lie as pairs where O^T += V^T P^T wants
// them. Queries and values are transposed when they are packed, the output when it is written.
//
// 32 queries go over 256 keys at a time: scores (32 KB; the weights take their place), output and queries stay in
// the first-level cache, keys and values in the second-level cache.
#pragma once

#include "attention_half.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int64_t kColumns = kBf16Queries, kRowBytes = kColumns * 4;

SEGVIT_INLINE __m512i load_row(const bf16* row, int64_t d, int64_t dim) {
  return _mm512_maskz_loadu_epi16(first_of_32(dim - d), row + d);
}

// Keys to (16 keys, 32 channels, key, channel), values to (32 keys, 16 channels, channel, key); zeros behind both.
// `token(i)` is the i-th of `keys` tokens; they are asked for in turn.
template <class F>
void pack_keys(const AttentionFwd& args, int64_t batch, int64_t head, int64_t keys, const F& token, char* key_tiles,
               char* value_tiles) {
  int64_t dim = args.shape.dim;
  __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < keys; i += 32) {
    const bf16 *key[32] = {}, *value[32] = {};
    for (int64_t j = 0; j < min_of<int64_t>(32, keys - i); ++j) {
      int64_t at = token(i + j);
      key[j] = row_of(args.key, batch, at, head);
      value[j] = row_of(args.value, batch, at, head);
    }
    auto part = [&](const bf16* row, int64_t d) { return row ? load_row(row, d, dim) : _mm512_setzero_si512(); };
    for (int64_t d = 0; d < dim; d += 32) {
      for (int j = 0; j < 32; ++j) {
        char* tile = key_tiles + (i + j / 16 * 16) * round_up_to(dim, 32) * 2 + d / 32 * kTileBytes;
        _mm512_store_si512(tile + j % 16 * 64, part(key[j], d));
      }
      __m512i low[16], high[16];
      for (int j = 0; j < 16; ++j) {
        __m512i even = part(value[2 * j], d), odd = part(value[2 * j + 1], d);
        low[j] = _mm512_permutex2var_epi16(even, first, odd);
        high[j] = _mm512_permutex2var_epi16(even, second, odd);
      }
      char* tile = value_tiles + i * round_up_to(dim, 32) * 2 + d / 16 * kTileBytes;
      store_transposed(low, tile);
      store_transposed(high, tile + kTileBytes);
    }
  }
}

// Queries to (32 channels, 16 queries, pair of channels, query), negated if asked for; zeros behind.
void pack_queries(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t queries, bool negate,
                  char* tiles) {
  __m512i sign = _mm512_set1_epi16(negate ? int16_t{-0x8000} : int16_t{0});
  for (int64_t d = 0; d < args.shape.dim; d += 32)
    for (int64_t q = 0; q < kColumns; q += 16, tiles += kTileBytes) {
      __m512i rows[16];
      for (int64_t i = 0; i < 16; ++i)
        rows[i] = q + i < queries
                      ? _mm512_xor_si512(load_row(row_of(args.query, batch, query + q + i, head), d, args.shape.dim), sign)
                      : _mm512_setzero_si512();
      store_transposed(rows, tiles);
    }
}

// Scores of `keys` keys to weights, for 16 queries, zeros up to `padded` keys. Returns what sums so far are to be
// multiplied by.
SEGVIT_INLINE Vec softmax(float* scores, int64_t keys, int64_t padded, float scale, float* largest, float* sums) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i pairs = _mm512_load_si512(kPairs);
  Vec most[4];
  for (auto& m : most) m = load(scores);
  int64_t i = 0;
  for (; i + 4 <= keys; i += 4)
    for (int j = 0; j < 4; ++j) most[j] = vmax(most[j], load(scores + (i + j) * kColumns));
  for (; i < keys; ++i) most[0] = vmax(most[0], load(scores + i * kColumns));
  Vec before = load(largest), now = vmax(vmax(most[0], most[1]), vmax(most[2], most[3])) * scale;
  now = vmax(before, now);
  Vec total{}, total2{};
  for (i = 0; i < padded; i += 2) {
    float* at = scores + i * kColumns;
    Vec first = i < keys ? exp2_of(load(at) * scale - now) : Vec{};
    Vec second = i + 1 < keys ? exp2_of(load(at + kColumns) * scale - now) : Vec{};
    total += first, total2 += second;
    _mm512_store_si512(at, _mm512_permutexvar_epi16(pairs, rounded({first, second}, bf16{})));
  }
  Vec factor = before == now ? splat(1) : exp2_of(before - now);
  store(largest, now);
  store(sums, load(sums) * factor + (total + total2));
  return factor;
}

// Output and log-sum-exp of the queries.
void write(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t queries, const float* output,
           const float* largest, const float* sums) {
  int64_t dim = args.shape.dim;
  float factors[kColumns];
  float* lse = args.lse + (batch * args.shape.heads + head) * args.shape.queries + query;
  for (int64_t i = 0; i < queries; ++i) {
    bool unseen = args.shape.padding && largest[i] == kUnseen;
    lse[i] = unseen ? -__builtin_inff() : largest[i] * kLn2 + __builtin_logf(sums[i]);
    factors[i] = unseen ? 0 : 1 / sums[i];
  }
  for (int64_t q = 0; q < queries; q += kWidth)
    for (int64_t d = 0; d < dim; d += 32) {
      Vec low[kWidth], high[kWidth];
      for (int r = 0; r < kWidth; ++r) {
        low[r] = load(output + (d + r) * kColumns + q);
        high[r] = load(output + (d + 16 + r) * kColumns + q);
      }
      transpose(low), transpose(high);
      for (int64_t i = 0; i < min_of<int64_t>(kWidth, queries - q); ++i) {
        auto* to = const_cast<bf16*>(row_of(args.output, batch, query + q + i, head));
        __m512i row = rounded({low[i] * factors[q + i], high[i] * factors[q + i]}, bf16{});
        _mm512_mask_storeu_epi16(to + d, first_of_32(dim - d), row);
      }
    }
}

// `score` and `accumulate` are the products, of whole tiles: scores (keys, kColumns) = keys times queries of `parts` times
// 32 channels; output (channels, kColumns) += values times weights, which lie where the scores were, a pair of keys in the
// first of two rows.
template <class Score, class Accumulate>
void attention_of(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t query_end, char* scratch,
                  const Score& score, const Accumulate& accumulate) {
  const AttentionShape& shape = args.shape;
  int64_t row = round_up_to(shape.dim, 32), parts = row / 32, bytes = round_up_to(shape.keys, 32) * row * 2;
  char *key_tiles = scratch, *value_tiles = key_tiles + bytes, *query_tiles = value_tiles + bytes;
  char* scores = query_tiles + kColumns * row * 2;
  char* output = scores + kBf16Keys * kRowBytes;
  auto *largest = reinterpret_cast<float*>(output + row * kRowBytes), *sums = largest + kColumns;
  int64_t keys = 0;
  if (const bool* padding = shape.padding ? shape.padding + batch * shape.keys : nullptr) {
    // What no query sees is not packed.
    int64_t token = 0;
    for (int64_t i = 0; i < shape.keys; ++i) keys += !padding[i];
    pack_keys(args, batch, head, keys, [&](int64_t) {
      while (padding[token]) ++token;
      return token++;
    }, key_tiles, value_tiles);
  } else {
    keys = shape.keys;
    pack_keys(args, batch, head, keys, [](int64_t i) { return i; }, key_tiles, value_tiles);
  }
  float scale = shape.scale < 0 ? -shape.scale : shape.scale;
  for (; query < query_end; query += kColumns) {
    int64_t queries = min_of(kColumns, query_end - query);
    pack_queries(args, batch, head, query, queries, shape.scale < 0, query_tiles);
    __builtin_memset(output, 0, row * kRowBytes);
    for (int64_t i = 0; i < kColumns; ++i) largest[i] = kUnseen, sums[i] = 0;
    for (int64_t key = 0; key < keys; key += kBf16Keys) {
      int64_t n = min_of(kBf16Keys, keys - key), padded = round_up_to(n, 32);
      score(key_tiles + key * row * 2, query_tiles, padded, parts, scores);
      auto* tile = reinterpret_cast<float*>(scores);
      auto* sum = reinterpret_cast<float*>(output);
      Vec first = softmax(tile, n, padded, scale * kLog2e, largest, sums);
      Vec second = softmax(tile + kWidth, n, padded, scale * kLog2e, largest + kWidth, sums + kWidth);
      for (int64_t i = 0; i < row; ++i, sum += kColumns) {
        store(sum, load(sum) * first);
        store(sum + kWidth, load(sum + kWidth) * second);
      }
      accumulate(value_tiles + key * row * 2, scores, padded, parts, output);
    }
    write(args, batch, head, query, queries, reinterpret_cast<const float*>(output), largest, sums);
  }
}

}  // namespace

}  // namespace segvit::SEGVIT_ISA
