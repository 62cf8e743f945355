#pragma once

#include "../isa.h"

namespace segvit {

// A tile of scores has a key a row and a query a column: up to kTileKeys rows of up to kTileQueries.
constexpr int64_t kTileKeys = 64, kTileQueries = 48;

// (batch, tokens, heads, head_dim) with unit last stride; strides in elements.
struct HeadsView {
  char* data;
  int64_t batch_stride, token_stride, head_stride;
  Type type;
};

// (batch, queries, keys) with unit last stride.
struct MasksView {
  char* data;  // null: there are none
  int64_t batch_stride, query_stride;
  Type type;
};

struct Dropout {
  uint32_t seed[2];
  uint32_t threshold;  // 0: no dropout
  float scale;
};

struct AttentionShape {
  int64_t queries, keys, heads, dim;
  float scale;
  Dropout dropout;
  const bool* padding;  // (batch, keys): tokens that no query sees; null: there are none
};

struct AttentionFwd {
  AttentionShape shape;
  HeadsView query, key, value, output;
  MasksView masks, previous;
  float* lse;  // (batch, heads, queries)
};

struct AttentionBwd {
  AttentionShape shape;
  HeadsView query, key, value, output, grad_output;  // grad_output without data: it is zero
  MasksView grad_masks;
  const float* lse;
  HeadsView grad_query, grad_key, grad_value;
};

// What one task computes.
struct AttentionBlock {
  int64_t batch, batch_end, head, head_end, query, query_end, key, key_end;
};

constexpr int64_t round_up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Queries lie side by side in panels of kTileQueries columns; the last is narrower, a multiple of 16.
constexpr int64_t padded_queries(int64_t queries) { return round_up_to(queries, 16); }

// Rows of a panel with a head's channels: what is computed eight rows at a time.
constexpr int64_t padded_dim(int64_t dim) { return round_up_to(dim, 8); }

// Floats of the state of `heads` heads: the output so far, and the sum and the largest score of each query.
constexpr int64_t state_size(int64_t heads, int64_t queries, int64_t dim) {
  return heads * (padded_dim(dim) + 2) * padded_queries(queries);
}
constexpr int64_t fwd_scratch_size(int64_t heads, int64_t queries, int64_t dim) {
  int64_t columns = padded_queries(queries);
  return heads * padded_dim(dim) * columns + kTileKeys * (2 * padded_dim(dim) + 2 * kTileQueries + columns);
}

// Floats of the gradient of the queries of `heads` heads, and of the backward's scratch.
constexpr int64_t grad_query_size(int64_t heads, int64_t queries, int64_t dim) {
  return heads * padded_dim(dim) * padded_queries(queries);
}
constexpr int64_t bwd_scratch_size(int64_t heads, int64_t queries, int64_t dim) {
  int64_t row = round_up_to(dim, 16), columns = padded_queries(queries);
  return heads * columns * (2 * padded_dim(dim) + 2 * row + 3) +
         kTileKeys * (columns + 2 * padded_dim(dim) + 2 * row + 3 * kTileQueries);
}

// Of attention_bf16.h: queries that go together, keys of a tile of scores, and the bytes of a task's scratch.
constexpr int64_t kBf16Queries = 32, kBf16Keys = 256;
constexpr int64_t bf16_scratch_bytes(int64_t keys, int64_t dim) {
  int64_t row = round_up_to(dim, 32);
  return (2 * round_up_to(keys, 32) + kBf16Queries) * row * 2 + (kBf16Keys + row + 3) * kBf16Queries * 4;
}

// The same with AVX512-FP16, for heads of up to so many channels.
constexpr int64_t kFp16MostDim = 128;
constexpr int64_t fp16_scratch_bytes(int64_t keys, int64_t dim) {
  int64_t row = round_up_to(dim, 32), padded = round_up_to(keys, kTileKeys);
  return 2 * padded * row * 2 + padded * 4 +
         kTileQueries * 4 * (row / 2 + kTileKeys / 2 + 2 * padded_dim(dim) + 3 * 2);
}

}  // namespace segvit

#if defined(SEGVIT_AVX512_BF16)
namespace segvit::avx512_bf16 {
// Attention of some queries of one head over all keys, in bfloat16, without masks and dropout.
void attention(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t query_end, char* scratch);
}  // namespace segvit::avx512_bf16
#endif
#if defined(SEGVIT_AVX512_FP16)
namespace segvit::avx512_fp16 {
// The same, of up to kFp16MostDim channels.
void attention(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t query_end, char* scratch);
}  // namespace segvit::avx512_fp16
#endif
#if defined(SEGVIT_AMX)
namespace segvit::amx {
void attention(const AttentionFwd& args, int64_t batch, int64_t head, int64_t query, int64_t query_end, char* scratch);
}  // namespace segvit::amx
#endif

// Attention of some queries over some keys, of one batch item and some heads: all heads where there are
// masks. `state` is made from nothing.
SEGVIT_KERNEL(attention_fwd, const AttentionFwd& args, const AttentionBlock& block, float* state,
              float* scratch)
// Adds the states of a block's key splits, `stride` floats apart, and writes output and log-sum-exp.
SEGVIT_KERNEL(attention_finish, const AttentionFwd& args, const AttentionBlock& block, float* state,
              int64_t splits, int64_t stride)
// Gradients of some keys and values and their share of `grad_query`, of some heads. All queries; over several
// batch items that share them, `grad_query` is the sum.
SEGVIT_KERNEL(attention_bwd, const AttentionBwd& args, const AttentionBlock& block, float* grad_query,
              float* scratch)
// Adds the shares of `splits`, `stride` floats apart, and writes the gradient of a block's queries.
SEGVIT_KERNEL(attention_finish_bwd, const AttentionBwd& args, const AttentionBlock& block, float* grad_query,
              int64_t splits, int64_t stride)
