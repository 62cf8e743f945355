#pragma once

#include "isa.h"

namespace segvit {

// A panel of packed weights: so many columns of the result, all of the depth. The layout stands in
// segvit_kernels/ops/linear.py.
constexpr int64_t kPanelColumns = 48;
// What the depth is padded to, and the granule of the rows that are packed together.
constexpr int64_t kPackedDepth = 32, kPackedRows = 8;

struct Linear {
  const char *input, *bias;  // elements of `type`; bias may be null
  int64_t outer_stride, row_stride, rows_per_outer;  // of the input, whose last stride is 1; in elements
  Type type;
  const uint16_t* panels;  // float16: panel, pair of the depth, column, element of the pair
  const float* exponents;  // of every column, padded to panels
  char* output;            // contiguous
  int64_t depth, columns;
  bool gelu;
};

inline int64_t linear_scratch_bytes(int64_t rows, int64_t depth) {
  int64_t padded = (depth + kPackedDepth - 1) / kPackedDepth * kPackedDepth;
  return rows * padded * 2 + (rows + 15) / 16 * 64 + kPackedRows * kPanelColumns * 2 * 4;
}

}  // namespace segvit

#if defined(SEGVIT_AVX512_FP16)
namespace segvit::avx512_fp16 {
// Rows and panels first...last of the result. `scratch`: linear_scratch_bytes of the rows, rounded up to
// kPackedRows.
void linear(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
}  // namespace segvit::avx512_fp16
#endif
