// A linear layer with weights in half precision and products in float32, for processors whose half-precision numbers
// are for storage alone: there PyTorch's own product of them has a tenth of float32's rate.
//
// Tiling: kRows rows by 16 columns with AVX2 (12 accumulators of 16 registers). One of the depth takes 12 multiply-adds,
// 6 cycles, two loads of weights, which become float32 on the way, and 6 numbers of rows, broadcast by the load. Rows were
// packed in float32 in the order in which they pass. A panel (32 bytes a unit of depth and half) is read again from the
// second-level cache for every group of rows, at 5 bytes a cycle.
#include "linear_rows.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = kFloatRows, kVectors = 16 / kWidth;
constexpr int64_t kLine = 16;  // of the depth of a row lie together

// Rows to (group, line, row, 16 numbers).
template <class T>
void pack(const Linear& args, int64_t row, int64_t row_end, int64_t lines, float* packed) {
  for (int64_t i = 0; i < (row_end - row + kRows - 1) / kRows * kRows; ++i) {
    float* to = packed + (i / kRows * lines * kRows + i % kRows) * kLine;
    if (row + i >= row_end) {
      for (int64_t k = 0; k < lines; ++k) __builtin_memset(to + k * kRows * kLine, 0, kLine * sizeof(float));
      continue;
    }
    for_row(args, row_of<T>(args, row + i), [&](int64_t k, Block x, Inside inside) {
      for_parts([&](int j) {
        int64_t at = k + j * kWidth;
        if (at < args.depth) store(to + at / kLine * kRows * kLine + at % kLine, x.part[j]);
      });
    });
  }
}

// sums (kRows, stride) = a group of rows times 16 columns of a panel.
template <class T>
__attribute__((noinline)) void product(const float* rows, const T* panel, int64_t depth, float* sums, int64_t stride) {
  Vec total[kRows][kVectors] = {};
  for (int64_t line = 0; line < depth; line += kLine, rows += kRows * kLine) {
    int64_t count = min_of(kLine, depth - line);
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k, panel += 16) {
      Vec right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = load(panel + j * kWidth);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        Vec left = splat(rows[i * kLine + k]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) total[i][j] += left * right[j];
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(sums + i * stride + j * kWidth, total[i][j]);
}

template <class T>
void linear_of(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  int64_t lines = (args.depth + kLine - 1) / kLine, groups = (row_end - row + kRows - 1) / kRows;
  auto* packed = reinterpret_cast<float*>(scratch);
  float* sums = packed + groups * lines * kRows * kLine;
  pack<T>(args, row, row_end, lines, packed);
  for (; panel < panel_end; ++panel) {
    const T* weights = reinterpret_cast<const T*>(args.panels) + panel * 32 * args.depth;
    for (int64_t group = 0; group < groups; ++group) {
      const float* some = packed + group * lines * kRows * kLine;
      for (int half = 0; half < 2; ++half)
        product(some, weights + half * 16 * args.depth, args.depth, sums + half * 16, 32);
      for (int64_t i = 0; i < kRows && row + group * kRows + i < row_end; ++i)
        finish<T, false>(args, sums + i * 32, row + group * kRows + i, 1, panel * 32);
    }
  }
}

}  // namespace

void linear_float(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  (args.type == Type::f16 ? linear_of<f16> : linear_of<bf16>)(args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
