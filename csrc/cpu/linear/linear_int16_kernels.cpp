// A linear layer with int8 weights on AVX2, by products of int16 numbers, of which two are added in 32 bits: 32
// multiply-adds a core-cycle where the unit for sums is another one, twice float32's; the instruction for unsigned bytes
// would saturate. Products and sums are exact, and the layout of weights is AMX's: 64 bytes are four of the depth of 16
// columns.
//
// Tiling: 6 rows by 8 columns. Four of the depth take 12 products and 12 sums, two loads of weights, which become int16 on
// the way, and 6 broadcasts of four numbers of a row. A register holds four columns, two sums of each, added at the end. Rows
// were packed as int16 in the order in which they pass; a quarter of a panel (8 bytes a unit of depth) stays in the
// first-level cache.
#include "linear_rows.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = kFloatRows;
constexpr int64_t kLine = 32;  // of the depth of a row, as int16, lie together
constexpr int64_t kStep = 64, kTileRow = 64, kPanelStep = kTilePanel * kStep;

// Rows to (group, line, row, 32 numbers).
template <class T>
void pack(const Linear& args, int64_t row, int64_t row_end, int64_t lines, int16_t* packed, float* values,
          float* scales) {
  for (int64_t i = 0; i < (row_end - row + kRows - 1) / kRows * kRows; ++i) {
    int16_t* to = packed + (i / kRows * lines * kRows + i % kRows) * kLine;
    scales[i] = row + i < row_end ? scale_of_row(args, row_of<T>(args, row + i), values) : 0;
    Vec factor = factor_of(scales[i]);
    for (int64_t line = 0; line < lines; ++line, to += kRows * kLine)
      for (int64_t k = 0; k < kLine; k += 16) {
        int64_t at = line * kLine + k;
        __m256i nearest = _mm256_setzero_si256();
        if (at < args.depth && row + i < row_end) {
          __m256i first = _mm256_cvtps_epi32((__m256)(load(values + at) * factor));
          __m256i second = _mm256_cvtps_epi32((__m256)(load(values + at + 8) * factor));
          nearest = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
          // A number that is not finite becomes one beyond int8's range; its row's scale is not a number.
          nearest = _mm256_max_epi16(_mm256_min_epi16(nearest, _mm256_set1_epi16(127)), _mm256_set1_epi16(-128));
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + k), nearest);
      }
  }
}

// sums (kRows, kTilePanel) = a group of rows times 8 columns of a panel.
__attribute__((noinline)) void product(const int16_t* rows, const char* panel, int64_t lines, int32_t* sums) {
  __m256i total[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) total[i][0] = total[i][1] = _mm256_setzero_si256();
  for (int64_t line = 0; line < lines; ++line, rows += kRows * kLine) {
    const char* weights = panel + line / 2 * kPanelStep + line % 2 * 8 * kTileRow;
#pragma GCC unroll 4
    for (int k = 0; k < 8; ++k) {  // four of the depth
      __m256i right[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        right[j] = _mm256_cvtepi8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + k * kTileRow + j * 16)));
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        int64_t four;
        __builtin_memcpy(&four, rows + i * kLine + k * 4, 8);
        __m256i left = _mm256_set1_epi64x(four);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          total[i][j] = _mm256_add_epi32(total[i][j], _mm256_madd_epi16(left, right[j]));
          asm("" : "+x"(total[i][j]));  // in this order 16 registers are enough
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    __m256i both = _mm256_permute4x64_epi64(_mm256_hadd_epi32(total[i][0], total[i][1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i * kTilePanel), both);
  }
}

template <class T>
void linear_of(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  int64_t steps = (args.depth + kStep - 1) / kStep, lines = 2 * steps;
  int64_t groups = (row_end - row + kRows - 1) / kRows;
  auto* packed = reinterpret_cast<int16_t*>(scratch);
  auto* sums = reinterpret_cast<int32_t*>(packed + groups * lines * kRows * kLine);
  auto* values = reinterpret_cast<float*>(sums + groups * kRows * kTilePanel);
  float* scales = values + steps * kStep;
  pack<T>(args, row, row_end, lines, packed, values, scales);
  for (; panel < panel_end; ++panel) {
    const char* weights = reinterpret_cast<const char*>(args.panels) + panel * steps * kPanelStep;
    for (int part = 0; part < 4; ++part)  // tiles of 16 columns, halves of these
      for (int64_t group = 0; group < groups; ++group)
        product(packed + group * lines * kRows * kLine, weights + part / 2 * 16 * kTileRow + part % 2 * 32, lines,
                sums + group * kRows * kTilePanel + part * 8);
    for (int64_t i = 0; row + i < row_end; ++i)
      finish<T, true>(args, reinterpret_cast<const float*>(sums + i * kTilePanel), row + i, scales[i],
                      panel * kTilePanel);
  }
}

}  // namespace

void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  (args.type == Type::f32 ? linear_of<float> : args.type == Type::f16 ? linear_of<f16> : linear_of<bf16>)(
      args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
