// Attention with a tile of scores at a time, forward and backward.
//
// The scores lie transposed, S^T: a key a row, queries side by side in vectors. So the statistics of the
// softmax are vectors too, and every product, of two in the forward and five in the backward, is one
// microkernel that takes one factor element by element from rows as they are and the other in vectors:
//   S^T = K Q^T    O^T += V^T P^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T
// It keeps 8 rows by up to 3 vectors (AVX-512; 4 rows elsewhere, 8 by 2 with NEON) in registers, and runs at 95 to 100 % of the
// FMA rate with data in the first-level cache and two vectors or more.
//
// A tile of scores, 64 keys by 48 queries, takes 12 KB, as much as each of the tile's keys and values with 48
// channels: they stay in the first-level cache, and nothing of the size of S is in memory. Half precisions
// become float32 where tiles are copied.
#include "attention.h"
#include "philox.h"
#include "../simd.h"
#include "transpose.h"

namespace segvit::SEGVIT_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8, kMostVectors = 3;
#elif defined(SEGVIT_NEON)
constexpr int kRows = 8, kMostVectors = 2;
#else
constexpr int kRows = 4, kMostVectors = 3;
#endif
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kUnseen = -1e38f;  // the largest score of a query that has seen none

// 2^v to one unit in the last place, and exactly 1 at 0; 0 below -126, or (AVX-512) below -149.
SEGVIT_INLINE Vec vexp2(Vec v) {
#if defined(__AVX512F__)
  Vec r = (Vec)_mm512_reduce_ps((__m512)v, 9);  // v - floor(v)
#else
  IVec seen = (IVec)!(v < -126);  // NaN is
  v = vmin(splat(127), vmax(splat(-126), v));  // in this order NaN stays NaN
  Vec n = vround(v - 0.499f);
  Vec r = v - n;
#endif
  Vec p = splat(2.1612916316e-4f);
  p = p * r + 1.2467845809e-3f;
  p = p * r + 9.6754515544e-3f;
  p = p * r + 5.5485282093e-2f;
  p = p * r + 2.4022930861e-1f;
  p = p * r + 6.9314706326e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)v);
#else
  return (Vec)(((IVec)p + (__builtin_convertvector(n, IVec) << 23)) & seen);
#endif
}

// ---- the microkernel ----

enum class Start { zero, sum, rescaled };  // what a product is added to: nothing, c, or c · factor

#if defined(SEGVIT_NEON)
template <int kElement>
SEGVIT_INLINE void add_product(Vec& sum, Vec right, Vec left) {
  sum = (Vec)vfmaq_laneq_f32((float32x4_t)sum, (float32x4_t)right, (float32x4_t)left, kElement);
}

template <int kElement>
struct Element {
  constexpr operator int() const { return kElement; }
};

// f of each element of a register, known to the compiler.
template <class F>
SEGVIT_INLINE void for_elements(const F& f) { f(Element<0>{}), f(Element<1>{}), f(Element<2>{}), f(Element<3>{}); }
#endif

// kRows rows of c (+)= a b; vectors along the columns of b and c, whose rows are ld apart. `a` has a row of c
// a row, or, if kTransposed, a row of c a column.
template <int kVectors, bool kTransposed, Start kStart>
SEGVIT_INLINE void product_block(const float* a, int64_t lda, const float* b, float* c, int64_t ld,
                                 int64_t depth, const float* factor) {
  Vec sums[kRows][kVectors] = {};
  const float* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = kTransposed ? a + i : a + i * lda;
  int64_t k = 0;
#if defined(SEGVIT_NEON)
  // Four factors a load: elements of a register are rows of c, or as many columns of `a`.
  constexpr int kSteps = kTransposed ? 1 : 4, kLefts = kTransposed ? kRows / 4 : kRows;
  for (; k + kSteps <= depth; k += kSteps) {
    Vec left[kLefts], right[kVectors];
    for (int i = 0; i < kLefts; ++i) left[i] = load(kTransposed ? a + k * lda + i * 4 : rows[i] + k);
    for_elements([&](auto element) {
      if (!kTransposed || element == 0) {
        for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kWidth);
        b += ld;
      }
      for (int i = 0; i < kLefts; ++i)
        for (int j = 0; j < kVectors; ++j)
          add_product<element>(sums[kTransposed ? i * 4 + element : i][j], right[j], left[i]);
    });
  }
#endif
  for (; k < depth; ++k) {
    Vec right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kWidth);
    b += ld;
    for (int i = 0; i < kRows; ++i) {
      float left = rows[i][kTransposed ? k * lda : k];
      for (int j = 0; j < kVectors; ++j) sums[i][j] += right[j] * left;
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * ld + j * kWidth;
      if (kStart == Start::sum) sums[i][j] += load(to);
      if (kStart == Start::rescaled) sums[i][j] += load(to) * load(factor + j * kWidth);
      store(to, sums[i][j]);
    }
}

template <int kVectors, bool kTransposed, Start kStart>
__attribute__((noinline)) void product_columns(int64_t rows, const float* a, int64_t lda, const float* b,
                                               float* c, int64_t ld, int64_t depth, const float* factor) {
  for (int64_t i = 0; i < rows; i += kRows)
    product_block<kVectors, kTransposed, kStart>(a + (kTransposed ? i : i * lda), lda, b, c + i * ld, ld,
                                                 depth, factor);
}

// `rows` is rounded up to kRows, `columns` to vectors.
template <bool kTransposed, Start kStart>
void product(int64_t rows, int64_t columns, const float* a, int64_t lda, const float* b, float* c, int64_t ld,
             int64_t depth, const float* factor = nullptr) {
  if (depth > 64) {
    // Long sums in parts: their rounding errors do not run up.
    product<kTransposed, kStart>(rows, columns, a, lda, b, c, ld, 32, factor);
    for (int64_t k = 32; k < depth; k += 32)
      product<kTransposed, Start::sum>(rows, columns, a + (kTransposed ? k * lda : k), lda, b + k * ld, c, ld,
                                       min_of<int64_t>(32, depth - k));
    return;
  }
  int64_t left = (columns + kWidth - 1) / kWidth;
  while (left > 0) {
    int64_t n = left == 4 ? 2 : min_of<int64_t>(left, kMostVectors);
    auto* columns_of = n == 3   ? &product_columns<kMostVectors, kTransposed, kStart>
                       : n == 2 ? &product_columns<2, kTransposed, kStart>
                                : &product_columns<1, kTransposed, kStart>;
    columns_of(rows, a, lda, b, c, ld, depth, factor);
    b += n * kWidth, c += n * kWidth, left -= n;
    if (factor) factor += n * kWidth;
  }
}

// ---- tensors to tiles and back ----

// f(element type's value) for the type of a tensor.
template <class F>
SEGVIT_INLINE void with_type(Type type, const F& f) {
  type == Type::f32 ? f(float{}) : type == Type::f16 ? f(f16{}) : f(bf16{});
}

// n rows of `dim` elements, `stride` apart, to rows of ld floats with zeros behind.
void copy_rows(Type type, const char* data, int64_t stride, int64_t n, int64_t dim, float* to, int64_t ld) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const T* from = reinterpret_cast<const T*>(data);
    for (int64_t i = 0; i < n; ++i, from += stride, to += ld) {
      int64_t d = 0;
      for (; d + kWidth <= dim; d += kWidth) store(to + d, load(from + d));
      for (; d < ld; d += kWidth)
        store_up_to(to + d, ld - d, d < dim ? load_up_to(from + d, dim - d) : Vec{});
    }
  });
}

// The other way, times `factor`.
void write_rows(Type type, char* data, int64_t stride, int64_t n, int64_t dim, const float* from, int64_t ld,
                float factor) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    T* to = reinterpret_cast<T*>(data);
    for (int64_t i = 0; i < n; ++i, from += ld, to += stride)
      for (int64_t d = 0; d < dim; d += kWidth) store_up_to(to + d, dim - d, load(from + d) * factor);
  });
}

// n rows of `dim` elements become columns, times `factor`; columns up to `ld` are zero.
void copy_transposed(Type type, const char* data, int64_t stride, int64_t n, int64_t dim, float factor,
                     float* to, int64_t ld) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const T* from = reinterpret_cast<const T*>(data);
    for (int64_t i = 0; i < ld; i += kWidth)
      for (int64_t d = 0; d < dim; d += kWidth) {
        Vec v[kWidth];
        for (int r = 0; r < kWidth; ++r)
          v[r] = i + r < n ? load_up_to(from + (i + r) * stride + d, dim - d) * factor : Vec{};
        transpose(v);
        for (int r = 0; r < min_of<int64_t>(kWidth, dim - d); ++r) store(to + (d + r) * ld + i, v[r]);
      }
  });
}

// The other way: f(column, first row, number of rows, vector down the column).
template <class F>
SEGVIT_INLINE void for_columns(const float* from, int64_t ld, int64_t rows, int64_t columns, const F& f) {
  for (int64_t i = 0; i < columns; i += kWidth)
    for (int64_t d = 0; d < rows; d += kWidth) {
      Vec v[kWidth];
      for (int r = 0; r < kWidth; ++r) v[r] = d + r < rows ? load(from + (d + r) * ld + i) : Vec{};
      transpose(v);
      for (int c = 0; c < min_of<int64_t>(kWidth, columns - i); ++c)
        f(i + c, d, min_of<int64_t>(kWidth, rows - d), v[c]);
    }
}

char* address(const HeadsView& view, int64_t batch, int64_t token, int64_t head) {
  int64_t offset = batch * view.batch_stride + token * view.token_stride + head * view.head_stride;
  return view.data + offset * size_of(view.type);
}
char* address(const MasksView& view, int64_t batch, int64_t query, int64_t key) {
  return view.data + (batch * view.batch_stride + query * view.query_stride + key) * size_of(view.type);
}

// f(i) for every token i of a tile that is padding.
template <class F>
SEGVIT_INLINE void for_padding(const AttentionShape& shape, int64_t batch, int64_t token, int64_t tokens,
                               const F& f) {
  if (!shape.padding) return;
  const bool* padding = shape.padding + batch * shape.keys + token;
  for (int64_t i = 0; i < tokens; ++i)
    if (padding[i]) f(i);
}

// Rows of a tile that belong to padding become `value`, `columns` of them.
void fill_padding(const AttentionShape& shape, int64_t batch, int64_t token, int64_t tokens, float* tile,
                  int64_t columns, float value) {
  for_padding(shape, batch, token, tokens, [&](int64_t i) {
    for (int64_t j = 0; j < columns; ++j) tile[i * columns + j] = value;
  });
}

// Keys or values of one head to rows of padded_dim floats; zero where they are padding.
void copy_tile(const AttentionShape& shape, const HeadsView& view, int64_t batch, int64_t token,
               int64_t tokens, int64_t head, float* to) {
  copy_rows(view.type, address(view, batch, token, head), view.token_stride, tokens, shape.dim, to,
            padded_dim(shape.dim));
  fill_padding(shape, batch, token, tokens, to, padded_dim(shape.dim), 0);
}

// Asks for rows that will be written. A share at a time between other work: more would wait for each other.
void prefetch_rows(const HeadsView& view, int64_t batch, int64_t begin, int64_t end, int64_t head,
                   int64_t dim) {
  for (int64_t token = begin; token < end; ++token) {
    const char* row = address(view, batch, token, head);
    for (int64_t byte = 0; byte < dim * size_of(view.type); byte += 64) __builtin_prefetch(row + byte, 1);
  }
}

// The panels of queries begin...end: f(first query, number, columns, columns before).
template <class F>
SEGVIT_INLINE void for_panels(int64_t begin, int64_t end, const F& f) {
  for (int64_t q = begin; q < end; q += kTileQueries) {
    int64_t n = min_of(kTileQueries, end - q);
    f(q, n, padded_queries(n), q - begin);
  }
}

// Factors of dropout, 0 or its scale, of keys key...key + keys by queries from `query` on.
void dropout_tile(const AttentionShape& shape, int64_t batch, int64_t head, int64_t key, int64_t keys,
                  int64_t query, int64_t columns, float* factors) {
  uint32_t groups = static_cast<uint32_t>((shape.keys + 7) / 8);
  UVec c1 = UVec{} + static_cast<uint32_t>(batch * shape.heads + head);
  const uint32_t* seed = shape.dropout.seed;
  for (int64_t j = 0; j < columns; j += kWidth) {
    UVec first = ((UVec)iota() + static_cast<uint32_t>(query + j)) * groups;
    for (int64_t i = 0; i < keys; i += 8) {
      UVec words[4];
      philox(seed[0], seed[1], first + static_cast<uint32_t>((key + i) / 8), c1, words);
      for (int half = 0; half < 8; ++half) {
        UVec bits = half % 2 ? words[half / 2] >> 16 : words[half / 2] & 0xffff;
        Vec kept = (IVec)bits >= (int32_t)shape.dropout.threshold ? splat(shape.dropout.scale) : Vec{};
        store(factors + (i + half) * columns + j, kept);
      }
    }
  }
}

// ---- forward ----

// f(i, whether i is odd): two sums side by side hide the latency of adding.
template <class F>
SEGVIT_INLINE void for_pairs(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) f(i, false), f(i + 1, true);
  if (i < n) f(i, false);
}

// Scores to weights, with the largest score and the sum so far of each query; `rescale` is what the sums were
// multiplied by. Scores are in units of log 2.
template <bool kMasks, bool kDropout>
void softmax_tile(float* scores, int64_t keys, int64_t columns, float* largest, float* sums, float* rescale,
                  float* masks, const float* factors) {
  for (int64_t j = 0; j < columns; j += kWidth) {
    Vec before = load(largest + j), most = before, most2 = before, total{}, total2{};
    for_pairs(keys, [&](int64_t i, bool second) {
      Vec s = load(scores + i * columns + j);
      if (kMasks) store(masks + i * columns + j, load(masks + i * columns + j) + s);
      (second ? most2 : most) = vmax(second ? most2 : most, s);
    });
    Vec now = vmax(most, most2), factor = vexp2(before - now);
    for_pairs(keys, [&](int64_t i, bool second) {
      float* p = scores + i * columns + j;
      Vec weight = vexp2(load(p) - now);
      (second ? total2 : total) += weight;
      store(p, kDropout ? weight * load(factors + i * columns + j) : weight);
    });
    store(largest + j, now);
    store(sums + j, load(sums + j) * factor + (total + total2));
    store(rescale + j, factor);
  }
}

void write_masks(const AttentionFwd& args, int64_t batch, int64_t query, int64_t queries, int64_t key,
                 int64_t keys, const float* tile, int64_t columns) {
  float factor = kLn2 / args.shape.heads;
  with_type(args.masks.type, [&](auto element) {
    using T = decltype(element);
    for_columns(tile, columns, keys, queries, [&](int64_t q, int64_t k, int64_t n, Vec v) {
      v *= factor;
      if (args.previous.data)
        v += load_up_to(reinterpret_cast<const T*>(address(args.previous, batch, query + q, key + k)), n);
      store_up_to(reinterpret_cast<T*>(address(args.masks, batch, query + q, key + k)), n, v);
    });
  });
}

}  // namespace

void attention_fwd(const AttentionFwd& args, const AttentionBlock& block, float* state, float* scratch) {
  const AttentionShape& shape = args.shape;
  int64_t dim = shape.dim, rows = padded_dim(dim), batch = block.batch;
  int64_t columns = padded_queries(block.query_end - block.query);
  int64_t heads = block.head_end - block.head;
  float* queries = scratch;
  float* key_tile = queries + heads * rows * columns;
  float* value_tile = key_tile + kTileKeys * rows;
  float* scores = value_tile + kTileKeys * rows;
  float* factors = scores + kTileKeys * kTileQueries;
  float* masks = factors + kTileKeys * kTileQueries;
  bool dropout = shape.dropout.threshold > 0;

  for (int64_t h = 0; h < heads; ++h)
    for_panels(block.query, block.query_end, [&](int64_t q, int64_t n, int64_t width, int64_t before) {
      copy_transposed(args.query.type, address(args.query, batch, q, block.head + h), args.query.token_stride,
                      n, dim, shape.scale * kLog2e, queries + (h * columns + before) * rows, width);
      float* output = state + (h * columns + before) * (rows + 2);
      __builtin_memset(output, 0, (rows + 2) * width * sizeof(float));
      for (int64_t j = 0; j < width; ++j) output[(rows + 1) * width + j] = kUnseen;
    });
  for (int64_t key = block.key; key < block.key_end; key += kTileKeys) {
    int64_t keys = min_of(kTileKeys, block.key_end - key), hidden = 0;
    for_padding(shape, batch, key, keys, [&](int64_t) { ++hidden; });
    if (args.masks.data) __builtin_memset(masks, 0, kTileKeys * columns * sizeof(float));
    for (int64_t h = 0; h < heads && hidden < keys; ++h) {
      int64_t head = block.head + h;
      copy_tile(shape, args.key, batch, key, keys, head, key_tile);
      copy_tile(shape, args.value, batch, key, keys, head, value_tile);
      for_panels(block.query, block.query_end, [&](int64_t q, int64_t n, int64_t width, int64_t before) {
        float* output = state + (h * columns + before) * (rows + 2);
        float *sums = output + rows * width, *largest = sums + width, *mask_tile = masks + before * kTileKeys;
        float rescale[kTileQueries];
        product<false, Start::zero>(keys, n, key_tile, rows, queries + (h * columns + before) * rows, scores,
                                    width, dim);
        // Far below what no score has reached: weight 0, and the largest score stays as it was.
        if (hidden) fill_padding(shape, batch, key, keys, scores, width, kUnseen * 3);
        if (dropout) dropout_tile(shape, batch, head, key, keys, q, width, factors);
        auto* softmax = args.masks.data
                            ? (dropout ? &softmax_tile<true, true> : &softmax_tile<true, false>)
                            : (dropout ? &softmax_tile<false, true> : &softmax_tile<false, false>);
        softmax(scores, keys, width, largest, sums, rescale, mask_tile, factors);
        product<true, Start::rescaled>(dim, n, value_tile, rows, scores, output, width, keys, rescale);
      });
    }
    if (args.masks.data)
      for_panels(block.query, block.query_end, [&](int64_t q, int64_t n, int64_t width, int64_t before) {
        fill_padding(shape, batch, key, keys, masks + before * kTileKeys, width, 0);
        write_masks(args, batch, q, n, key, keys, masks + before * kTileKeys, width);
      });
  }
}

void attention_finish(const AttentionFwd& args, const AttentionBlock& block, float* state, int64_t splits,
                      int64_t stride) {
  int64_t dim = args.shape.dim, rows = padded_dim(dim);
  int64_t columns = padded_queries(block.query_end - block.query);
  for (int64_t head = block.head; head < block.head_end; ++head)
    for_panels(block.query, block.query_end, [&](int64_t q, int64_t n, int64_t width, int64_t before) {
      float* output = state + ((head - block.head) * columns + before) * (rows + 2);
      float *sums = output + rows * width, *largest = sums + width;
      for (int64_t j = 0; j < width; j += kWidth) {
        Vec most = load(largest + j);
        for (int64_t s = 1; s < splits; ++s) most = vmax(most, load(largest + s * stride + j));
        for (int64_t s = 0; s < splits; ++s) {
          int64_t part = s * stride + j;
          Vec factor = vexp2(load(largest + part) - most);
          for (int64_t d = 0; d <= rows; ++d) {  // the sums are the last row
            Vec v = load(output + part + d * width) * factor;
            store(output + j + d * width, s ? load(output + j + d * width) + v : v);
          }
        }
        store(largest + j, most);
      }
      float* lse = args.lse + (block.batch * args.shape.heads + head) * args.shape.queries + q;
      for (int64_t i = 0; i < n; ++i) {
        bool unseen = args.shape.padding && largest[i] == kUnseen;
        lse[i] = unseen ? -__builtin_inff() : largest[i] * kLn2 + __builtin_logf(sums[i]);
        if (unseen) sums[i] = 1;  // nothing was added to the output
      }
      with_type(args.output.type, [&](auto element) {
        using T = decltype(element);
        for_columns(output, width, dim, n, [&](int64_t i, int64_t d, int64_t count, Vec v) {
          T* to = reinterpret_cast<T*>(address(args.output, block.batch, q + i, head));
          store_up_to(to + d, count, v / sums[i]);
        });
      });
    });
}

// ---- backward ----

namespace {

// Scores and the gradient of the weights become weights (after dropout) and the gradient of the scores.
template <bool kMasks, bool kDropout>
void grad_tile(float* scores, float* grads, int64_t keys, int64_t columns, const float* lse,
               const float* lse_rest, const float* delta, const float* masks, const float* factors) {
  for (int64_t j = 0; j < columns; j += kWidth) {
    Vec shift = load(lse + j), rest = load(lse_rest + j), d = load(delta + j);
    for (int64_t i = 0; i < keys; ++i) {
      int64_t at = i * columns + j;
      Vec weight = vexp2(load(scores + at) - shift - rest), grad = load(grads + at), kept = weight;
      if (kDropout) {
        Vec factor = load(factors + at);
        grad *= factor;
        kept *= factor;
      }
      grad = (grad - d) * weight;
      if (kMasks) grad += load(masks + at);
      store(scores + at, kept);
      store(grads + at, grad);
    }
  }
}

}  // namespace

void attention_bwd(const AttentionBwd& args, const AttentionBlock& block, float* grad_query, float* scratch) {
  const AttentionShape& shape = args.shape;
  int64_t dim = shape.dim, rows = padded_dim(dim), row = round_up_to(dim, 16);
  int64_t columns = padded_queries(shape.queries), heads = block.head_end - block.head;
  float* query_columns = scratch;
  float* grad_columns = query_columns + heads * columns * rows;
  float* query_rows = grad_columns + heads * columns * rows;
  float* grad_rows = query_rows + heads * columns * row;
  float* lse = grad_rows + heads * columns * row;
  float* lse_rest = lse + heads * columns;
  float* delta = lse_rest + heads * columns;
  float* masks = delta + heads * columns;
  float* key_tile = masks + kTileKeys * columns;
  float* value_tile = key_tile + kTileKeys * rows;
  float* grad_key = value_tile + kTileKeys * rows;
  float* grad_value = grad_key + kTileKeys * row;
  float* scores = grad_value + kTileKeys * row;
  float* grads = scores + kTileKeys * kTileQueries;
  float* factors = grads + kTileKeys * kTileQueries;
  bool dropout = shape.dropout.threshold > 0;
  bool with_masks = args.grad_masks.data, with_output = args.grad_output.data;

  __builtin_memset(grad_query, 0, heads * columns * rows * sizeof(float));
  for (int64_t batch = block.batch; batch < block.batch_end; ++batch) {
    for (int64_t h = 0; h < heads; ++h)
      for_panels(0, shape.queries, [&](int64_t q, int64_t n, int64_t width, int64_t) {
        int64_t head = block.head + h, panel = h * columns + q;
        const char* query = address(args.query, batch, q, head);
        copy_rows(args.query.type, query, args.query.token_stride, n, dim, query_rows + panel * row, row);
        if (!with_output) return;
        copy_transposed(args.query.type, query, args.query.token_stride, n, dim, shape.scale * kLog2e,
                        query_columns + panel * rows, width);
        const char* grad = address(args.grad_output, batch, q, head);
        copy_rows(args.grad_output.type, grad, args.grad_output.token_stride, n, dim, grad_rows + panel * row,
                  row);
        copy_transposed(args.grad_output.type, grad, args.grad_output.token_stride, n, dim, 1,
                        grad_columns + panel * rows, width);
        const float* saved = args.lse + (batch * shape.heads + head) * shape.queries + q;
        for (int64_t i = 0; i < width; ++i) {
          Vec total{};
          if (i < n) {
            float* output = scores;
            copy_rows(args.output.type, address(args.output, batch, q + i, head), 0, 1, dim, output, row);
            for (int64_t d = 0; d < row; d += kWidth)
              total += load(output + d) * load(grad_rows + (panel + i) * row + d);
          }
          delta[panel + i] = sum(total);
          double exact = i < n ? saved[i] * 1.4426950408889634 : 0;
          lse[panel + i] = static_cast<float>(exact);
          lse_rest[panel + i] = static_cast<float>(exact - lse[panel + i]);
        }
      });
    for (int64_t key = block.key; key < block.key_end; key += kTileKeys) {
      int64_t keys = min_of(kTileKeys, block.key_end - key);
      if (with_masks)
        for_panels(0, shape.queries, [&](int64_t q, int64_t n, int64_t width, int64_t) {
          copy_transposed(args.grad_masks.type, address(args.grad_masks, batch, q, key),
                          args.grad_masks.query_stride, n, keys, 1.0f / shape.heads, masks + q * kTileKeys,
                          width);
          fill_padding(shape, batch, key, keys, masks + q * kTileKeys, width, 0);
        });
      for (int64_t h = 0; h < heads; ++h) {
        int64_t head = block.head + h;
        copy_tile(shape, args.key, batch, key, keys, head, key_tile);
        copy_tile(shape, args.value, batch, key, keys, head, value_tile);
        for_panels(0, shape.queries, [&](int64_t q, int64_t n, int64_t width, int64_t) {
          int64_t panel = h * columns + q;
          auto* sum_of = q ? &product<false, Start::sum> : &product<false, Start::zero>;
          const float* grad_scores = masks + q * kTileKeys;
          int64_t begin = keys * q / shape.queries, end = keys * (q + n) / shape.queries;
          prefetch_rows(args.grad_key, batch, key + begin, key + end, head, dim);
          prefetch_rows(args.grad_value, batch, key + begin, key + end, head, dim);
          if (with_output) {
            product<false, Start::zero>(keys, n, key_tile, rows, query_columns + panel * rows, scores, width,
                                        dim);
            product<false, Start::zero>(keys, n, value_tile, rows, grad_columns + panel * rows, grads, width,
                                        dim);
            if (dropout) dropout_tile(shape, batch, head, key, keys, q, width, factors);
            auto* gradient = with_masks ? (dropout ? &grad_tile<true, true> : &grad_tile<true, false>)
                                        : (dropout ? &grad_tile<false, true> : &grad_tile<false, false>);
            gradient(scores, grads, keys, width, lse + panel, lse_rest + panel, delta + panel, grad_scores,
                     factors);
            fill_padding(shape, batch, key, keys, scores, width, 0);
            fill_padding(shape, batch, key, keys, grads, width, 0);
            grad_scores = grads;
            sum_of(keys, dim, scores, width, grad_rows + panel * row, grad_value, row, n, nullptr);
          }
          sum_of(keys, dim, grad_scores, width, query_rows + panel * row, grad_key, row, n, nullptr);
          product<true, Start::sum>(dim, n, key_tile, rows, grad_scores, grad_query + panel * rows, width,
                                    keys);
        });
        if (!with_output) __builtin_memset(grad_value, 0, keys * row * sizeof(float));
        write_rows(args.grad_key.type, address(args.grad_key, batch, key, head), args.grad_key.token_stride,
                   keys, dim, grad_key, row, shape.scale);
        write_rows(args.grad_value.type, address(args.grad_value, batch, key, head),
                   args.grad_value.token_stride, keys, dim, grad_value, row, 1);
      }
    }
  }
}

void attention_finish_bwd(const AttentionBwd& args, const AttentionBlock& block, float* grad_query,
                          int64_t splits, int64_t stride) {
  int64_t dim = args.shape.dim, rows = padded_dim(dim), columns = padded_queries(args.shape.queries);
  int64_t heads = block.head_end - block.head;
  for (int64_t s = 1; s < splits; ++s)
    for (int64_t i = 0; i < heads * columns * rows; i += kWidth)
      store(grad_query + i, load(grad_query + i) + load(grad_query + s * stride + i));
  for (int64_t h = 0; h < heads; ++h)
    for_panels(0, args.shape.queries, [&](int64_t q, int64_t n, int64_t width, int64_t) {
      with_type(args.grad_query.type, [&](auto element) {
        using T = decltype(element);
        for_columns(grad_query + (h * columns + q) * rows, width, dim, n,
                    [&](int64_t i, int64_t d, int64_t count, Vec v) {
                      T* to =
                          reinterpret_cast<T*>(address(args.grad_query, block.batch, q + i, block.head + h));
                      store_up_to(to + d, count, v * args.shape.scale);
                    });
      });
    });
}

}  // namespace segvit::SEGVIT_ISA
