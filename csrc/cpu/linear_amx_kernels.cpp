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
#include "amx.h"
#include "gelu.h"
#include "linear.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr int64_t kStep = 2 * kTileBytes;  // bytes of a step, of rows and of a panel alike
constexpr int64_t kPart = 16;              // steps whose weights stay in the first-level cache

// ---- the input ----

const bf16* row_of(const Linear& args, int64_t r) {
  return reinterpret_cast<const bf16*>(args.input) + r / args.rows_per_outer * args.outer_stride +
         r % args.rows_per_outer * args.row_stride;
}

struct Statistics {
  Vec mean, rstd;
};

// Of a row, in float32; the squares are those of centred numbers.
SEGVIT_INLINE Statistics statistics(const bf16* row, int64_t depth, float eps) {
  Vec sums[2] = {}, squares[2] = {};
  for (int64_t k = 0; k < depth; k += 32) {
    __m512i bits = _mm512_maskz_loadu_epi16(first_of_32(depth - k), row + k);
    sums[0] += lower(bits), sums[1] += upper(bits);
  }
  Vec mean = splat(sum(sums[0] + sums[1]) / depth);
  for (int64_t k = 0; k < depth; k += 32) {
    __mmask32 inside = first_of_32(depth - k);
    __m512i bits = _mm512_maskz_loadu_epi16(inside, row + k);
    Vec a = (Vec)_mm512_maskz_sub_ps(inside, (__m512)lower(bits), (__m512)mean);
    Vec b = (Vec)_mm512_maskz_sub_ps(inside >> 16, (__m512)upper(bits), (__m512)mean);
    squares[0] += a * a, squares[1] += b * b;
  }
  return {mean, splat(1 / __builtin_sqrtf(sum(squares[0] + squares[1]) / depth + eps))};
}

// f(first of the depth, 32 numbers in float32, which of them there are) for a row, normalised if that is asked for.
template <class F>
SEGVIT_INLINE void for_row(const Linear& args, const bf16* row, const F& f) {
  Statistics stats{};
  if (args.norm_weight) stats = statistics(row, args.depth, args.norm_eps);
  for (int64_t k = 0; k < args.depth; k += 32) {
    __mmask32 inside = first_of_32(args.depth - k);
    auto part = [&](const void* from) {
      return _mm512_maskz_loadu_epi16(inside, static_cast<const bf16*>(from) + k);
    };
    __m512i x = part(row);
    Vec first = lower(x), second = upper(x);
    if (args.norm_weight) {
      __m512i weight = part(args.norm_weight);
      __m512i bias = args.norm_bias ? part(args.norm_bias) : _mm512_setzero_si512();
      first = (first - stats.mean) * stats.rstd * lower(weight) + lower(bias);
      second = (second - stats.mean) * stats.rstd * upper(weight) + upper(bias);
    }
    f(k, first, second, inside);
  }
}

// A row of tiles: 32 numbers each, kStep bytes apart.
SEGVIT_INLINE void pack_row(const Linear& args, const bf16* row, char* to) {
  if (!args.norm_weight) {
    for (int64_t k = 0; k < args.depth; k += kTileDepth, to += kStep)
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(first_of_32(args.depth - k), row + k));
    return;
  }
  for_row(args, row, [&](int64_t k, Vec first, Vec second, __mmask32 inside) {
    _mm512_store_si512(to + k / kTileDepth * kStep, _mm512_maskz_mov_epi16(inside, to_bf16(first, second)));
  });
}

// The same in int8, 64 numbers each; returns the scale, not a number where one in the row is not finite.
SEGVIT_INLINE float pack_row_int8(const Linear& args, const bf16* row, float* values, char* to) {
  Vec most{}, sum_of_zeros{};
  for_row(args, row, [&](int64_t k, Vec first, Vec second, __mmask32 inside) {
    first = (Vec)_mm512_maskz_mov_ps(inside, (__m512)first);
    second = (Vec)_mm512_maskz_mov_ps(inside >> 16, (__m512)second);
    store(values + k, first), store(values + k + 16, second);
    most = vmax(most, vmax(vabs(first), vabs(second)));
    sum_of_zeros += first * 0 + second * 0;
  });
  float scale = largest(most) / 127 + sum(sum_of_zeros);
  Vec factor = splat(scale > 1e-37f ? 1 / scale : 0);  // below, numbers count as zero
  int64_t end = (args.depth + 31) / 32 * 32;
  for (int64_t k = 0; k < end; k += 16) {
    __m512i rounded = _mm512_cvtps_epi32((__m512)(load(values + k) * factor));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + k / 64 * kStep + k % 64), _mm512_cvtsepi32_epi8(rounded));
  }
  if (end % 64) _mm256_store_si256(reinterpret_cast<__m256i*>(to + end / 64 * kStep + 32), _mm256_setzero_si256());
  return scale;
}

// Rows to (group of 32, step, row, 64 bytes).
template <bool kInt8>
void pack(const Linear& args, int64_t row, int64_t row_end, int64_t steps, char* packed, float* values, float* scales) {
  for (int64_t i = 0; i < (row_end - row + kTileGroup - 1) / kTileGroup * kTileGroup; ++i) {
    char* to = packed + i / kTileGroup * steps * kStep + i % kTileGroup * 64;
    if (row + i >= row_end)
      for (int64_t k = 0; k < steps; ++k) _mm512_store_si512(to + k * kStep, _mm512_setzero_si512());
    else if (kInt8)
      scales[i] = pack_row_int8(args, row_of(args, row + i), values, to);
    else
      pack_row(args, row_of(args, row + i), to);
  }
}

// ---- results ----

SEGVIT_INLINE __m512i part_of(const char* row, int64_t column, __mmask32 inside) {
  return _mm512_maskz_loadu_epi16(inside, reinterpret_cast<const bf16*>(row) + column);
}

// 32 columns of a row, from `column` on; the row's scale is that of int8 numbers.
template <bool kInt8>
SEGVIT_INLINE void finish(const Linear& args, const float* sums, int64_t row, float row_scale, int64_t column) {
  __mmask32 inside = first_of_32(args.columns - column);
  Vec first = load(sums), second = load(sums + 16);
  if (kInt8) {
    first = __builtin_convertvector((IVec)first, Vec) * (load(args.factors + column) * row_scale);
    second = __builtin_convertvector((IVec)second, Vec) * (load(args.factors + column + 16) * row_scale);
  }
  if (args.bias) {
    __m512i bias = part_of(args.bias, column, inside);
    first += lower(bias), second += upper(bias);
  }
  if (args.gelu) first = gelu(first), second = gelu(second);
  if (args.scale) {
    __m512i scale = part_of(args.scale, column, inside);
    first *= lower(scale), second *= upper(scale);
  }
  if (args.residual) {
    __m512i residual = part_of(args.residual + row * args.columns * 2, column, inside);
    first += lower(residual), second += upper(residual);
  }
  char* to = args.output + (row * args.columns + column) * 2;
  __m512i result = to_bf16(first, second);
  if (args.stream && inside == ~0u && reinterpret_cast<uintptr_t>(to) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), result);
  else
    _mm512_mask_storeu_epi16(to, inside, result);
}

// Sums of two panels that wait to be finished: a few at a time, beside the products of the next panels, whose tiles
// keep another unit of the processor busy.
template <bool kInt8>
struct Waiting {
  const Linear& args;
  const float* scales;  // of the rows
  const float* sums = nullptr;
  int64_t row = 0, rows = 0, column = 0, halves = 0, done = 0;

  inline __attribute__((always_inline)) void some(int64_t count) {
    for (; count > 0 && done < rows * halves; --count, ++done) {
      int64_t r = done / halves, half = done % halves * kTilePanel;
      finish<kInt8>(args, sums + r * kTileWide + half, row + r, kInt8 ? scales[r] : 1, column + half);
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
template <bool kInt8>
__attribute__((noinline)) void product(const char* packed, int64_t groups, const char* panel, int64_t steps,
                                       float* sums, bool ahead, Waiting<kInt8>& waiting, int64_t share) {
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

template <bool kInt8>
void linear_of(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  Tiles tiles;
  constexpr int64_t kDepth = kInt8 ? 64 : kTileDepth;
  int64_t steps = (args.depth + kDepth - 1) / kDepth, groups = (row_end - row + kTileGroup - 1) / kTileGroup;
  auto* sums = reinterpret_cast<float*>(scratch + groups * steps * kStep);
  auto* scales = sums + 2 * groups * kTileGroup * kTileWide;
  pack<kInt8>(args, row, row_end, steps, scratch, scales + groups * kTileGroup, scales);
  Waiting<kInt8> waiting{args, scales};
  for (bool odd = false; panel < panel_end; panel += 2, odd = !odd) {
    int64_t halves = min_of<int64_t>(2, panel_end - panel);
    float* current = sums + odd * groups * kTileGroup * kTileWide;
    // So that all of it is done at the end of these panels.
    int64_t share = (waiting.rows * waiting.halves + groups * steps * halves - 1) / (groups * steps * halves);
    for (int64_t p = 0; p < halves; ++p) {
      const char* weights = reinterpret_cast<const char*>(args.panels) + (panel + p) * steps * kStep;
      bool ahead = panel + p + 1 < panel_end;
      product<kInt8>(scratch, groups, weights, steps, current + p * kTilePanel, ahead, waiting, share);
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
  linear_of<false>(args, row, row_end, panel, panel_end, scratch);
}
void linear_int8(const Linear& args, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, char* scratch) {
  linear_of<true>(args, row, row_end, panel, panel_end, scratch);
}

}  // namespace segvit::SEGVIT_ISA
