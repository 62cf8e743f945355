// A linear layer with int8 weights by AVX512-VNNI, 256 multiply-adds a core-cycle with two units: four times float32's.
//
// The instruction multiplies unsigned by signed numbers. So 128 is added to the rows' numbers, which are rounded to
// -127...127, and the sums start at -128 times a column's weights. Products and sums are exact: the results are
// those of AMX, bit by bit.
#include "linear_dots.h"

namespace segvit::SEGVIT_ISA {

namespace {

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

template <class T>
void linear_of(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  int64_t rows = row_end - row, steps = (args.depth + 63) / 64;
  auto* sums = reinterpret_cast<float*>(scratch + (rows + kRows - 1) / kRows * steps * kRowsStep);
  float *values = sums + kRows * kTilePanel, *scales = values + steps * 64;
  pack_rows(rows, steps, scratch, [&](int64_t i, char* to) {
    scales[i] = pack_row_int8(args, row_of<T>(args, row + i), values, to, kRowsStep, '\x80');
  });
  multiply<T, true>(
      args, row, row_end, panel, panel_end, steps, scratch, sums, scales,
      [&](const char* weights, __m512i (&start)[kVectors]) { start_of(weights, steps, start); },
      [](__m512i total, __m512i left, __m512i right) { return _mm512_dpbusd_epi32(total, left, right); });
}

}  // namespace

void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  (args.type == Type::f32 ? linear_of<float> : args.type == Type::f16 ? linear_of<f16> : linear_of<bf16>)(
      args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
