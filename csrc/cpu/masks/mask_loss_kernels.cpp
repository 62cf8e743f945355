#include "mask_loss.h"
#include "../simd.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Lanes for which something holds.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
SEGVIT_INLINE Mask equal(IVec a, IVec b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
SEGVIT_INLINE Mask positive(Vec v) { return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ); }
SEGVIT_INLINE Mask first_lanes(int64_t n) { return static_cast<Mask>((1u << n) - 1); }
SEGVIT_INLINE bool all(Mask mask) { return mask == 0xffff; }
SEGVIT_INLINE Vec select(Mask mask, Vec a, Vec b) {
  return (Vec)_mm512_mask_blend_ps(mask, (__m512)b, (__m512)a);
}
#else
typedef IVec Mask;
SEGVIT_INLINE Mask equal(IVec a, IVec b) { return a == b; }
SEGVIT_INLINE Mask positive(Vec v) { return v > 0; }
SEGVIT_INLINE Mask first_lanes(int64_t n) { return iota() < static_cast<int32_t>(n); }
SEGVIT_INLINE bool all(Mask mask) { return bits_of(mask) == (1u << kWidth) - 1; }
SEGVIT_INLINE Vec select(Mask mask, Vec a, Vec b) { return mask ? a : b; }
#endif
SEGVIT_INLINE Mask differ(Mask a, Mask b) { return a ^ b; }
SEGVIT_INLINE Vec where(Mask mask, Vec v) { return select(mask, v, Vec{}); }

SEGVIT_INLINE Vec lowered(Vec y) { return (Vec)((UVec)y | 0x80000000u); }

// 2^y of y <= 0.
SEGVIT_INLINE Vec exp2_down(Vec y) {
#if defined(__AVX512F__)
  Vec f = (Vec)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  Vec bounded = vmax(splat(-126), y);
  Vec n = vround(bounded - 0.5f), f = bounded - n;
#endif
  Vec p = splat(2.17022549e-4f);
  p = p * f + 1.243968727e-3f;
  p = p * f + 9.678840637e-3f;
  p = p * f + 5.5483341217e-2f;
  p = p * f + 2.4022983015e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)y);
#else
  p *= (Vec)((__builtin_convertvector(n, IVec) + 127) << 23);
  return y < -126 ? splat(0) : p;
#endif
}

// log2(1 + e) for e from 0 to 1.
SEGVIT_INLINE Vec log2_of_one_and(Vec e) {
  Vec p = splat(7.549182046e-3f);
  p = p * e - 4.256706312e-2f;
  p = p * e + 1.1285619438e-1f;
  p = p * e - 1.9711896777e-1f;
  p = p * e + 2.7564141154e-1f;
  p = p * e - 3.5840848088e-1f;
  p = p * e + 4.8069295287e-1f;
  p = p * e - 7.2134017944e-1f;
  return (p * e + 1.4426950216f) * e;
}

// v^power of v from 0 to 1.
SEGVIT_INLINE Vec pow_of(Vec v, float power) {
  IVec bits = (IVec)v;
  Vec fraction = (Vec)((bits & 0x7fffff) | 0x3f800000) - 1.0f;
  Vec exponent = __builtin_convertvector((bits >> 23) - 127, Vec);
  return exp2_down(power * (exponent + log2_of_one_and(fraction)));
}

// Of logits x, given as y = x log2(e), of some rows of a column vector: e^-|x| and log2(1 + e^-|x|). Two
// short loops instead of one: the processor sees the work of several rows at a time.
struct Rows {
  Vec y[kMaskRows], e[kMaskRows], log[kMaskRows];

  template <bool kLog = true>
  void fill(Vec top, Vec step, const float* weight, int64_t n) {
    for (int64_t r = 0; r < n; ++r) {
      y[r] = top + weight[r] * step;
      e[r] = exp2_down(lowered(y[r]));
    }
    if constexpr (kLog)
      for (int64_t r = 0; r < n; ++r) log[r] = log2_of_one_and(e[r]);
  }
};

// Of one row: everything is of |x| until a target tells the side.
struct Logistic {
  Vec low;           // -|y|
  Vec large, small;  // σ(|x|) and σ(-|x|)
  Vec log;           // softplus(-|x|) over ln 2

  explicit Logistic(const Rows& rows, int64_t r) : low(lowered(rows.y[r])), log(rows.log[r]) {
    large = 1 / (1 + rows.e[r]);
    small = rows.e[r] * large;
  }
};

// Several sums at a time.
template <int kN>
struct Sums {
  Vec v[kN] = {};

  Sums& operator+=(const Sums& other) {
    for (int i = 0; i < kN; ++i) v[i] += other.v[i];
    return *this;
  }
  void keep(Mask lanes) {
    for (int i = 0; i < kN; ++i) v[i] = where(lanes, v[i]);
  }
};

// Σ terms(r), r < n. Four at a time: where all terms are alike, each addition to a long sum rounds the same
// way.
template <int kN, class F>
SEGVIT_INLINE Sums<kN> sum_of(int64_t n, const F& terms) {
  Sums<kN> total;
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) {
    Sums<kN> four = terms(r), last = terms(r + 2);
    four += terms(r + 1);
    last += terms(r + 3);
    four += last;
    total += four;
  }
  for (; r < n; ++r) total += terms(r);
  return total;
}

class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t n) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (n * sizeof(T) + 63) / 64 * 64;
    return taken;
  }

 private:
  char* next_;
};

SEGVIT_INLINE void exchange(float*& a, float*& b) {
  float* old = a;
  a = b;
  b = old;
}
SEGVIT_INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

template <class T>
void read_labels(const T* row, int64_t n, int64_t count, int32_t* codes) {
  for (int64_t i = 0; i < n; ++i)
    codes[i] = row[i] >= 0 && static_cast<int64_t>(row[i]) < count ? static_cast<int32_t>(row[i]) : -1;
}

// Labels x...x + n of row y as int32, -1 where they are no class.
void read_labels(const MaskTargets& targets, int64_t image, int64_t y, int64_t x, int64_t n, int32_t* codes) {
  int64_t offset = image * targets.image_stride + y * targets.row_stride + x;
  auto read = [&](auto type) {
    read_labels(reinterpret_cast<const decltype(type)*>(targets.data) + offset, n, targets.count, codes);
  };
  switch (targets.type) {
    case Target::u8:
      return read(uint8_t{});
    case Target::i8:
      return read(int8_t{});
    case Target::i16:
      return read(int16_t{});
    case Target::i32:
      return read(int32_t{});
    default:
      return read(int64_t{});
  }
}

// Pixels x...x + n of row y of a mask as float32.
const float* read_mask(const MaskTargets& targets, int64_t image, int64_t mask, int64_t y, int64_t x,
                       int64_t n, float* buffer) {
  int64_t offset = image * targets.image_stride + mask * targets.mask_stride + y * targets.row_stride + x;
  auto at = [&](int64_t size) { return targets.data + offset * size; };
  switch (targets.type) {
    case Target::boolean: {
      const char* row = at(1);
      for (int64_t i = 0; i < n; ++i) buffer[i] = row[i] ? 1.0f : 0.0f;
      return buffer;
    }
    case Target::f64: {
      const double* row = reinterpret_cast<const double*>(at(8));
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(row[i]);
      return buffer;
    }
    case Target::f16:
      return floats(Type::f16, at(2), n, buffer);
    case Target::bf16:
      return floats(Type::bf16, at(2), n, buffer);
    default:
      return reinterpret_cast<const float*>(at(4));
  }
}

// Targets of some rows: column vectors, rows within, so that one column's rows follow each other.
struct Tile {
  int32_t* data;
  int64_t rows, width;

  int32_t* at(int64_t column, int64_t row) const { return data + (column * rows + row) * kWidth; }
  int64_t columns() const { return (width + kWidth - 1) / kWidth; }
  // Lanes of a column vector that are pixels.
  int64_t lanes(int64_t column) const { return min_of<int64_t>(kWidth, width - column * kWidth); }
};

// The tile's pixels begin at (top, left). What lies behind the last column is as the last pixel.
void fill_labels(const Tile& tile, const MaskTargets& targets, int64_t image, int64_t top, int64_t left,
                 int32_t* buffer) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    read_labels(targets, image, top + r, left, tile.width, buffer);
    for (int64_t i = tile.width; i < padded(tile.width); ++i) buffer[i] = buffer[tile.width - 1];
    for (int64_t k = 0; k < tile.columns(); ++k) store_ints(tile.at(k, r), load_ints(buffer + k * kWidth));
  }
}

// Whether every target is 0 or 1. Behind the last column there are zeros.
bool fill_mask(const Tile& tile, const MaskTargets& targets, int64_t image, int64_t mask, int64_t top,
               int64_t left, float* buffer) {
  IVec soft{};
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* row = read_mask(targets, image, mask, top + r, left, tile.width, buffer);
    for (int64_t k = 0; k < tile.columns(); ++k) {
      int64_t n = tile.lanes(k);
      Vec t = n == kWidth ? load(row + k * kWidth) : load_some(row + k * kWidth, n);
      soft |= (t != 0) & (t != 1);
      store_ints(tile.at(k, r), (IVec)t);
    }
  }
  return all(equal(soft, IVec{}));
}

// Floats that upsample_row needs for a grid of that width.
SEGVIT_INLINE int64_t row_buffer(int64_t width) { return 2 * (padded(width) + 16); }

// Row y of a grid, upsampled to columns begin...end and times log2(e).
void upsample_row(const MaskEntry& entry, int64_t image, int64_t query, int64_t y, float* buffer, float* out,
                  int64_t begin, int64_t end) {
  const int32_t* cells = entry.columns.cell;
  int64_t width = entry.columns.source, first = cells[begin], past = min_of<int64_t>(cells[end - 1] + 2, width);
  float* row = buffer + row_buffer(width) / 2;
  int64_t offset = image * entry.image_stride + query * entry.query_stride + y * entry.row_stride + first;
  const float* logits = floats(entry.type, entry.logits + offset * size_of(entry.type), past - first, buffer);
  for (int64_t i = first; i < past; ++i) row[i] = logits[i - first] * kLog2e;
  for (int64_t i = past; i < min_of<int64_t>(past + kWidth, padded(width) + 16); ++i) row[i] = 0;
  for (int64_t i = begin; i < end; i += kWidth) {
    IVec cell = load_ints(cells + i);
    Vec weight = load(entry.columns.weight + i), left, right;
    int32_t base = cells[i];
    if (cells[i + kWidth - 1] - base < kWidth) {
      left = permute(load(row + base), cell - base);
      right = permute(load(row + base + 1), cell - base);
    } else {
      for (int j = 0; j < kWidth; ++j) left[j] = row[cell[j]], right[j] = row[cell[j] + 1];
    }
    store(out + i, left + weight * (right - left));
  }
}

// Rows y and y + 1 of a grid, upsampled along the columns; kept from one band to the next.
struct GridRows {
  float *upper, *lower;
  int64_t y = -2;
  bool last = false;  // there is no row y + 1

  void move(const MaskEntry& entry, int64_t image, int64_t query, int64_t to, float* buffer, int64_t width) {
    if (to == y + 1 && !last) {
      exchange(upper, lower);
    } else {
      upsample_row(entry, image, query, to, buffer, upper, 0, width);
    }
    y = to;
    last = y + 1 == entry.rows.source;
    if (!last) upsample_row(entry, image, query, y + 1, buffer, lower, 0, width);
  }
  // From the upper row to the lower one.
  Vec step(int64_t i) const { return last ? Vec{} : load(lower + i) - load(upper + i); }
};

// f(cell, begin, end) for runs of rows between the same two rows of the grid.
template <class F>
SEGVIT_INLINE void for_bands(const MaskAxis& axis, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    int64_t next = begin + 1;
    while (next < end && axis.cell[next] == axis.cell[begin]) ++next;
    f(axis.cell[begin], begin, next);
    begin = next;
  }
}

// What the loss of a pixel needs, of its target and its logit.
template <bool kHard>
struct Pixel {
  Logistic x;
  Mask above, inside, wrong;  // x > 0; t = 1; on the other side than the target
  Vec t, off;                 // of soft targets; off: how much on the wrong side
  Vec m;

  Pixel(const Rows& rows, int64_t r, IVec target, IVec code) : x(rows, r), above(positive(rows.y[r])) {
    if constexpr (kHard) {
      inside = equal(target, code);
      wrong = differ(above, inside);
      m = select(wrong, x.large, x.small);
    } else {
      t = (Vec)target;
      off = select(above, 1 - t, t);
      m = off * x.large + (1 - off) * x.small;
    }
  }
  Vec sigmoid() const { return select(above, x.large, x.small); }
  // Binary cross entropy over ln 2.
  Vec bce() const {
    if constexpr (kHard) return x.log + where(wrong, -x.low);
    return x.log - off * x.low;
  }
  template <bool kSquare>
  Vec power(float gamma) const {
    if constexpr (kSquare) return m * m;
    if constexpr (kHard) {
      // m is a sigmoid: its logarithm is a softplus.
      return exp2_down(-gamma * (x.log + select(wrong, Vec{}, -x.low)));
    }
    return pow_of(m, gamma);
  }
  Vec choose(float one, float zero) const {
    if constexpr (kHard) return select(inside, splat(one), splat(zero));
    return zero + (one - zero) * t;
  }
};

// What all bands of a pair share.
struct Band {
  const Tile& tile;
  IVec code;  // of pixels that are inside
  float alpha, alpha_outside, gamma;
  bool ignored;
};

// Columns that are summed before they are added to the others.
constexpr int64_t kGroup = 8;

template <bool kHard, bool kSquare, bool kIgnored>
void forward_band(const Band& band, const GridRows& grid, const float* weight, int64_t begin, int64_t end,
                  double* sums) {
  const Tile& tile = band.tile;
  Sums<4> total;
  Rows rows;
  for (int64_t first = 0; first < tile.columns(); first += kGroup) {
    Sums<4> group;
    for (int64_t k = first; k < min_of(first + kGroup, tile.columns()); ++k) {
      rows.fill(load(grid.upper + k * kWidth), grid.step(k * kWidth), weight + begin, end - begin);
      auto column = sum_of<4>(end - begin, [&](int64_t r) __attribute__((always_inline)) {
        IVec target = load_ints(tile.at(k, begin + r));
        Pixel<kHard> pixel(rows, r, target, band.code);
        Vec bce = pixel.bce(), p = pixel.sigmoid();
        Vec focal =
            pixel.choose(band.alpha, band.alpha_outside) * bce * pixel.template power<kSquare>(band.gamma);
        Sums<4> terms;
        if constexpr (kHard)
          terms = {focal, bce, where(pixel.inside, p), p};
        else
          terms = {focal, bce, p * pixel.t, p};
        if constexpr (kIgnored) terms.keep(~equal(target, IVec{} - 1));
        return terms;
      });
      column.keep(first_lanes(tile.lanes(k)));
      group += column;
    }
    total += group;
  }
  const double scale[4] = {kLn2, kLn2, 1, 1};
  for (int i = 0; i < 4; ++i) sums[i] += sum(total.v[i]) * scale[i];
}

using ForwardBand = decltype(&forward_band<true, true, true>);

ForwardBand forward_band_for(bool hard, bool square, bool ignored) {
  if (!hard) return square ? forward_band<false, true, false> : forward_band<false, false, false>;
  if (ignored) return square ? forward_band<true, true, true> : forward_band<true, false, true>;
  return square ? forward_band<true, true, false> : forward_band<true, false, false>;
}

// Adds dx of a band to `upper` and `lower`, what arrives at the two rows of the grid before the columns'
// adjoint.
template <bool kHard, bool kSquare, bool kIgnored, bool kFocal, bool kBce>
void backward_band(const Band& band, const GridRows& grid, const float* weight, int64_t begin, int64_t end,
                   const float* g, float* upper, float* lower) {
  const Tile& tile = band.tile;
  float focal_one = band.alpha * g[0], focal_zero = band.alpha_outside * g[0], slope = band.gamma * kLn2;
  Rows rows;
  for (int64_t k = 0; k < tile.columns(); ++k) {
    Vec top = load(grid.upper + k * kWidth), step = grid.step(k * kWidth);
    Vec up = load(upper + k * kWidth), low = load(lower + k * kWidth);
    rows.fill<kFocal>(top, step, weight + begin, end - begin);
    for (int64_t r = begin; r < end; ++r) {
      IVec target = load_ints(tile.at(k, r));
      Pixel<kHard> pixel(rows, r - begin, target, band.code);
      Vec both = pixel.x.large * pixel.x.small;  // p (1 - p)
      Vec dx = pixel.choose(g[2] + g[3], g[3]) * both;
      if constexpr (kHard) {
        if constexpr (kFocal) {
          Vec rest = select(pixel.wrong, pixel.x.small, pixel.x.large);  // 1 - m
          Vec factor = pixel.m + slope * rest * pixel.bce();
          dx += pixel.choose(-focal_one, focal_zero) * pixel.template power<kSquare>(band.gamma) * factor;
        }
        if constexpr (kBce) dx += pixel.choose(-g[1], g[1]) * pixel.m;
      } else {
        Vec p = pixel.sigmoid(), q = select(pixel.above, pixel.x.small, pixel.x.large);
        Vec error = (1 - pixel.t) * p - pixel.t * q;
        Vec ratio = both / vmax(splat(0x1p-126f), pixel.m);
        Vec factor = slope * (1 - 2 * pixel.t) * ratio * pixel.bce() + error;
        dx += pixel.choose(focal_one, focal_zero) * pixel.template power<kSquare>(band.gamma) * factor;
        dx += g[1] * error;
      }
      if constexpr (kIgnored) dx = where(~equal(target, IVec{} - 1), dx);
      up += (1 - weight[r]) * dx;
      low += weight[r] * dx;
    }
    store(upper + k * kWidth, up);
    store(lower + k * kWidth, low);
  }
}

using BackwardBand = decltype(&backward_band<true, true, true, true, true>);

template <bool kSquare, bool kIgnored>
BackwardBand hard_backward_band(bool focal, bool bce) {
  if (!focal) return backward_band<true, true, kIgnored, false, true>;
  return bce ? backward_band<true, kSquare, kIgnored, true, true>
             : backward_band<true, kSquare, kIgnored, true, false>;
}

BackwardBand backward_band_for(bool hard, bool square, bool ignored, bool focal, bool bce) {
  if (!hard)
    return square ? backward_band<false, true, false, true, true>
                  : backward_band<false, false, false, true, true>;
  if (ignored)
    return square ? hard_backward_band<true, true>(focal, bce) : hard_backward_band<false, true>(focal, bce);
  return square ? hard_backward_band<true, false>(focal, bce) : hard_backward_band<false, false>(focal, bce);
}

// Sums of a row of pixels into the cells that they were made of.
void downsample_row(const MaskAdjoint& adjoint, int64_t cells, const float* row, float* out) {
  for (int64_t c = 0; c < cells; ++c) {
    const float* pixels = row + adjoint.first[c];
    Vec total{};
    for (int64_t i = adjoint.begin[c]; i < adjoint.begin[c + 1]; i += kWidth, pixels += kWidth)
      total += load(pixels) * load(adjoint.taps + i);
    out[c] = sum(total);
  }
}

bool is_labels(const MaskTargets& targets) { return targets.type <= Target::i64; }

// Rows of an image, and memory for two upsampled rows of a grid and for making them.
struct Strip {
  int64_t top, rows, width;
  float *upper, *lower, *buffer;

  Strip(const MaskLoss& loss, int64_t index, Arena& arena)
      : top(index * loss.strip_rows),
        rows(min_of(loss.strip_rows, loss.targets.height - top)),
        width(padded(loss.targets.width)),
        upper(arena.take<float>(width)),
        lower(arena.take<float>(width)),
        buffer(arena.take<float>(row_buffer(loss.grid_width))) {}
};

// f(pair, band, hard) for the pairs of an image, with their targets in a strip.
template <class F>
SEGVIT_INLINE void for_pairs(const MaskLoss& loss, int64_t image, const Strip& strip, Arena& arena,
                             const F& f) {
  const MaskTargets& targets = loss.targets;
  Tile tile{arena.take<int32_t>(strip.width * strip.rows), strip.rows, targets.width};
  float* buffer = arena.take<float>(strip.width);
  bool labels = is_labels(targets);
  if (labels) fill_labels(tile, targets, image, strip.top, 0, reinterpret_cast<int32_t*>(buffer));
  for (int64_t pair = loss.first_pair[image]; pair < loss.first_pair[image + 1]; ++pair) {
    int32_t target = loss.pairs[pair].target;
    bool hard = labels || fill_mask(tile, targets, image, target, strip.top, 0, buffer);
    IVec code = IVec{} + (labels ? target : 0x3f800000);  // the bits of 1.0f
    f(pair, Band{tile, code, loss.alpha, loss.alpha_outside, loss.gamma, loss.mask_ignored && labels}, hard);
  }
}

}  // namespace

void mask_loss_count(const MaskTargets& targets, int64_t image, int64_t begin, int64_t end, int32_t* counts,
                     float* scratch) {
  int32_t* codes = reinterpret_cast<int32_t*>(scratch);
  for (int64_t y = begin; y < end; ++y) {
    read_labels(targets, image, y, 0, targets.width, codes);
    int64_t i = 0;
    for (; i + kWidth <= targets.width; i += kWidth) {
      if (all(equal(load_ints(codes + i), IVec{} + codes[i]))) {
        counts[codes[i]] += kWidth;
      } else {
        for (int j = 0; j < kWidth; ++j) ++counts[codes[i + j]];
      }
    }
    for (; i < targets.width; ++i) ++counts[codes[i]];
  }
}

void mask_loss_area(const MaskTargets& targets, int64_t image, int64_t mask, float* area, float* scratch) {
  double total = 0;
  int64_t n = targets.width;
  for (int64_t y = 0; y < targets.height; ++y) {
    const float* row = read_mask(targets, image, mask, y, 0, n, scratch);
    Vec part{};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) part += load(row + i);
    if (i < n) part += load_some(row + i, n - i);
    total += sum(part);
  }
  *area = static_cast<float>(total);
}

void mask_loss_fwd(const MaskLossFwd& args, int64_t image, int64_t index, float* scratch) {
  const MaskLoss& loss = args.loss;
  Arena arena(scratch);
  Strip strip(loss, index, arena);
  for_pairs(loss, image, strip, arena, [&](int64_t pair, const Band& band, bool hard) {
    auto* run = forward_band_for(hard, loss.gamma == 2, band.ignored);
    for (int64_t l = 0; l < loss.num_entries; ++l) {
      const MaskEntry& entry = loss.entries[l];
      GridRows grid{strip.upper, strip.lower};
      double sums[4] = {};
      for_bands(entry.rows, strip.top, strip.top + strip.rows, [&](int64_t y, int64_t begin, int64_t end) {
        grid.move(entry, image, loss.pairs[pair].query, y, strip.buffer, strip.width);
        run(band, grid, entry.rows.weight + strip.top, begin - strip.top, end - strip.top, sums);
      });
      __builtin_memcpy(args.sums + ((index * loss.num_entries + l) * loss.num_pairs + pair) * 4, sums,
                       sizeof sums);
    }
  });
}

void mask_loss_bwd(const MaskLossBwd& args, int64_t image, int64_t index, float* scratch) {
  const MaskLoss& loss = args.loss;
  Arena arena(scratch);
  Strip strip(loss, index, arena);
  int64_t length = strip.width + 16;  // taps of weight 0 may read behind the end
  float *above = arena.take<float>(length), *below = arena.take<float>(length);
  for_pairs(loss, image, strip, arena, [&](int64_t pair, const Band& band, bool hard) {
    int64_t query = loss.pairs[pair].query;
    for (int64_t l = 0; l < loss.num_entries; ++l) {
      const MaskEntry& entry = loss.entries[l];
      const MaskGradient& gradient = args.gradients[l];
      int64_t cells = entry.columns.source, first = gradient.first_cell[index];
      int64_t grid_rows = gradient.first_row[index + 1] - gradient.first_row[index];
      float* out = gradient.grads + (pair * gradient.rows + gradient.first_row[index]) * cells;
      const float* g = args.grad_sums + ((l * args.batch + image) * args.queries + query) * 4;
      auto* run = backward_band_for(hard, loss.gamma == 2, band.ignored, g[0] != 0, g[1] != 0);
      GridRows grid{strip.upper, strip.lower};
      auto clear = [&](float* row) { __builtin_memset(row, 0, length * sizeof(float)); };
      auto flush = [&](int64_t y, const float* row) {
        if (y - first < grid_rows) downsample_row(gradient.adjoint, cells, row, out + (y - first) * cells);
      };
      // Rows that no pixel is made from stay 0.
      __builtin_memset(out, 0, grid_rows * cells * sizeof(float));
      float *up = above, *low = below;
      clear(up), clear(low);
      int64_t current = first;
      for_bands(entry.rows, strip.top, strip.top + strip.rows, [&](int64_t y, int64_t begin, int64_t end) {
        if (y == current + 1) {
          flush(current, up);
          exchange(up, low);
          clear(low);
        } else if (y != current) {
          flush(current, up), flush(current + 1, low);
          clear(up), clear(low);
        }
        current = y;
        grid.move(entry, image, query, y, strip.buffer, strip.width);
        run(band, grid, entry.rows.weight + strip.top, begin - strip.top, end - strip.top, g, up, low);
      });
      flush(current, up), flush(current + 1, low);
    }
  });
}

void mask_loss_bwd_sum(const MaskLossBwd& args, int64_t l, int64_t begin, int64_t end, int64_t strips,
                       float* scratch) {
  const MaskEntry& entry = args.loss.entries[l];
  const MaskGradient& gradient = args.gradients[l];
  int64_t cells = entry.columns.source, size = entry.rows.source * cells, bytes = size * size_of(entry.type);
  for (int64_t i = begin; i < end; ++i) {
    char* out = gradient.out + i * bytes;
    int64_t pair = args.pair_of[i];
    if (pair < 0) {
      __builtin_memset(out, 0, bytes);
      continue;
    }
    float* total = entry.type == Type::f32 ? reinterpret_cast<float*>(out) : scratch;
    __builtin_memset(total, 0, size * sizeof(float));
    for (int64_t strip = 0; strip < strips; ++strip) {
      int64_t n = (gradient.first_row[strip + 1] - gradient.first_row[strip]) * cells;
      const float* part = gradient.grads + (pair * gradient.rows + gradient.first_row[strip]) * cells;
      float* to = total + gradient.first_cell[strip] * cells;
      for (int64_t j = 0; j < n; ++j) to[j] += part[j];
    }
    put_floats(entry.type, out, size, total);
  }
}

namespace {

// Rows begin...end of a column vector whose pixels all have the same targets, or one row of mixed ones.
struct Run {
  int32_t column, begin, end, first_part, last_part;
};

struct Part {
  int32_t slot;
  const float* values;  // null: 1
};

// The targets of a piece of an image in runs, for all queries to read.
struct Runs {
  Run* runs;
  Part* parts;
  int32_t *targets, *slot_of;  // the targets that occur, and where each stands among them (-1 before)
  int64_t num_runs = 0, num_parts = 0, num_targets = 0;
  bool joinable = false;  // the last run is whole

  int32_t slot(int32_t target) {
    if (slot_of[target] < 0) {
      slot_of[target] = static_cast<int32_t>(num_targets);
      targets[num_targets++] = target;
    }
    return slot_of[target];
  }
  void clear() {
    for (int64_t i = 0; i < num_targets; ++i) slot_of[targets[i]] = -1;
    num_runs = num_parts = num_targets = 0;
  }
  void add(int32_t target, const float* values) { parts[num_parts++] = {slot(target), values}; }
  // Closes what was added since the last call: the targets of one vector. Joins it to the run before if it
  // can.
  void close(int64_t column, int64_t row, bool whole) {
    int32_t first = num_runs ? runs[num_runs - 1].last_part : 0, n = static_cast<int32_t>(num_parts) - first;
    if (num_runs && whole && joinable) {
      Run& last = runs[num_runs - 1];
      bool same = last.column == column && last.last_part - last.first_part == n;
      for (int32_t i = 0; same && i < n; ++i) same = parts[first + i].slot == parts[last.first_part + i].slot;
      if (same) {
        last.end = static_cast<int32_t>(row) + 1;
        num_parts = first;
        return;
      }
    }
    joinable = whole;
    runs[num_runs++] = {static_cast<int32_t>(column), static_cast<int32_t>(row),
                        static_cast<int32_t>(row) + 1, first, static_cast<int32_t>(num_parts)};
  }
};

void runs_of_labels(const Tile& tile, float* values, Runs& runs) {
  runs.clear();
  for (int64_t k = 0; k < tile.columns(); ++k) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int32_t* codes = tile.at(k, r);
      bool whole = all(equal(load_ints(codes), IVec{} + codes[0]));
      if (whole && codes[0] >= 0) runs.add(codes[0], nullptr);
      for (int j = 0; !whole && j < kWidth; ++j) {
        bool seen = codes[j] < 0;
        for (int i = 0; !seen && i < j; ++i) seen = codes[i] == codes[j];
        if (seen) continue;
        store(values, where(equal(load_ints(codes), IVec{} + codes[j]), splat(1)));
        runs.add(codes[j], values);
        values += kWidth;
      }
      runs.close(k, r, whole);
    }
  }
}

// Whether a mask may have pixels in rows top...bottom of columns left...right.
bool may_occur(const MaskMatching& args, int64_t image, int64_t mask, int64_t top, int64_t bottom, int64_t left,
               int64_t right) {
  if (!args.occurs) return true;
  const MaskTargets& targets = args.targets;
  int64_t pieces = (targets.width + kMaskPiece - 1) / kMaskPiece;
  const char* row = args.occurs + ((image * targets.count + mask) * targets.height + top) * pieces;
  for (; top < bottom; ++top, row += pieces)
    for (int64_t i = left / kMaskPiece; i * kMaskPiece < right; ++i)
      if (row[i]) return true;
  return false;
}

// One tile for each of `count` masks, `stride` apart.
void runs_of_masks(const Tile& tile, int64_t stride, const int32_t* masks, int64_t count, Runs& runs) {
  runs.clear();
  for (int64_t k = 0; k < tile.columns(); ++k) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      bool whole = true;
      for (int64_t i = 0; i < count; ++i) {
        const int32_t* t = tile.at(k, r) + i * stride;
        if (all(equal(load_ints(t), IVec{}))) continue;
        bool ones = all(equal(load_ints(t), IVec{} + 0x3f800000));
        runs.add(masks[i], ones ? nullptr : reinterpret_cast<const float*>(t));
        whole &= ones;
      }
      runs.close(k, r, whole);
    }
  }
}

// Adds the products of one query with the targets that occur, a register each, and the totals.
template <bool kSquare>
void match_runs(const MaskMatching& args, const Runs& runs, const Tile& tile, const GridRows& grid,
                const float* weight, float* products, Sums<3>& totals) {
  Rows rows;
  Sums<3> column;
  for (int64_t i = 0; i < runs.num_runs; ++i) {
    const Run& run = runs.runs[i];
    int64_t at = run.column * kWidth, n = run.end - run.begin;
    rows.fill(load(grid.upper + at), grid.step(at), weight + run.begin, n);
    auto maps = sum_of<5>(n, [&](int64_t r) __attribute__((always_inline)) {
      Logistic x(rows, r);
      Vec y = rows.y[r];
      Mask above = positive(y);
      Vec over = where(above, y);
      Vec plus = x.log + over, minus = x.log + (over - y);  // softplus of x and of -x, over ln 2
      Vec p = select(above, x.large, x.small), q = select(above, x.small, x.large);
      return Sums<5>{minus * (kSquare ? q * q : exp2_down(-args.gamma * plus)),
                     plus * (kSquare ? p * p : exp2_down(-args.gamma * minus)), y, plus, p};
    });
    maps.keep(first_lanes(tile.lanes(run.column)));
    Vec outside = args.alpha_outside * maps.v[1];
    Vec inside[3] = {args.alpha * maps.v[0] - outside, maps.v[2], maps.v[4]};
    column += {outside, maps.v[3], maps.v[4]};
    if (i + 1 == runs.num_runs || runs.runs[i + 1].column != run.column) {
      totals += column;
      column = {};
    }
    for (int32_t part = run.first_part; part < run.last_part; ++part) {
      const Part& target = runs.parts[part];
      Vec t = target.values ? load(target.values) : splat(1);
      float* to = products + target.slot * 3 * kWidth;
      for (int k = 0; k < 3; ++k) store(to + k * kWidth, load(to + k * kWidth) + t * inside[k]);
    }
  }
}

}  // namespace

void mask_matching(const MaskMatching& args, int64_t image, int64_t begin, int64_t end, char* scratch) {
  const MaskTargets& targets = args.targets;
  const MaskEntry& entry = args.entry;
  bool labels = is_labels(targets);
  int64_t width = padded(targets.width), count = targets.count, queries = end - begin;
  // Fewer columns where registers are narrow: no sum of single rows gets longer.
  int64_t columns = min_of<int64_t>(args.chunk_columns, 16 * kWidth);
  int64_t pixels = args.chunk_rows * columns, vectors = pixels / kWidth, depth = args.chunk_targets;
  Arena arena(scratch);
  double* products = arena.take<double>(3 * queries * count);
  double* totals = arena.take<double>(3 * queries);
  Runs runs{arena.take<Run>(vectors), arena.take<Part>(vectors * depth), arena.take<int32_t>(count),
            arena.take<int32_t>(count)};
  float* sums = arena.take<float>(3 * kWidth * (labels ? min_of(count, pixels) : count));
  float *upper = arena.take<float>(width), *lower = arena.take<float>(width);
  float* buffer = arena.take<float>(columns);
  float* grid_buffer = arena.take<float>(row_buffer(entry.columns.source));
  float* values = arena.take<float>(pixels * depth);  // of masks, or of labels' mixed vectors
  int32_t *codes = arena.take<int32_t>(pixels), *present = arena.take<int32_t>(count);
  __builtin_memset(products, 0, 3 * queries * count * sizeof(double));
  __builtin_memset(totals, 0, 3 * queries * sizeof(double));
  for (int64_t i = 0; i < count; ++i) runs.slot_of[i] = -1;

  auto match_piece = [&](int64_t y, int64_t top, int64_t rows, int64_t left) {
    Tile tile{labels ? codes : reinterpret_cast<int32_t*>(values), rows,
              min_of(columns, targets.width - left)};
    if (labels) {
      fill_labels(tile, targets, image, top, left, reinterpret_cast<int32_t*>(buffer));
      runs_of_labels(tile, values, runs);
    } else {
      int64_t found = 0;
      for (int64_t mask = 0; mask < count; ++mask) {
        if (!may_occur(args, image, mask, top, top + rows, left, left + tile.width)) continue;
        Tile one{tile.data + found * pixels, rows, tile.width};
        fill_mask(one, targets, image, mask, top, left, buffer);
        present[found++] = static_cast<int32_t>(mask);
      }
      runs_of_masks(tile, pixels, present, found, runs);
    }
    for (int64_t i = 0; i < queries; ++i) {
      GridRows grid{upper, lower, y, y + 1 == entry.rows.source};
      int64_t right = min_of(width, left + columns);
      upsample_row(entry, image, begin + i, y, grid_buffer, upper, left, right);
      if (!grid.last) upsample_row(entry, image, begin + i, y + 1, grid_buffer, lower, left, right);
      grid.upper += left, grid.lower += left;
      __builtin_memset(sums, 0, 3 * kWidth * runs.num_targets * sizeof(float));
      Sums<3> total;
      auto* run = args.gamma == 2 ? match_runs<true> : match_runs<false>;
      run(args, runs, tile, grid, entry.rows.weight + top, sums, total);
      for (int k = 0; k < 3; ++k) {
        totals[k * queries + i] += sum(total.v[k]);
        for (int64_t slot = 0; slot < runs.num_targets; ++slot)
          products[(k * queries + i) * count + runs.targets[slot]] +=
              sum(load(sums + (slot * 3 + k) * kWidth));
      }
    }
  };
  for_bands(entry.rows, 0, targets.height, [&](int64_t y, int64_t band, int64_t band_end) {
    for (int64_t top = band; top < band_end; top += args.chunk_rows)
      for (int64_t left = 0; left < targets.width; left += columns)
        match_piece(y, top, min_of(args.chunk_rows, band_end - top), left);
  });

  const double product_scale[3] = {kLn2, -kLn2, 1}, total_scale[3] = {kLn2, kLn2, 1};
  for (int k = 0; k < 3; ++k) {
    for (int64_t i = 0; i < queries; ++i) {
      int64_t to = (k * args.batch + image) * args.queries + begin + i;
      args.totals[to] = static_cast<float>(totals[k * queries + i] * total_scale[k]);
      for (int64_t c = 0; c < count; ++c)
        args.products[to * count + c] =
            static_cast<float>(products[(k * queries + i) * count + c] * product_scale[k]);
    }
  }
}

}  // namespace segvit::SEGVIT_ISA
