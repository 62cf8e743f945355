// Semantic argmax of a part of a row at a time; nothing larger than a tile of 64 pixels is kept.
//
// The masks are interpolated between two rows of cells once per output row, then along the row for a tile,
// with pixels in the lanes: σ lies as [query][pixel], in float32. Three ways lead from there to a label, all
// to the class whose float32 score is the first largest:
//   - accumulate: float32 products with the probabilities of every class, 6 classes by 4 registers of pixels;
//   - solve_by_bounds: σ and probabilities in 8 bits, four times as fast (VNNI; AVX2: 7 bits of probabilities),
//     with a proven interval for every score. Only classes whose interval reaches the best lower end are computed in float32, for 16
//     pixels each;
//   - the head: float32 products over the few tokens and classes that have nearly all class mass. Pixels
//     where the rest could change the winner are collected and go one of the other ways.
// For 150 tokens and classes a tile takes 38 KB for σ, 10 KB for its bytes, 23 KB for those of probabilities
// and 38 KB for the intervals: in L2, the bytes in L1. A row of masks is read once per output row.
#include "semantic_argmax.h"

#include "pixels.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kTile = kArgmaxTile, kBlock = kArgmaxBlock, kClasses = kArgmaxClasses;
constexpr int kVectors = kWidth == 16 ? 4 : 2;  // registers of pixels in a product
static_assert(kTile % (kVectors * kWidth) == 0);

// Whether any element of a is at least that of b.
SEGVIT_INLINE bool any_reaches(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#else
  return bits_of(a >= b);
#endif
}

// Whether any element of a is greater than that of b.
SEGVIT_INLINE bool any_exceeds(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  return bits_of(a > b);
#endif
}

// The column to the left of every pixel and the share of the one to the right.
struct Pixels {
  const int32_t* taps;
  const float *fractions, *weights;  // weights null: all 1
  int64_t count;
};

struct Work {
  const SemanticArgmax& args;
  const SemanticScratch& scratch;
  const SemanticImage& image;
  int64_t y, x0, count;
  const SemanticView* tapped;     // whose columns the scratch memory holds
  int64_t first_cell, cells;      // which of its cells they touch
};

double place(double step, double offset, int64_t pixel, int32_t cells) {
  double at = pixel * step + offset;
  return at < 0 ? 0 : at > cells - 1 ? cells - 1 : at;
}

bool covers(const SemanticView& view, const Work& work) {
  return view.top <= work.y && work.y < view.bottom && view.left < work.x0 + work.count &&
         work.x0 < view.right;
}

// Columns of the chunk's pixels in a view.
void find_taps(Work& work, const SemanticView& view) {
  if (work.tapped == &view) return;
  work.tapped = &view;
  int32_t* taps = work.scratch.taps;
  float* fractions = work.scratch.fractions;
  int32_t low = view.width, high = 0;
  for (int64_t i = 0; i < work.count; ++i) {
    double at = place(view.affine[2], view.affine[3], work.x0 + i, view.width);
    int32_t left = static_cast<int32_t>(at);
    taps[i] = left;
    fractions[i] = static_cast<float>(at - left);
    low = min_of(low, left);
    high = max_of(high, left);
  }
  work.first_cell = low;
  work.cells = min_of(high + 2, view.width) - low;
  for (int64_t i = 0; i < work.count; ++i) taps[i] -= low;
}

// Copies the chosen pixels, if any are, and fills up the last tile with its last pixel.
Pixels pick(const Work& work, const int32_t* chosen, int64_t count, bool weighted) {
  const SemanticScratch& s = work.scratch;
  int32_t* taps = s.taps;
  float *fractions = s.fractions, *weights = s.weights;
  if (chosen) {
    for (int64_t i = 0; i < count; ++i) {
      s.some_taps[i] = taps[chosen[i]];
      s.some_fractions[i] = fractions[chosen[i]];
    }
    if (weighted)
      for (int64_t i = 0; i < count; ++i) s.some_weights[i] = weights[chosen[i]];
    taps = s.some_taps, fractions = s.some_fractions, weights = s.some_weights;
  }
  for (int64_t i = count; i % kTile; ++i) {
    taps[i] = taps[i - 1];
    fractions[i] = fractions[i - 1];
    if (weighted) weights[i] = weights[i - 1];
  }
  return {taps, fractions, weighted ? weights : nullptr, count};
}

template <class T>
SEGVIT_INLINE void fill_row(const T* upper, const T* lower, Vec share, int64_t cells, float* row) {
  auto between = [&](Vec a, Vec b) {
    a = finite(a);
    return a + share * (finite(b) - a);
  };
  if (cells < kWidth) {
    store_some(row, cells, between(load_some(upper, cells), load_some(lower, cells)));
  } else {
    auto at = [&](int64_t i) { store(row + i, between(load(upper + i), load(lower + i))); };
    for (int64_t i = 0; i + kWidth <= cells; i += kWidth) at(i);
    at(cells - kWidth);
  }
  row[cells] = row[cells - 1];
}

// Rows of cells of queries q0...q1 at the height of the output row.
void fill(const Work& work, const SemanticView& view, int64_t q0, int64_t q1) {
  double at = place(view.affine[0], view.affine[1], work.y, view.height);
  int64_t upper = static_cast<int64_t>(at), lower = min_of<int64_t>(upper + 1, view.height - 1);
  Vec share = splat(static_cast<float>(at - upper));
  float* row = work.scratch.rows;
  auto all = [&]<class T>(const T* mask) {
    for (int64_t q = q0; q < q1; ++q, row += work.args.rows_stride) {
      const T* cells = mask + view.order[q] * view.query_stride + work.first_cell;
      fill_row(cells + upper * view.row_stride, cells + lower * view.row_stride, share, work.cells, row);
    }
  };
  if (work.args.type == Type::f32) all(reinterpret_cast<const float*>(view.mask));
  else if (work.args.type == Type::f16) all(reinterpret_cast<const f16*>(view.mask));
  else all(reinterpret_cast<const bf16*>(view.mask));
  // Four at a time follow; what numbers lie there does not matter, but subnormal ones take long.
  for (int64_t q = q1 - q0; q % 4; ++q, row += work.args.rows_stride)
    __builtin_memset(row, 0, work.args.rows_stride * sizeof(float));
}

// σ of `queries` rows, rounded up to four, at one register of pixels, and for `bytes` round(255 σ) − 128,
// four queries to a word.
template <bool kSigmoid, bool kWindow, bool kBytes>
[[gnu::noinline]] void sigma_of(const float* rows, int64_t stride, int64_t queries, const Pixels& pixels,
                                int64_t first, int32_t base, float* sigma, int8_t* bytes) {
  IVec left = load_ints(pixels.taps + first) - base, right = left + 1;
  Vec share = load(pixels.fractions + first);
  Vec weight = pixels.weights ? load(pixels.weights + first) : splat(1);
  rows += base;
  for (int64_t q = 0; q < queries; q += 4, bytes += 4 * kTile) {
    IVec word{};
    SEGVIT_UNROLL_8 for (int i = 0; i < 4; ++i, rows += stride, sigma += kTile) {
      Vec a, b;
      if (kWindow) {
        Vec cells = load(rows);
        a = permute(cells, left), b = permute(cells, right);
      } else {
        a = gather(rows, left), b = gather(rows, right);
      }
      Vec v = a + share * (b - a);
      if (kSigmoid) v = sigmoid(v);
      if (!kBytes) v *= weight;
      store(sigma, v);
      // The sum with 2^23 has round(255 σ) in its low byte and 0x4b in the highest.
      if (kBytes) word ^= (IVec)(v * 255.0f + 0x1p23f) << (8 * i);
    }
    if (kBytes) store_ints(reinterpret_cast<int32_t*>(bytes), word ^ (0x4b000000 ^ (int32_t)0x80808080));
  }
}

template <bool kBytes = false>
void sigma_at(const Work& work, int64_t queries, const Pixels& pixels, int64_t first, int64_t vector) {
  int32_t low = pixels.taps[first], high = low;
  for (int i = 1; i < kWidth; ++i) {
    low = min_of(low, pixels.taps[first + i]);
    high = max_of(high, pixels.taps[first + i]);
  }
  auto* f = !work.args.sigmoid          ? &sigma_of<false, false, false>
            : high + 1 - low < kWidth ? &sigma_of<true, true, kBytes>
                                      : &sigma_of<true, false, kBytes>;
  const SemanticScratch& s = work.scratch;
  f(s.rows, work.args.rows_stride, queries, pixels, first, low, s.sigma + vector * kWidth,
    s.bytes + vector * 4 * kWidth);
}

// scores += probabilities × σ for kRows classes and kCount registers of pixels.
template <int kRows, int kCount>
[[gnu::noinline]] void product(const float* sigma, int64_t queries, const float* const* probs, float* scores,
                           int64_t stride) {
  Vec sums[kRows][kCount] = {};
  for (int64_t q = 0; q < queries; ++q, sigma += kTile) {
    Vec s[kCount];
    SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) s[v] = load(sigma + v * kWidth);
    SEGVIT_UNROLL_8 for (int r = 0; r < kRows; ++r)
      SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) sums[r][v] += probs[r][q] * s[v];
  }
  SEGVIT_UNROLL_8 for (int r = 0; r < kRows; ++r)
    SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) {
      float* score = scores + r * stride + v * kWidth;
      store(score, load(score) + sums[r][v]);
    }
}

template <int kRows>
SEGVIT_INLINE void products(const float* sigma, int64_t queries, const float* const* probs, int64_t vectors,
                            float* scores, int64_t stride) {
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors)
    product<kRows, kVectors>(sigma + v * kWidth, queries, probs, scores + v * kWidth, stride);
  for (; v < vectors; ++v) product<kRows, 1>(sigma + v * kWidth, queries, probs, scores + v * kWidth, stride);
}

// How many groups cover every pixel; a view's share in the mean is 1 / (groups · members of its own).
void count_groups(const Work& work) {
  const SemanticView* views = work.image.views;
  float* groups = work.scratch.groups;
  __builtin_memset(groups, 0, work.count * sizeof(float));
  for (int64_t v = 0; v < work.image.count;) {
    int64_t end = v;
    float* members = work.scratch.members;
    __builtin_memset(members, 0, work.count * sizeof(float));
    for (; end < work.image.count && views[end].group == views[v].group; ++end)
      if (covers(views[end], work))
        for (int64_t i = max_of<int64_t>(0, views[end].left - work.x0),
                     last = min_of<int64_t>(work.count, views[end].right - work.x0);
             i < last; ++i)
          ++members[i];
    for (int64_t i = 0; i < work.count; ++i) groups[i] += members[i] > 0;
    v = end;
  }
}

// Weights of view v; `work.scratch.members` is kept over the views of a group.
void weigh(const Work& work, int64_t v) {
  const SemanticView* views = work.image.views;
  float *members = work.scratch.members, *weights = work.scratch.weights;
  __builtin_memset(members, 0, work.count * sizeof(float));
  auto range = [&](const SemanticView& view, const auto& f) {
    int64_t end = min_of<int64_t>(work.count, view.right - work.x0);
    for (int64_t i = max_of<int64_t>(0, view.left - work.x0); i < end; ++i) f(i);
  };
  for (int64_t other = 0; other < work.image.count; ++other)
    if (views[other].group == views[v].group && covers(views[other], work))
      range(views[other], [&](int64_t i) { ++members[i]; });
  __builtin_memset(weights, 0, work.count * sizeof(float));
  range(views[v], [&](int64_t i) { weights[i] = 1 / (members[i] * work.scratch.groups[i]); });
}

// Float32 scores [class][chunk] of the chosen pixels by the first `limit` queries of every view; `index`
// null: of the classes from c0 on.
void accumulate(Work& work, bool weighted, const int32_t* chosen, int64_t count, int64_t limit,
                const int32_t* index, int64_t c0, int64_t classes) {
  const SemanticScratch& s = work.scratch;
  int64_t stride = work.args.chunk;
  for (int64_t c = 0; c < classes; ++c)
    __builtin_memset(s.scores + c * stride, 0, (count + kTile - 1) / kTile * kTile * sizeof(float));
  for (int64_t v = 0; v < work.image.count; ++v) {
    const SemanticView& view = work.image.views[v];
    if (!covers(view, work)) continue;
    find_taps(work, view);
    if (weighted) weigh(work, v);
    Pixels pixels = pick(work, chosen, count, weighted);
    int64_t queries = min_of<int64_t>(limit, view.queries), begin = 0, end = count;
    if (!chosen) {
      begin = max_of<int64_t>(0, view.left - work.x0) / kTile * kTile;
      end = min_of<int64_t>(count, view.right - work.x0);
    }
    for (int64_t q0 = 0; q0 < queries; q0 += kBlock) {
      int64_t block = min_of<int64_t>(kBlock, queries - q0);
      fill(work, view, q0, q0 + block);
      for (int64_t tile = begin; tile < end; tile += kTile) {
        int64_t vectors = (min_of<int64_t>(kTile, end - tile) + kWidth - 1) / kWidth;
        for (int64_t i = 0; i < vectors; ++i) sigma_at(work, block, pixels, tile + i * kWidth, i);
        const float* probs[kClasses];
        for (int64_t c = 0; c < classes;) {
          int64_t rows = min_of<int64_t>(kClasses, classes - c);
          for (int64_t r = 0; r < rows; ++r)
            probs[r] = view.probs + (index ? index[c + r] : c0 + c + r) * view.probs_stride + q0;
          float* scores = s.scores + c * stride + tile;
          if (rows == kClasses) {
            products<kClasses>(s.sigma, block, probs, vectors, scores, stride);
            c += kClasses;
          } else {
            products<1>(s.sigma, block, probs, vectors, scores, stride);
            ++c;
          }
        }
      }
    }
  }
}

// The first maximum over classes, joined to what is there.
void join_maximum(const Work& work, int64_t count, int64_t c0, int64_t classes, float* best,
                  int32_t* labels) {
  for (int64_t i = 0; i < count; i += kWidth) {
    Vec value = load(best + i);
    IVec label = load_ints(labels + i);
    for (int64_t c = 0; c < classes; ++c) {
      Vec score = load(work.scratch.scores + c * work.args.chunk + i);
      label = score > value ? IVec{} + static_cast<int32_t>(c0 + c) : label;
      value = vmax(score, value);
    }
    store(best + i, value);
    store_ints(labels + i, label);
  }
}

// The first maxima over classes, in order, joined to what is there, and the sum of all scores.
void join_best(const Work& work, int64_t count, int64_t c0, int64_t classes) {
  const SemanticScratch& s = work.scratch;
  int64_t stride = work.args.chunk, best = work.args.best;
  for (int64_t i = 0; i < count; i += kWidth) {
    float* values = s.best_scores + i;
    int32_t* labels = s.best_labels + i;
    Vec total = load(s.totals + i), part{}, least = load(values + (best - 1) * stride);
    for (int64_t c = 0; c < classes; ++c) {
      Vec score = load(s.scores + c * stride + i);
      part += score;
      if (c % 32 == 31) total += part, part = Vec{};  // sums of sums lose less
      if (!any_exceeds(score, least)) continue;
      // From where it goes in on, each moves one place down.
      IVec label = IVec{} + static_cast<int32_t>(c0 + c), in{};
      for (int64_t j = 0; j < best; ++j) {
        Vec value = load(values + j * stride);
        IVec its = load_ints(labels + j * stride);
        in |= score > value;
        store(values + j * stride, in ? score : value);
        store_ints(labels + j * stride, in ? label : its);
        score = in ? value : score;
        label = in ? its : label;
      }
      least = load(values + (best - 1) * stride);
    }
    store(s.totals + i, total + part);
  }
}

#if defined(__AVX2__)

// sum += k·σ8 of four queries, for every pixel.
SEGVIT_INLINE void add_products(IVec& sum, IVec k, IVec sigma) {
#if defined(__AVX512VNNI__)
  // As an instruction: of the intrinsic, GCC 12 copies and spills every sum.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(k), "v"(sigma));
#else
  // Two by two in 16 bits, which holds them since k is at most 127.
  __m256i pairs = _mm256_maddubs_epi16((__m256i)k, (__m256i)sigma);
  sum += (IVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// Upper ends of the intervals of all classes at kCount registers of pixels, their maxima over six classes,
// and the largest lower end.
template <int kCount>
[[gnu::noinline]] void bound(const SemanticBytes& p, const int8_t* sigma, int64_t quads, int64_t groups,
                             float* upper, float* group_upper, Vec* best) {
  Vec lower[kCount];
  SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) lower[v] = splat(-kInfinity);
  const uint8_t* values = p.values;
  for (int64_t g = 0; g < groups; ++g, upper += kClasses * kTile, group_upper += kTile) {
    IVec sums[kClasses][kCount];
    SEGVIT_UNROLL_8 for (int r = 0; r < kClasses; ++r)
      SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) sums[r][v] = IVec{} + p.bias[g * kClasses + r];
    const int8_t* at = sigma;
    for (int64_t q = 0; q < quads; ++q, at += 4 * kTile, values += 4 * kClasses) {
      IVec s[kCount];
      SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v)
        s[v] = load_ints(reinterpret_cast<const int32_t*>(at) + v * kWidth);
      SEGVIT_UNROLL_8 for (int r = 0; r < kClasses; ++r) {
        int32_t four;
        __builtin_memcpy(&four, values + 4 * r, 4);
        IVec k = IVec{} + four;
        SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) add_products(sums[r][v], k, s[v]);
      }
    }
    Vec most[kCount];
    SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) most[v] = splat(-kInfinity);
    SEGVIT_UNROLL_8 for (int r = 0; r < kClasses; ++r) {
      int64_t c = g * kClasses + r;
      SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) {
        Vec low = __builtin_convertvector(sums[r][v], Vec) * p.scale[c] + p.low[c];
        Vec high = low + p.width[c];
        lower[v] = vmax(lower[v], low);
        most[v] = vmax(most[v], high);
        store(upper + r * kTile + v * kWidth, high);
      }
    }
    SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) store(group_upper + v * kWidth, most[v]);
  }
  SEGVIT_UNROLL_8 for (int v = 0; v < kCount; ++v) best[v] = lower[v];
}

constexpr int kTogether = 4;

// Float32 scores of some classes at one register of pixels, summed in the order of `accumulate`: blocks of
// queries, two of them at a time so that there are enough sums to wait for.
[[gnu::noinline]] void exact(const float* sigma, int64_t queries, const float* const* probs, Vec* scores) {
  SEGVIT_UNROLL_8 for (int r = 0; r < kTogether; ++r) scores[r] = Vec{};
  for (int64_t q = 0; q < queries; q += 2 * kBlock) {
    int64_t first = min_of<int64_t>(kBlock, queries - q);
    int64_t second = max_of<int64_t>(0, min_of<int64_t>(kBlock, queries - q - kBlock));
    Vec a[kTogether] = {}, b[kTogether] = {};
    int64_t i = 0;
    for (; i < second; ++i) {
      Vec s = load(sigma + (q + i) * kTile), t = load(sigma + (q + kBlock + i) * kTile);
      SEGVIT_UNROLL_8 for (int r = 0; r < kTogether; ++r) {
        a[r] += probs[r][q + i] * s;
        b[r] += probs[r][q + kBlock + i] * t;
      }
    }
    for (; i < first; ++i) {
      Vec s = load(sigma + (q + i) * kTile);
      SEGVIT_UNROLL_8 for (int r = 0; r < kTogether; ++r) a[r] += probs[r][q + i] * s;
    }
    SEGVIT_UNROLL_8 for (int r = 0; r < kTogether; ++r) scores[r] = (scores[r] + a[r]) + b[r];
  }
}

// Labels, and scores if asked for, of the chosen pixels by 8-bit bounds and exact scores of the rivals.
void solve_by_bounds(Work& work, const SemanticView& view, const int32_t* chosen, int64_t count, float* best,
                     int32_t* labels) {
  const SemanticScratch& s = work.scratch;
  int64_t queries = view.queries, quads = (queries + 3) / 4;
  int64_t groups = (work.args.classes + kClasses - 1) / kClasses;
  find_taps(work, view);
  Pixels pixels = pick(work, chosen, count, false);
  fill(work, view, 0, queries);
  for (int64_t tile = 0; tile < count; tile += kTile) {
    int64_t vectors = (min_of<int64_t>(kTile, count - tile) + kWidth - 1) / kWidth;
    for (int64_t v = 0; v < vectors; ++v) sigma_at<true>(work, queries, pixels, tile + v * kWidth, v);
    Vec lower[kTile / kWidth];
    for (int64_t v = 0; v < vectors;) {
      bool several = v + kVectors <= vectors;
      (several ? &bound<kVectors> : &bound<1>)(view.bytes, s.bytes + v * 4 * kWidth, quads, groups,
                                               s.scores + v * kWidth, s.upper + v * kWidth, lower + v);
      v += several ? kVectors : 1;
    }
    for (int64_t v = 0; v < vectors; ++v) {
      int64_t rivals = 0;
      for (int64_t g = 0; g < groups; ++g) {
        if (!any_reaches(load(s.upper + g * kTile + v * kWidth), lower[v])) continue;
        for (int64_t c = g * kClasses; c < (g + 1) * kClasses; ++c) {
          s.list[rivals] = static_cast<int32_t>(c);
          rivals += any_reaches(load(s.scores + c * kTile + v * kWidth), lower[v]);
        }
      }
      int64_t i = tile + v * kWidth;
      if (rivals == 1 && !work.args.scores) {
        store_ints(labels + i, IVec{} + s.list[0]);
        continue;
      }
      Vec value = splat(-kInfinity);
      IVec label{};
      for (int64_t r = 0; r < rivals; r += kTogether) {
        const float* probs[kTogether];
        Vec scores[kTogether];
        // Once more the last one where there are fewer.
        for (int j = 0; j < kTogether; ++j)
          probs[j] = view.probs + s.list[min_of<int64_t>(r + j, rivals - 1)] * view.probs_stride;
        exact(s.sigma + v * kWidth, queries, probs, scores);
        for (int j = 0; j < kTogether && r + j < rivals; ++j) {
          label = scores[j] > value ? IVec{} + s.list[r + j] : label;
          value = vmax(scores[j], value);
        }
      }
      store(best + i, value);
      store_ints(labels + i, label);
    }
  }
}

#endif

// Labels by the head's scores; returns how many pixels it leaves open and lists them.
int64_t decide(const Work& work) {
  const SemanticScratch& s = work.scratch;
  const SemanticHead& head = work.image.head;
  int64_t open = 0;
  for (int64_t i = 0; i < work.count; i += kWidth) {
    Vec threshold{};
    const float* scores = s.scores + i;
    for (int64_t c = 0; c < head.classes; ++c)
      threshold = vmax(load(scores + c * work.args.chunk), threshold);
    threshold *= 1 - 1e-4f;  // covers the rounding of sums of thousands of terms
    IVec rivals = IVec{}, label = IVec{};
    for (int64_t c = 0; c < head.classes; ++c) {
      IVec rival = load(scores + c * work.args.chunk) + head.rest[c] >= threshold;
      rivals -= rival;
      label = rival ? IVec{} + head.index[c] : label;
    }
    store_ints(s.labels + i, label);
    IVec undecided = (rivals != 1) | (threshold <= head.outside);
    for (int64_t j = 0; j < min_of<int64_t>(kWidth, work.count - i); ++j)
      if (undecided[j]) s.open[open++] = static_cast<int32_t>(i + j);
  }
  return open;
}

void solve(Work& work, const SemanticView* only, const int32_t* chosen, int64_t count, float* best,
           int32_t* labels) {
#if defined(__AVX2__)
  if (only && only->bytes.values) return solve_by_bounds(work, *only, chosen, count, best, labels);
#endif
  for (int64_t i = 0; i < count; i += kWidth) {
    store(best + i, splat(-kInfinity));
    store_ints(labels + i, IVec{});
  }
  for (int64_t c = 0; c < work.args.classes; c += work.args.turn) {
    int64_t classes = min_of<int64_t>(work.args.turn, work.args.classes - c);
    accumulate(work, !only, chosen, count, INT64_MAX, nullptr, c, classes);
    join_maximum(work, count, c, classes, best, labels);
  }
}

// Labels of a row as they are stored.
void store_labels(const SemanticArgmax& args, const int32_t* labels, int64_t count, int64_t offset) {
  if (args.wide) {
    int16_t* out = reinterpret_cast<int16_t*>(args.labels) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int16_t>(labels[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) args.labels[offset + i] = static_cast<char>(labels[i]);
  }
}

// The best classes of a row and their shares of all scores.
void solve_best(Work& work, bool several, int64_t image) {
  const SemanticArgmax& args = work.args;
  const SemanticScratch& s = work.scratch;
  for (int64_t i = 0; i < work.count; i += kWidth) {
    store(s.totals + i, Vec{});
    for (int64_t j = 0; j < args.best; ++j) {
      store(s.best_scores + j * args.chunk + i, splat(-kInfinity));
      store_ints(s.best_labels + j * args.chunk + i, IVec{});
    }
  }
  for (int64_t c = 0; c < args.classes; c += args.turn) {
    int64_t classes = min_of<int64_t>(args.turn, args.classes - c);
    accumulate(work, several, nullptr, work.count, INT64_MAX, nullptr, c, classes);
    join_best(work, work.count, c, classes);
  }
  for (int64_t j = 0; j < args.best; ++j) {
    int64_t offset = ((image * args.best + j) * args.height + work.y) * args.width + work.x0;
    store_labels(args, s.best_labels + j * args.chunk, work.count, offset);
    const float* scores = s.best_scores + j * args.chunk;
    for (int64_t i = 0; i < work.count; ++i)
      args.scores[offset + i] = s.totals[i] > 0 ? scores[i] / s.totals[i] : 1.0f / args.classes;
  }
}

}  // namespace

void semantic_argmax(const SemanticArgmax& args, int64_t image, int64_t y0, int64_t y1, int64_t x0,
                     int64_t x1, const SemanticScratch& s) {
  Work work{args, s, args.images[image], y0, x0, x1 - x0, nullptr, 0, 0};
  const SemanticHead& head = work.image.head;
  for (; work.y < y1; ++work.y) {
    const SemanticView* only = nullptr;
    int64_t covering = 0;
    for (int64_t v = 0; v < work.image.count; ++v)
      if (covers(work.image.views[v], work)) ++covering, only = work.image.views + v;
    if (covering != 1) {
      only = nullptr;
      count_groups(work);
    }
    if (args.best) {
      solve_best(work, !only, image);
      continue;
    }
    if (head.queries) {
      accumulate(work, !only, nullptr, work.count, head.queries, head.index, 0, head.classes);
      int64_t open = decide(work);
      if (4 * open > work.count) {  // neighbours are quicker than scattered pixels
        solve(work, only, nullptr, work.count, s.best, s.labels);
      } else if (open) {
        solve(work, only, s.open, open, s.best, s.open_labels);
        for (int64_t i = 0; i < open; ++i) s.labels[s.open[i]] = s.open_labels[i];
      }
    } else {
      solve(work, only, nullptr, work.count, s.best, s.labels);
    }
    int64_t offset = (image * args.height + work.y) * args.width + x0;
    store_labels(args, s.labels, work.count, offset);
    if (args.scores) __builtin_memcpy(args.scores + offset, s.best, work.count * sizeof(float));
  }
}

}  // namespace segvit::SEGVIT_ISA
