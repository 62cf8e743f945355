// A linear layer of bfloat16 numbers on AMX, 512 multiply-adds a cycle: LayerNorm of the input's rows before it,
// and bias, GELU, scale and residual behind it while the sums are in the cache.
//
// A step takes 32 of the depth for 32 rows by 32 columns: four tiles are loaded, four products of 16 cycles each
// made. The first-level cache gives four tiles in 32 cycles, the second-level cache two in 50. So the depth goes in
// parts: the weights of a part (32 KB of a panel of 32 columns) stay in the first-level cache while all the task's
// rows pass, at 32 bytes a cycle, and sums wait in memory between the parts. The rows were packed in the order in
// which they pass, so that no row of 16 pages is walked and the ends are zeros. Panels come from the third-level
// cache or memory, fetched a panel ahead, a byte for each of the task's rows a cycle less: hence many rows a task.
//
// With int8 weights a step takes 64 of the depth at the same cost. A row of the input, normalised in float32 where that
// is asked for, is divided by a 127th of its largest magnitude and rounded; scales come on at the end.
//
// Results go to memory 128 bytes a row, past the caches where they would not fit: lines that miss the second-level
// cache cost 5 times as much when they are read first.
#include "../amx.h"
#include "linear_rows.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int64_t kStep = 2 * kTileBytes;  // bytes of a step, of rows and of a panel alike
constexpr int64_t kPart = 16;              // steps whose weights stay in the first-level cache

// ---- the input ----

// Rows to (group of 32, step, row, 64 bytes).
template <class T, bool kInt8>
void pack(const Linear& args, int64_t row, int64_t row_end, int64_t steps, char* packed, float* values, float* scales) {
  for (int64_t i = 0; i < (row_end - row + kTileGroup - 1) / kTileGroup * kTileGroup; ++i) {
    char* to = packed + i / kTileGroup * steps * kStep + i % kTileGroup * 64;
    if (row + i >= row_end)
      for (int64_t k = 0; k < steps; ++k) _mm512_store_si512(to + k * kStep, _mm512_setzero_si512());
    else if constexpr (kInt8)
      scales[i] = pack_row_int8(args, row_of<T>(args, row + i), values, to, kStep, 0);
    else
      pack_row_bf16(args, row_of<T>(args, row + i), to, kStep);
  }
}

// Sums of two panels that wait to be finished: a few at a time, beside the products of the next panels, whose tiles
// keep another unit of the processor busy.
template <class T, bool kInt8>
struct Waiting {
  const Linear& args;
  const float* scales;  // of the rows
  const float* sums = nullptr;
  int64_t row = 0, rows = 0, column = 0, halves = 0, done = 0;

  inline __attribute__((always_inline)) void some(int64_t count) {
    for (; count > 0 && done < rows * halves; --count, ++done) {
      int64_t r = done / halves, half = done % halves * kTilePanel;
      finish<T, kInt8>(args, sums + r * kTileWide + half, row + r, kInt8 ? scales[r] : 1, column + half);
    }
  }
};

// ---- the product ----

// Registers are named in the text of the instruction.
#define SEGVIT_MULTIPLY(sum, left, right) \
  if constexpr (kInt8) {                  \
    _tile_dpbssd(sum, left, right);       \
  } else {                                \
    _tile_dpbf16ps(sum, left, right);     \
  }

// sums (rows, kTileWide) = rows times a panel. The next panel is brought into the second-level cache, and what waits is
// finished, `share` a step.
template <class T, bool kInt8>
__attribute__((noinline)) void product(const char* packed, int64_t groups, const char* panel, int64_t steps,
                                       float* sums, bool ahead, Waiting<T, kInt8>& waiting, int64_t share) {
  constexpr int64_t kStride = kTileWide * 4;
  int64_t lines = ahead ? (kStep / 64 + groups - 1) / groups : 0;
  const char* next = panel + steps * kStep;
  for (int64_t begin = 0; begin < steps; begin += kPart) {
    int64_t end = min_of(begin + kPart, steps);
    for (int64_t group = 0; group < groups; ++group) {
      char* c = reinterpret_cast<char*>(sums + group * kTileGroup * kTileWide);
      if (begin == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, c, kStride);
        _tile_loadd(1, c + 64, kStride);
        _tile_loadd(2, c + kTileRows * kStride, kStride);
        _tile_loadd(3, c + kTileRows * kStride + 64, kStride);
      }
      const char *a = packed + (group * steps + begin) * kStep, *b = panel + begin * kStep;
      for (int64_t k = begin; k < end; ++k, a += kStep, b += kStep) {
        _tile_stream_loadd(4, a, 64);  // rows pass; the panel stays
        _tile_loadd(6, b, 64);
        SEGVIT_MULTIPLY(0, 4, 6)
        _tile_loadd(7, b + kTileBytes, 64);
        SEGVIT_MULTIPLY(1, 4, 7)
        _tile_stream_loadd(5, a + kTileBytes, 64);
        SEGVIT_MULTIPLY(2, 5, 6)
        SEGVIT_MULTIPLY(3, 5, 7)
        for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        waiting.some(share);
      }
      _tile_stored(0, c, kStride);
      _tile_stored(1, c + 64, kStride);
      _tile_stored(2, c + kTileRows * kStride, kStride);
      _tile_stored(3, c + kTileRows * kStride + 64, kStride);
    }
  }
}

template <class T, bool kInt8>
void linear_of(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  Tiles tiles;
  constexpr int64_t kDepth = kInt8 ? 64 : kTileDepth;
  int64_t steps = (args.depth + kDepth - 1) / kDepth, groups = (row_end - row + kTileGroup - 1) / kTileGroup;
  auto* sums = reinterpret_cast<float*>(scratch + groups * steps * kStep);
  auto* scales = sums + 2 * groups * kTileGroup * kTileWide;
  pack<T, kInt8>(args, row, row_end, steps, scratch, scales + groups * kTileGroup, scales);
  Waiting<T, kInt8> waiting{args, scales};
  for (bool odd = false; panel < panel_end; panel += 2, odd = !odd) {
    int64_t halves = min_of<int64_t>(2, panel_end - panel);
    float* current = sums + odd * groups * kTileGroup * kTileWide;
    // So that all of it is done at the end of these panels.
    int64_t share = (waiting.rows * waiting.halves + groups * steps * halves - 1) / (groups * steps * halves);
    for (int64_t p = 0; p < halves; ++p) {
      const char* weights = reinterpret_cast<const char*>(args.panels) + (panel + p) * steps * kStep;
      bool ahead = panel + p + 1 < panel_end;
      product<T, kInt8>(scratch, groups, weights, steps, current + p * kTilePanel, ahead, waiting, share);
    }
    waiting.some(waiting.rows * waiting.halves);
    waiting.sums = current, waiting.row = row, waiting.rows = row_end - row, waiting.column = panel * kTilePanel;
    waiting.halves = halves, waiting.done = 0;
  }
  waiting.some(waiting.rows * waiting.halves);
  if (args.stream) _mm_sfence();
}

}  // namespace

void linear(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  linear_of<bf16, false>(args, row, row_end, panel, panel_end, scratch);
}
void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  (args.type == Type::f32   ? linear_of<float, true>
   : args.type == Type::f16 ? linear_of<f16, true>
                            : linear_of<bf16, true>)(args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
