// A linear layer with products in float32, of float32 numbers or of half-precision ones, for processors to which these
// are for storage alone: there PyTorch's own product of them has a fifth of float32's rate.
//
// Tiling: 6 rows by 16 columns with AVX2 (12 accumulators of 16 registers), 12 rows by 32 columns with AVX-512 (24 of 32).
// One of the depth takes a multiply-add for each of them, two loads of weights, which become float32 on the way, and a
// number of each row, broadcast by the load. Rows were packed in float32 in the order in which they pass. A panel is read
// again from the second-level cache for every group of rows, at 5 bytes a cycle, in float32 10.
#include "linear_rows.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int kRows = kWidth == 16 ? kFloatRows512 : kFloatRows, kVectors = 2;
constexpr int kColumns = kVectors * kWidth;
constexpr int64_t kLine = 16;   // of the depth of a row lie together
constexpr int64_t kPart = 256;  // of the depth

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

// sums (kRows, stride) = a group of rows times kColumns columns of a panel, of which 16 lie together. Parts of the depth
// are added up apart, which keeps the rounding of long sums down.
template <class T>
__attribute__((noinline)) void product(const float* rows, const T* panel, int64_t depth, float* sums, int64_t stride) {
  int64_t next = kWidth == 16 ? 16 * depth : kWidth;
  for (int64_t part = 0; part < depth; part += kPart) {
    Vec total[kRows][kVectors] = {};
    for (int64_t end = min_of(depth, part + kPart), line = part; line < end; line += kLine, rows += kRows * kLine) {
      int64_t count = min_of(kLine, end - line);
#pragma GCC unroll 4
      for (int64_t k = 0; k < count; ++k, panel += 16) {
        Vec right[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) right[j] = load(panel + j * next);
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
          Vec left = splat(rows[i * kLine + k]);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) total[i][j] += left * right[j];
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* to = sums + i * stride + j * kWidth;
        store(to, part ? load(to) + total[i][j] : total[i][j]);
      }
  }
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
      for (int column = 0; column < 32; column += kColumns)
        product(some, weights + column * args.depth, args.depth, sums + column, 32);
      for (int64_t i = 0; i < kRows && row + group * kRows + i < row_end; ++i)
        finish<T, false>(args, sums + i * 32, row + group * kRows + i, 1, panel * 32);
    }
  }
#if defined(__AVX512F__)
  if (args.stream) _mm_sfence();
#endif
}

}  // namespace

void linear_float(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  (args.type == Type::f32   ? linear_of<float>
   : args.type == Type::f16 ? linear_of<f16>
                            : linear_of<bf16>)(args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
