// A linear layer with int8 weights by AVX512-VNNI, 256 multiply-adds a core-cycle with two units: four times float32's.
//
// The instruction multiplies unsigned by signed numbers. So 128 is added to the rows' numbers, which are rounded to
// -127...127, and the sums start at -128 times a column's weights. Products and sums are exact: the results are
// those of AMX, bit by bit, whose layout of weights is used: 64 bytes are four of the depth of 16 columns.
//
// Tiling: 12 rows by 32 columns, the accumulators in 24 registers. Four of the depth take 24 products, 12 cycles, and
// 14 loads, of which 12 broadcast four numbers of a row. Rows were packed in the order in which they pass. A panel of
// weights (32 bytes a unit of depth) is read again for every 12 rows, at 11 bytes a cycle from the second-level cache
// where it is larger than the first; the next panel comes ahead.
#include "linear_rows.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = kVnniRows, kVectors = 2;
constexpr int64_t kRowsStep = kRows * 64, kPanelStep = kTilePanel * 64;  // bytes of 64 of the depth

// Rows to (group, step, row, 64 bytes).
template <class T>
void pack(const Linear& args, int64_t row, int64_t row_end, int64_t steps, char* packed, float* values, float* scales) {
  for (int64_t i = 0; i < (row_end - row + kRows - 1) / kRows * kRows; ++i) {
    char* to = packed + i / kRows * steps * kRowsStep + i % kRows * 64;
    if (row + i < row_end) {
      scales[i] = pack_row_int8(args, row_of<T>(args, row + i), values, to, kRowsStep, '\x80');
    } else {
      for (int64_t k = 0; k < steps; ++k) _mm512_store_si512(to + k * kRowsStep, _mm512_setzero_si512());
    }
  }
}

// What the sums of a panel start with.
SEGVIT_INLINE void start_of(const char* panel, int64_t steps, __m512i start[kVectors]) {
  __m512i offset = _mm512_set1_epi8('\x80');
  for (int j = 0; j < kVectors; ++j) {
    __m512i sums[2] = {};
    for (int64_t k = 0; k < steps; ++k)
      for (int i = 0; i < 16; ++i)
        sums[i % 2] = _mm512_dpbusd_epi32(
            sums[i % 2], offset, _mm512_loadu_si512(panel + k * kPanelStep + (j * 16 + i) * 64));
    start[j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_add_epi32(sums[0], sums[1]));
  }
}

// sums (kRows, kTilePanel) = a group of rows times a panel; `lines` cache lines a step from `ahead` on are brought into
// the second-level cache.
__attribute__((noinline)) void product(const char* rows, const char* panel, int64_t steps,
                                       const __m512i start[kVectors], int32_t* sums, const char* ahead,
                                       int64_t lines) {
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
        for (int j = 0; j < kVectors; ++j) total[i][j] = _mm512_dpbusd_epi32(total[i][j], left, right[j]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) _mm512_store_si512(sums + i * kTilePanel + j * 16, total[i][j]);
}

template <class T>
void linear_of(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  int64_t steps = (args.depth + 63) / 64, groups = (row_end - row + kRows - 1) / kRows;
  auto* sums = reinterpret_cast<int32_t*>(scratch + groups * steps * kRowsStep);
  auto* values = reinterpret_cast<float*>(sums + kRows * kTilePanel);
  float* scales = values + steps * 64;
  pack<T>(args, row, row_end, steps, scratch, values, scales);
  // Every group of rows fetches a part of the next panel.
  int64_t lines = (kPanelStep / 64 + groups - 1) / groups;
  for (; panel < panel_end; ++panel) {
    const char* weights = reinterpret_cast<const char*>(args.panels) + panel * steps * kPanelStep;
    bool more = panel + 1 < panel_end;
    __m512i start[kVectors];
    start_of(weights, steps, start);
    for (int64_t group = 0; group < groups; ++group) {
      const char* ahead = weights + steps * (kPanelStep + group * lines * 64);
      product(scratch + group * steps * kRowsStep, weights, steps, start, sums, ahead, more ? lines : 0);
      for (int64_t i = 0; i < kRows && row + group * kRows + i < row_end; ++i)
        finish<T, true>(args, reinterpret_cast<const float*>(sums + i * kTilePanel), row + group * kRows + i,
                        scales[group * kRows + i], panel * kTilePanel);
    }
  }
  if (args.stream) _mm_sfence();
}

}  // namespace

void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  (args.type == Type::f32 ? linear_of<float> : args.type == Type::f16 ? linear_of<f16> : linear_of<bf16>)(
      args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
