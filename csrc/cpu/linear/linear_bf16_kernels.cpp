// A linear layer of bfloat16 numbers by AVX512-BF16, which AMD's processors have at twice the rate of float32's
// multiply-adds: LayerNorm of the rows before it, and all that follows in float32. Numbers below the normal range count
// as zero, as AMX has it, whose panels these are.
#include "linear_dots.h"

namespace segvit::SEGVIT_ISA {

void linear(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  int64_t rows = row_end - row, steps = (args.depth + 31) / 32;
  auto* sums = reinterpret_cast<float*>(scratch + (rows + kRows - 1) / kRows * steps * kRowsStep);
  pack_rows(rows, steps, scratch,
            [&](int64_t i, char* to) { pack_row_bf16(args, row_of<bf16>(args, row + i), to, kRowsStep); });
  multiply<bf16, false>(
      args, row, row_end, panel, panel_end, steps, scratch, sums, nullptr,
      [](const char*, __m512i (&start)[kVectors]) { start[0] = start[1] = _mm512_setzero_si512(); },
      [](__m512i total, __m512i left, __m512i right) {
        return (__m512i)_mm512_dpbf16_ps((__m512)total, (__m512bh)left, (__m512bh)right);
      });
}

}  // namespace segvit::SEGVIT_ISA
