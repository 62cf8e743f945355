// A linear layer by AVX-512's dot products, of which a lane adds neighbours of the depth: four of int8 (VNNI) or two of
// bfloat16. Both take the panels of AMX: 64 bytes are such neighbours of 16 columns.
//
// Tiling: 12 rows by 32 columns, the accumulators in 24 registers. A step of 64 bytes of a row takes 16 times 24 products
// and 14 loads, of which 12 broadcast four bytes of a row. Rows were packed in the order in which they pass. A panel of
// weights is read again for every 12 rows, at 11 bytes a cycle from the second-level cache where it is larger than the
// first; the next panel comes ahead.
#pragma once

#include "linear_rows.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = kDotRows, kVectors = 2;
constexpr int64_t kRowsStep = kRows * 64, kPanelStep = kTilePanel * 64;  // bytes of a step

// Rows to (group, step, row, 64 bytes): `pack_row(i, to)` writes one, 64 bytes each kRowsStep; zeros behind them.
template <class F>
void pack_rows(int64_t rows, int64_t steps, char* packed, const F& pack_row) {
  for (int64_t i = 0; i < (rows + kRows - 1) / kRows * kRows; ++i) {
    char* to = packed + i / kRows * steps * kRowsStep + i % kRows * 64;
    if (i < rows) {
      pack_row(i, to);
    } else {
      for (int64_t k = 0; k < steps; ++k) _mm512_store_si512(to + k * kRowsStep, _mm512_setzero_si512());
    }
  }
}

// sums (kRows, kTilePanel) = start and a group of rows times a panel; `lines` cache lines a step from `ahead` on are
// brought into the second-level cache.
template <class Dot>
SEGVIT_INLINE void product(const char* rows, const char* panel, int64_t steps, const __m512i start[kVectors],
                           float* sums, const char* ahead, int64_t lines, const Dot& dot) {
  __m512i total[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) total[i][j] = start[j];
  for (int64_t step = 0; step < steps; ++step, rows += kRowsStep, panel += kPanelStep) {
    for (int64_t i = 0; i < lines; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 4
    for (int k = 0; k < 16; ++k) {
      __m512i right[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_si512(panel + (j * 16 + k) * 64);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        __builtin_memcpy(&four, rows + i * 64 + k * 4, 4);
        __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) total[i][j] = dot(total[i][j], left, right[j]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) _mm512_store_si512(sums + i * kTilePanel + j * 16, total[i][j]);
}

// All packed rows times panels, and what follows. `start_of(panel, start)` gives what the sums of a panel start with;
// `scales` are those of int8 rows.
template <class T, bool kInt8, class Start, class Dot>
SEGVIT_INLINE void multiply(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                            int64_t steps, const char* packed, float* sums, const float* scales, const Start& start_of,
                            const Dot& dot) {
  int64_t groups = (row_end - row + kRows - 1) / kRows;
  // Every group of rows fetches a part of the next panel.
  int64_t lines = (kPanelStep / 64 + groups - 1) / groups;
  for (; panel < panel_end; ++panel) {
    const char* weights = reinterpret_cast<const char*>(args.panels) + panel * steps * kPanelStep;
    bool more = panel + 1 < panel_end;
    __m512i start[kVectors];
    start_of(weights, start);
    for (int64_t group = 0; group < groups; ++group) {
      const char* ahead = weights + steps * (kPanelStep + group * lines * 64);
      product(packed + group * steps * kRowsStep, weights, steps, start, sums, ahead, more ? lines : 0, dot);
      for (int64_t i = 0; i < kRows && row + group * kRows + i < row_end; ++i)
        finish<T, kInt8>(args, sums + i * kTilePanel, row + group * kRows + i,
                         kInt8 ? scales[group * kRows + i] : 1, panel * kTilePanel);
    }
  }
  if (args.stream) _mm_sfence();
}

}  // namespace

}  // namespace segvit::SEGVIT_ISA
