// A linear layer of float16 or bfloat16 numbers by half-precision multiply-adds, at 64 a core-cycle: twice the
// rate of float32, which AVX512-BF16's dot products do not exceed either.
//
// Range: every row of the input and every column of weights is scaled by a power of two so that its largest
// finite number lies in [2^3, 2^4): bfloat16 numbers are then exact in float16 down to 2^-20 of the largest,
// and err by 2^-28 of it below. The scales come off at the end, in float32.
// Sums: a lane of a register adds kChain = 32 products in float16; kChains = 4 such sums are added up, less
// than 2^15 in magnitude, and go into float32. Each rounding is one of a small sum: together they are 2^-10 of
// a typical result, half of a bfloat16 result's rounding, however many terms there are.
//
// Tiling: 8 rows by 48 columns, the accumulators in 24 registers. The depth goes by pairs: a register holds the
// pairs of 16 columns, and a pair of the input is broadcast by the load itself, as a 16-bit number could not
// be. A pair takes 24 multiply-adds, 12 cycles, and 11 loads; ends of chains take 140 cycles for every 1536.
// A task packs its rows, up to 128 (2 bytes an element), and runs panels of weights (96 bytes a unit of depth)
// over them: rows, a panel and the next one stay in the second-level cache, which gives 19 of its 64 bytes a
// cycle; the next panel comes at a byte a cycle, fetched ahead.
#include "gelu.h"
#include "linear.h"
#include "../scaled.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = kPackedRows, kVectors = kPanelColumns / 16;
constexpr int64_t kChain = 32;  // pairs, and so products of a lane
constexpr int64_t kChains = 4;  // that go to float32 together
constexpr int64_t kTile = kRows * kPanelColumns * 2;

// ---- packing of the input ----

// 8 rows to (pair, row): of the 16 pairs of 32 numbers, the order is 0, 4, 8, 12, 1, 5, ..., that of the panels,
// which two rounds of interleaving within lanes leave.
template <class T>
SEGVIT_INLINE void pack_rows(const T* const rows[kRows], const float* exponents, int64_t depth, int32_t* out) {
  for (int64_t k = 0; k < depth; k += kPackedDepth) {
    __m512i r[kRows], s[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
      r[i] = rows[i] ? scaled(rows[i] + k, depth - k, exponents[i]) : _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i += 2) {
      s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // r[j] and r[j + 4]: pair j of every lane, of rows 0 to 3 and 4 to 7.
#pragma GCC unroll 2
    for (int i = 0; i < kRows; i += 4) {
      r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_si512(out, _mm512_permutex2var_epi64(r[j], low, r[j + 4]));
      _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(r[j], high, r[j + 4]));
      out += 32;
    }
  }
}

// ---- product ----

// sums (kRows, kPanelColumns, 2) = rows times a panel, over `pairs` of the depth. From `ahead` on, `lines` cache
// lines a chain are brought into the second-level cache.
__attribute__((noinline)) void product(const int32_t* rows, const uint16_t* panel, int64_t pairs, float* sums,
                                       const char* ahead, int64_t lines) {
  alignas(64) uint16_t ends[kTile];
  for (int64_t begin = 0, chains = 1; begin < pairs; begin += kChain, ++chains) {
    int64_t length = min_of(pairs - begin, kChain);
    __m512h chain[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) chain[i][j] = _mm512_setzero_ph();
    for (int64_t k = 0; k < length; ++k) {
      __m512h right[kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_ph(panel + 32 * j);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        __m512h left = (__m512h)_mm512_set1_epi32(rows[i]);
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) chain[i][j] = _mm512_fmadd_ph(left, right[j], chain[i][j]);
      }
      rows += kRows;
      panel += 2 * kPanelColumns;
    }
    for (int64_t i = 0; i < lines; ++i) _mm_prefetch(ahead + i * 64, _MM_HINT_T1);
    ahead += lines * 64;
    bool first = chains % kChains == 1;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) {
        uint16_t* end = ends + (i * kVectors + j) * 32;
        _mm512_store_ph(end, first ? chain[i][j] : _mm512_add_ph(chain[i][j], _mm512_load_ph(end)));
      }
    if (chains % kChains && begin + kChain < pairs) continue;
    if (chains <= kChains) {
      for (int64_t i = 0; i < kTile; i += kWidth) store(sums + i, load(reinterpret_cast<const f16*>(ends) + i));
    } else {
      for (int64_t i = 0; i < kTile; i += kWidth)
        store(sums + i, load(sums + i) + load(reinterpret_cast<const f16*>(ends) + i));
    }
  }
}

// ---- results ----

template <class T>
SEGVIT_INLINE void finish(const Linear& args, const float* sums, float exponent, int64_t first, T* out) {
  __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int j = 0; j < kVectors; ++j) {
    int64_t column = first + 16 * j, count = args.columns - column;
    if (count <= 0) return;
    __m512 a = (__m512)load(sums + 32 * j), b = (__m512)load(sums + 32 * j + 16);
    Vec total = (Vec)_mm512_permutex2var_ps(a, even, b) + (Vec)_mm512_permutex2var_ps(a, odd, b);
    Vec scale = load(args.factors + column) + (exponent - 2 * kTop);
    total = (Vec)_mm512_scalef_ps((__m512)total, (__m512)scale);
    const T* bias = reinterpret_cast<const T*>(args.bias);
    if (bias) total += count >= 16 ? load(bias + column) : load_some(bias + column, count);
    if (args.gelu) total = gelu(total);
    count >= 16 ? store(out + column, total) : store_some(out + column, count, total);
  }
}

template <class T>
void linear_of(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
               char* scratch) {
  int64_t pairs = (args.depth + kPackedDepth - 1) / kPackedDepth * kPackedDepth / 2;
  int64_t blocks = (row_end - row + kRows - 1) / kRows;
  auto* packed = reinterpret_cast<int32_t*>(scratch);
  auto* sums = reinterpret_cast<float*>(packed + blocks * kRows * pairs);
  float* exponents = sums + kTile;
  for (int64_t block = 0; block < blocks; ++block) {
    const T* rows[kRows] = {};
    float* exponent = exponents + block * kRows;
    for (int64_t i = 0; i < kRows; ++i) {
      int64_t r = row + block * kRows + i;
      if (r >= row_end) break;
      rows[i] = reinterpret_cast<const T*>(args.input) + r / args.rows_per_outer * args.outer_stride +
                r % args.rows_per_outer * args.row_stride;
      Largest<T> most;
      most.add(rows[i], args.depth);
      exponent[i] = most.exponent();
    }
    pack_rows(rows, exponent, args.depth, packed + block * kRows * pairs);
  }
  // Every block of rows fetches a part of the next panel.
  int64_t panel_size = pairs * 2 * kPanelColumns, chains = (pairs + kChain - 1) / kChain;
  int64_t lines = (panel_size / 32 + chains * blocks - 1) / (chains * blocks);
  for (; panel < panel_end; ++panel)
    for (int64_t block = 0; block < blocks; ++block) {
      const uint16_t* weights = args.panels + panel * panel_size;
      auto* ahead = reinterpret_cast<const char*>(weights + panel_size) + block * chains * lines * 64;
      product(packed + block * kRows * pairs, weights, pairs, sums, ahead, panel + 1 < panel_end ? lines : 0);
      for (int64_t i = 0; i < kRows; ++i) {
        int64_t r = row + block * kRows + i;
        if (r >= row_end) break;
        finish(args, sums + i * 2 * kPanelColumns, exponents[block * kRows + i], panel * kPanelColumns,
               reinterpret_cast<T*>(args.output) + r * args.columns);
      }
    }
}

}  // namespace

void linear(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  (args.type == Type::f16 ? linear_of<f16> : linear_of<bf16>)(args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
