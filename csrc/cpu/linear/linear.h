#pragma once

#include "../isa.h"

namespace segvit {

struct Linear {
  const char *input, *bias;  // elements of `type`; bias may be null
  int64_t outer_stride, row_stride, rows_per_outer;  // of the input, whose last stride is 1; in elements
  Type type;
  const uint16_t* panels;  // packed weights, the layout of which stands in segvit_kernels/ops/linear.py
  const float* factors;    // of every column, padded to panels: exponents (AVX512-FP16), scales (int8), or null
  char* output;            // contiguous
  int64_t depth, columns;
  bool gelu;
  // Not with AVX512-FP16; each of these may be null, and has elements of `type`.
  const char *norm_weight, *norm_bias;  // LayerNorm of the input's rows, where there is a weight
  float norm_eps;
  const char *scale, *residual;  // of every column; contiguous as the output
  bool stream;                   // past the caches, where the output is larger than they are
};

// With AVX512-FP16: a panel of packed weights is so many columns of the result, all of the depth.
constexpr int64_t kPanelColumns = 48;
// What the depth is padded to, and the granule of the rows that are packed together.
constexpr int64_t kPackedDepth = 32, kPackedRows = 8;

inline int64_t linear_scratch_bytes(int64_t rows, int64_t depth) {
  int64_t padded = (depth + kPackedDepth - 1) / kPackedDepth * kPackedDepth;
  return rows * padded * 2 + (rows + 15) / 16 * 64 + kPackedRows * kPanelColumns * 2 * 4;
}

// With AMX: columns of a panel, and of the two that go together; the granule of rows. Dot products have these panels too.
constexpr int64_t kTilePanel = 32, kTileWide = 2 * kTilePanel, kTileGroup = 32, kDotRows = 12;

// Of a row of int8 numbers, half as many: its numbers in float32 and all rows' scales.
inline int64_t linear_amx_scratch_bytes(int64_t rows, int64_t depth) {
  int64_t padded = (depth + 63) / 64 * 64;
  return rows * padded * 2 + 2 * rows * kTileWide * 4 + padded * 4 + rows * 4;
}

// Of bfloat16 and, of half as many bytes, int8 numbers.
inline int64_t linear_dots_scratch_bytes(int64_t rows, int64_t depth) {
  int64_t padded = (depth + 63) / 64 * 64;
  return rows * padded * 2 + kDotRows * kTilePanel * 4 + padded * 4 + rows * 4;
}

// Products of float32 numbers, with AVX2 and AVX-512, or int16 ones, with AVX2.
constexpr int64_t kFloatRows = 6, kFloatRows512 = 12;

inline int64_t linear_float_scratch_bytes(int64_t rows, int64_t depth) {
  int64_t padded = (depth + 31) / 32 * 32;
  return rows * padded * 4 + kFloatRows512 * kTilePanel * 4;
}

inline int64_t linear_int16_scratch_bytes(int64_t rows, int64_t depth) {
  int64_t padded = (depth + 63) / 64 * 64;
  return rows * padded * 2 + rows * kTilePanel * 4 + padded * 4 + rows * 4;
}

}  // namespace segvit

// Rows and panels first...last of the result. `scratch`: the bytes above, of the rows rounded up to their granule.
#if defined(SEGVIT_AVX512_FP16)
namespace segvit::avx512_fp16 {
void linear(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
}  // namespace segvit::avx512_fp16
#endif
#if defined(SEGVIT_X86)
namespace segvit::avx2 {
void linear_float(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
}  // namespace segvit::avx2
namespace segvit::avx512 {
void linear_float(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
}  // namespace segvit::avx512
#endif
#if defined(SEGVIT_AVX512_BF16)
namespace segvit::avx512_bf16 {
void linear(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
}  // namespace segvit::avx512_bf16
#endif
#if defined(SEGVIT_AMX)
namespace segvit::amx {
void linear(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch);
}  // namespace segvit::amx
#endif
