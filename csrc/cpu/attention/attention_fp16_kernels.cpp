// Attention of bfloat16 numbers by half-precision multiply-adds, forward, without masks and dropout: one head, all of its
// keys.
//
// As in linear_kernels.cpp numbers are scaled into the range of float16 by a power of two, that of all keys, of all
// values, and of the queries of a panel; a lane adds 32 products in float16 (64 for scores of more than 64 channels),
// and such sums go to float32: an error of 2^-10 of a typical score or result, half of bfloat16's rounding.
//
// A register holds 16 queries by two neighbours of the depth, which are multiplied by two neighbours of a row that the
// load broadcasts. For scores the depth is the channels, and a lane's sum is half a score: two keys' are put together,
// so that a register of scores holds 16 queries by two keys. For results the depth is the keys. So every lane has a
// softmax of its own, over the even or the odd keys of a query, in float32, and the two meet at the end.
//
// Of 64 keys by 16 queries with 64 channels: 1024 cycles of products each for scores and results, 80 for putting scores
// together, some 400 for exponentials, 130 for adding up results. A panel of 48 queries with its scores and results, and
// a tile of 64 keys and values, are 52 KB, so that some of it comes from the second-level cache.
#include "attention_half.h"
#include "../scaled.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = 8, kMostVectors = kTileQueries / 16;
constexpr int64_t kRow = kMostVectors * 64;     // bytes of a row of queries, scores or weights
constexpr int64_t kLanes = kMostVectors * 32;   // of a row of results

// sums += kRows rows of a times b, over `pairs` of the depth. `a` has a row of pairs a row, or, if kTransposed, a
// column.
template <int kVectors, bool kTransposed>
SEGVIT_INLINE void multiply(const int32_t* a, int64_t lda, const char* b, int64_t pairs,
                            __m512h (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_ph();
  for (int64_t k = 0; k < pairs; ++k, b += kRow) {
    __m512h right[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) right[j] = _mm512_load_ph(b + 64 * j);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      __m512h left = (__m512h)_mm512_set1_epi32(kTransposed ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_fmadd_ph(left, right[j], sums[i][j]);
    }
  }
}

// scores (pairs of keys, kMostVectors, 16 queries, 2) of `keys` keys, a multiple of kRows.
template <int kVectors>
__attribute__((noinline)) void score(const int32_t* keys, int64_t row, int64_t count, const char* queries,
                                     int64_t pairs, char* scores) {
  constexpr __mmask32 kOdd = 0xaaaaaaaa;
  for (int64_t key = 0; key < count; key += kRows, keys += kRows * row) {
    __m512h sums[kRows][kVectors];
    multiply<kVectors, false>(keys, row, queries, pairs, sums);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i += 2, scores += kRow)
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) {
        __m512i first = (__m512i)sums[i][j], second = (__m512i)sums[i + 1][j];
        __m512i even = _mm512_mask_blend_epi16(kOdd, first, _mm512_slli_epi32(second, 16));
        __m512i odd = _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(first, 16), second);
        _mm512_store_ph(scores + j * 64, _mm512_add_ph((__m512h)even, (__m512h)odd));
      }
  }
}

SEGVIT_INLINE Vec lower_half(__m512i bits) { return to_float((HalfBits)_mm512_castsi512_si256(bits), f16{}); }
SEGVIT_INLINE Vec upper_half(__m512i bits) { return to_float((HalfBits)_mm512_extracti64x4_epi64(bits, 1), f16{}); }

// Scores of `keys` keys to weights, of one register of lanes; scores are in units of 1 / scale. Gives what results so
// far are to be multiplied by.
SEGVIT_INLINE void softmax(char* scores, int64_t keys, float scale, float* largest, float* sums, float* rescale) {
  constexpr __mmask32 kEven = 0x55555555;
  int64_t rows = keys / 2;
  __m512i end = keys % 2 ? _mm512_load_si512(scores + rows * kRow) : _mm512_setzero_si512();  // no key in odd lanes
  __m512h most[4];
  for (auto& m : most) m = _mm512_castsi512_ph(_mm512_set1_epi16(-0x400));  // minus infinity
  for (int64_t i = 0; i < rows; ++i) most[i % 4] = _mm512_max_ph(most[i % 4], _mm512_load_ph(scores + i * kRow));
  most[0] = _mm512_max_ph(_mm512_max_ph(most[0], most[1]), _mm512_max_ph(most[2], most[3]));
  if (keys % 2) most[0] = _mm512_mask_max_ph(most[0], kEven, most[0], (__m512h)end);
  Vec now[2] = {lower_half((__m512i)most[0]) * scale, upper_half((__m512i)most[0]) * scale}, total[2] = {};
  for (int h = 0; h < 2; ++h) {
    Vec before = load(largest + 16 * h);
    now[h] = vmax(now[h], before);
    // The order of a maximum keeps no NaN, which the scores' own exponentials bring back.
    store(rescale + 16 * h, exp2_of(before - now[h]));
    store(largest + 16 * h, now[h]);
  }
  auto weigh = [&](__m512i bits, __mmask32 seen) {
    Vec first = exp2_of(lower_half(bits) * scale - now[0]), second = exp2_of(upper_half(bits) * scale - now[1]);
    first = (Vec)_mm512_maskz_mov_ps(seen, (__m512)first), second = (Vec)_mm512_maskz_mov_ps(seen >> 16, (__m512)second);
    total[0] += first, total[1] += second;
    return rounded({first, second}, f16{});
  };
  for (int64_t i = 0; i < rows; ++i, scores += kRow) _mm512_store_si512(scores, weigh(_mm512_load_si512(scores), ~0u));
  if (keys % 2) _mm512_store_si512(scores, weigh(end, kEven));
  for (int h = 0; h < 2; ++h) store(sums + 16 * h, load(sums + 16 * h) * load(rescale + 16 * h) + total[h]);
}

// results (channels, kLanes) = results times `rescale` plus values times weights, over pairs of keys.
template <int kVectors>
__attribute__((noinline)) void accumulate(const int32_t* values, int64_t row, int64_t channels, const char* weights,
                                          int64_t pairs, const float* rescale, float* results) {
  for (int64_t d = 0; d < channels; d += kRows, values += kRows) {
    __m512h sums[kRows][kVectors];
    multiply<kVectors, true>(values, row, weights, pairs, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, results += kLanes)
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) {
        float* to = results + j * 32;
        __m512i bits = (__m512i)sums[i][j];
        store(to, load(to) * load(rescale + j * 32) + lower_half(bits));
        store(to + 16, load(to + 16) * load(rescale + j * 32 + 16) + upper_half(bits));
      }
  }
}

// Elements of two registers in turn: those of even or of odd lanes.
SEGVIT_INLINE Vec every_other(Vec first, Vec second, int odd) {
  IVec lanes = iota() * 2 + odd;
  return (Vec)_mm512_permutex2var_ps((__m512)first, (__m512i)lanes, (__m512)second);
}

// Output and log-sum-exp of 16 queries, whose lanes are at `largest`, `sums` and `results`.
void write(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t queries, float exponent,
           const float* largest, const float* sums, const float* results) {
  int64_t dim = args.shape.dim;
  Vec most[2], sum[2], weight[2];
  for (int odd = 0; odd < 2; ++odd) {
    most[odd] = every_other(load(largest), load(largest + 16), odd);
    sum[odd] = every_other(load(sums), load(sums + 16), odd);
  }
  Vec of_both = vmax(most[0], most[1]), total{};
  for (int odd = 0; odd < 2; ++odd) {
    weight[odd] = exp2_of(most[odd] - of_both);
    total += weight[odd] * sum[odd];
  }
  IVec unseen = of_both == kUnseen;
  Vec factor = unseen ? Vec{} : 1 / total;
  for (auto& w : weight) w = (Vec)_mm512_scalef_ps((__m512)(w * factor), _mm512_set1_ps(exponent - kTop));
  float* lse = args.lse + (batch * args.shape.heads + head) * args.shape.queries + query;
  for (int64_t i = 0; i < queries; ++i)
    lse[i] = unseen[i] ? -__builtin_inff() : of_both[i] * kLn2 + __builtin_logf(total[i]);
  for (int64_t d = 0; d < dim; d += 16) {
    Vec rows[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      const float* from = results + (d + r) * kLanes;
      rows[r] = d + r < dim ? every_other(load(from), load(from + 16), 0) * weight[0] +
                                  every_other(load(from), load(from + 16), 1) * weight[1]
                            : Vec{};
    }
    transpose(rows);
    for (int64_t i = 0; i < queries; ++i)
      store_up_to(const_cast<bf16*>(row_of(args.output, batch, query + i, head)) + d, dim - d, rows[i]);
  }
}

}  // namespace

void attention(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t query_end, char* scratch) {
  const AttentionShape& shape = args.shape;
  int64_t dim = shape.dim, row = round_up_to(dim, 32), pairs = (dim + 1) / 2, channels = padded_dim(dim);
  int64_t most_keys = round_up_to(shape.keys, kTileKeys);
  auto* keys = reinterpret_cast<int32_t*>(scratch);         // (keys, pairs of channels)
  int32_t* values = keys + most_keys * row / 2;             // (pairs of keys, channels)
  int32_t* tokens = values + most_keys * row / 2;
  auto* queries = reinterpret_cast<char*>(tokens + most_keys);  // (pairs of channels, 16 queries, 2)
  char* scores = queries + row / 2 * kRow;
  auto* results = reinterpret_cast<float*>(scores + kTileKeys / 2 * kRow);
  float *largest = results + channels * kLanes, *sums = largest + kLanes, *rescale = sums + kLanes;

  int64_t count = 0;
  for (int64_t i = 0; i < shape.keys; ++i)
    if (!shape.padding || !shape.padding[batch * shape.keys + i]) tokens[count++] = i;
  Largest<bf16> of_keys, of_values, of_queries;
  for (int64_t i = 0; i < count; ++i) {
    of_keys.add(row_of(args.key, batch, tokens[i], head), dim);
    of_values.add(row_of(args.value, batch, tokens[i], head), dim);
  }
  float key_exponent = of_keys.exponent(), value_exponent = of_values.exponent();
  auto part = [&](const HeadsView& view, int64_t i, int64_t d, float exponent) {
    return i < count ? scaled(row_of(view, batch, tokens[i], head) + d, dim - d, exponent) : _mm512_setzero_si512();
  };
  __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < round_up_to(count, kRows); i += 2)
    for (int64_t d = 0; d < dim; d += 32) {
      for (int64_t odd = 0; odd < 2; ++odd)
        _mm512_store_si512(keys + ((i + odd) * row + d) / 2, part(args.key, i + odd, d, key_exponent));
      __m512i even = part(args.value, i, d, value_exponent), odd = part(args.value, i + 1, d, value_exponent);
      _mm512_store_si512(values + i / 2 * row + d, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_store_si512(values + i / 2 * row + d + 16, _mm512_permutex2var_epi16(even, second, odd));
    }

  float scale = shape.scale < 0 ? -shape.scale : shape.scale;
  __m512i sign = _mm512_set1_epi16(shape.scale < 0 ? int16_t{-0x8000} : int16_t{0});
  for (; query < query_end; query += kTileQueries) {
    int64_t n = min_of(kTileQueries, query_end - query), vectors = (n + 15) / 16;
    of_queries = {};
    for (int64_t q = 0; q < n; ++q) of_queries.add(row_of(args.query, batch, query + q, head), dim);
    float query_exponent = of_queries.exponent();
    for (int64_t j = 0; j < vectors; ++j)
      for (int64_t d = 0; d < dim; d += 32) {
        __m512i rows[16];
        alignas(64) char square[16 * 64];
        for (int64_t i = 0; i < 16; ++i) {
          int64_t q = j * 16 + i;
          rows[i] = q < n ? _mm512_xor_si512(sign, scaled(row_of(args.query, batch, query + q, head) + d, dim - d,
                                                          query_exponent))
                          : _mm512_setzero_si512();
        }
        store_transposed(rows, square);
        for (int64_t i = 0; i < 16; ++i)
          _mm512_store_si512(queries + (d / 2 + i) * kRow + j * 64, _mm512_load_si512(square + i * 64));
      }
    __builtin_memset(results, 0, channels * kLanes * sizeof(float));
    for (int64_t i = 0; i < kLanes; ++i) largest[i] = kUnseen, sums[i] = 0;
    // Finite: nothing times it is nothing.
    float unit = min_of(3e38f, _mm_cvtss_f32(_mm_scalef_ss(_mm_set_ss(scale * kLog2e),
                                             _mm_set_ss(query_exponent + key_exponent - 2 * kTop))));
    auto* score_of = vectors == 3 ? &score<3> : vectors == 2 ? &score<2> : &score<1>;
    auto* accumulate_of = vectors == 3 ? &accumulate<3> : vectors == 2 ? &accumulate<2> : &accumulate<1>;
    for (int64_t key = 0; key < count; key += kTileKeys) {
      int64_t some = min_of(kTileKeys, count - key);
      score_of(keys + key * row / 2, row / 2, round_up_to(some, kRows), queries, pairs, scores);
      for (int64_t j = 0; j < vectors; ++j)
        softmax(scores + j * 64, some, unit, largest + j * 32, sums + j * 32, rescale + j * 32);
      accumulate_of(values + key / 2 * row, row, channels, scores, (some + 1) / 2, rescale, results);
    }
    for (int64_t j = 0; j < vectors; ++j)
      write(args, batch, head, query + j * 16, min_of<int64_t>(16, n - j * 16), value_exponent, largest + j * 32,
            sums + j * 32, results + j * 32);
  }
}

}  // namespace segvit::SEGVIT_ISA
