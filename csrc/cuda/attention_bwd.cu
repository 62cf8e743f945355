// Backward of the attention, with the log-sum-exp of the forward: S and P are computed again, never stored.
//
// Two kernels, without atomics. One owns 64 keys of a head and loops over the queries (Sᵀ, dPᵀ, then dV and
// dK); the other owns 64 queries and loops over the keys (S, dP, then dQ). Seven products instead of five, in
// exchange dQ is neither summed over blocks nor kept in float32. Queries that the batch shares are the
// exception: their gradients are kept per image in float32 and summed in order. Bytes: what a kernel owns
// once, what it loops over once a block, mostly from the L2 cache; the gradient of the masks once a head in
// each kernel.
//
// Registers and KiB of shared memory of a block, head dim 32 / 64 / 128, half precisions, sm_80:
//   attention_bwd_key_value_kernel  167 / 240 / 249    50 / 74 / 79
//   attention_bwd_query_kernel      152 / 164 / 164    50 / 74 / 79
#include "attention.cuh"

namespace segvit::cuda {

namespace {

template <class T, int D>
struct BackwardTiles {
  using E = Engine<T, D>;
  static constexpr int kTile = E::kTileBackward;
  struct Stage {
    alignas(16) typename E::Element first[kTile * E::kStride], second[kTile * E::kStride];
    alignas(16)
        typename E::Element masks[E::kRows * kTile + E::kPadding * (E::kRows > kTile ? E::kRows : kTile)];
    alignas(16) float lse[kTile], delta[kTile];
    alignas(16) unsigned char keep[E::kRows * kTile / 8];
  };
  alignas(16) typename E::Element first[E::kRows * E::kStride], second[E::kRows * E::kStride];
  Stage stages[E::kStages];
};

// Calls body(stage, tile) for every tile when load(stage, tile) has arrived.
template <class E, class Stage, class Load, class Body>
SEGVIT_DEVICE void pipeline(Stage (&stages)[E::kStages], int tiles, const Load& load, const Body& body) {
  auto start = [&](int tile) {
    load(stages[tile % E::kStages], tile);
    copy_commit();
  };
  if (E::kStages > 1) start(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (E::kStages == 1) {
      __syncthreads();  // the tile before this one has been used
      start(tile);
    }
    copy_wait();
    __syncthreads();
    if (E::kStages > 1 && tile + 1 < tiles) start(tile + 1);
    body(stages[tile % E::kStages], tile);
  }
}

// Gradients of E::kRows keys and values. Tiles hold dO and Q; fragments are (keys, queries).
template <class T, int D, bool kPadded>
SEGVIT_DEVICE void key_value(const Attention& a, const AttentionGradients& g) {
  using E = Engine<T, D>;
  constexpr int kTile = E::kTileBackward;
  static_assert(sizeof(BackwardTiles<T, D>) <= kMaxSharedBytes<E>);
  auto& shared = *reinterpret_cast<BackwardTiles<T, D>*>(shared_memory());
  int blocks = (a.keys + E::kRows - 1) / E::kRows, tiles = (a.queries + kTile - 1) / kTile;
  int image_head = blockIdx.x / blocks, image = image_head / a.heads, head = image_head % a.heads;
  int n_start = blockIdx.x % blocks * E::kRows;
  int64_t query_offset = image * a.query.batch + head * a.query.head;
  int64_t grad_offset = image * g.output.batch + head * g.output.head;
  int64_t mask_offset = image * g.masks.batch + n_start;
  const float* lse = g.lse + static_cast<int64_t>(image_head) * a.queries;
  const float* delta = g.delta + static_cast<int64_t>(image_head) * a.queries;
  const bool has_output = g.output.data != nullptr;

  const bool* padding = padding_of<kPadded>(a, image);
  load_tile<E, D, E::kRows>(shared.first, a.key, image * a.key.batch + head * a.key.head, n_start, a.keys,
                            a.dim, a.type, padding);
  if (has_output)
    load_tile<E, D, E::kRows>(shared.second, a.value, image * a.value.batch + head * a.value.head, n_start,
                              a.keys, a.dim, a.type, padding);
  const auto* keys = shared.first + warp_index() * 16 * E::kStride;
  const auto* values = shared.second + warp_index() * 16 * E::kStride;
  const float mask_factor = 1.0f / a.heads;
  bool hidden[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int key = n_start + warp_index() * 16 + fragment_row(2 * r);
    hidden[r] = padding && key < a.keys && padding[key];
  }

  auto load = [&](auto& stage, int tile) {
    int m_start = tile * kTile;
    load_tile<E, D, kTile>(stage.first, a.query, query_offset, m_start, a.queries, a.dim, a.type);
    if (g.masks.data)
      load_tile<E, E::kRows, kTile>(stage.masks, g.masks, mask_offset, m_start, a.queries, a.keys - n_start,
                                    a.type);
    if (!has_output) return;
    load_tile<E, D, kTile>(stage.second, g.output, grad_offset, m_start, a.queries, a.dim, a.type);
    for (int i = threadIdx.x; i < kTile; i += E::kThreads) {
      bool valid = m_start + i < a.queries;
      stage.lse[i] = valid ? lse[m_start + i] : INFINITY;  // weight 0 where there is no query
      stage.delta[i] = valid ? delta[m_start + i] : 0;
    }
    if (a.seed) load_keep<E, kTile, E::kRows>(stage.keep, a, image_head, m_start, n_start);
  };

  Fragment<D> grad_key, grad_value;
  grad_key.fill(0);
  grad_value.fill(0);
  pipeline<E>(shared.stages, tiles, load, [&](const auto& stage, int tile) {
    Fragment<kTile> grad_scores;
    grad_scores.fill(0);
    if (has_output) {
      Fragment<kTile> weights;
      weights.fill(0);
      E::product_nt(weights, keys, stage.first);
      E::product_nt(grad_scores, values, stage.second);
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int query = fragment_column(j, i);
          float weight = fast_exp(fmaf(weights.at[j][i], a.scale, -stage.lse[query]));
          if (hidden[i / 2]) weight = 0;
          float grad = grad_scores.at[j][i], kept = weight;
          if (a.seed) {
            int key = warp_index() * 16 + fragment_row(i);
            bool keep = stage.keep[query * (E::kRows / 8) + key / 8] >> (key % 8) & 1;
            kept = keep ? weight : 0;
            grad = keep ? grad * a.keep_scale : 0;
          }
          weights.at[j][i] = kept;
          grad_scores.at[j][i] = weight * (grad - stage.delta[query]);
        }
      }
      E::product_nn(grad_value, weights, stage.second);
    }
    if (g.masks.data) E::add_transposed(grad_scores, stage.masks + warp_index() * 16, mask_factor);
    if (padding) {
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (hidden[i / 2]) grad_scores.at[j][i] = 0;
      }
    }
    E::product_nn(grad_key, grad_scores, stage.first);
  });

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int key = n_start + warp_index() * 16 + fragment_row(2 * r);
    if (key >= a.keys) continue;
    int64_t offset = ((static_cast<int64_t>(image) * a.keys + key) * a.heads + head) * a.dim;
    store_row<E>(g.key, offset, a.dim, a.type, grad_key, r, a.scale);
    store_row<E>(g.value, offset, a.dim, a.type, grad_value, r, a.keep_scale);
  }
}

// Gradients of E::kRows queries. Tiles hold K and V; fragments are (queries, keys).
template <class T, int D, bool kPadded>
SEGVIT_DEVICE void query(const Attention& a, const AttentionGradients& g) {
  using E = Engine<T, D>;
  constexpr int kTile = E::kTileBackward;
  auto& shared = *reinterpret_cast<BackwardTiles<T, D>*>(shared_memory());
  int blocks = (a.queries + E::kRows - 1) / E::kRows, tiles = (a.keys + kTile - 1) / kTile;
  int image_head = blockIdx.x / blocks, image = image_head / a.heads, head = image_head % a.heads;
  int m_start = blockIdx.x % blocks * E::kRows, row = m_start + warp_index() * 16;
  int64_t key_offset = image * a.key.batch + head * a.key.head;
  int64_t value_offset = image * a.value.batch + head * a.value.head;
  const bool has_output = g.output.data != nullptr;
  const bool* padding = padding_of<kPadded>(a, image);

  if (has_output) {
    load_tile<E, D, E::kRows>(shared.first, a.query, image * a.query.batch + head * a.query.head, m_start,
                              a.queries, a.dim, a.type);
    load_tile<E, D, E::kRows>(shared.second, g.output, image * g.output.batch + head * g.output.head, m_start,
                              a.queries, a.dim, a.type);
  }
  const auto* queries = shared.first + warp_index() * 16 * E::kStride;
  const auto* grads = shared.second + warp_index() * 16 * E::kStride;
  const float mask_factor = 1.0f / a.heads;
  float lse[2] = {INFINITY, INFINITY}, delta[2] = {0, 0};
  if (has_output) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int query = row + fragment_row(2 * r);
      if (query >= a.queries) continue;
      lse[r] = g.lse[static_cast<int64_t>(image_head) * a.queries + query];
      delta[r] = g.delta[static_cast<int64_t>(image_head) * a.queries + query];
    }
  }

  auto load = [&](auto& stage, int tile) {
    load_tile<E, D, kTile>(stage.first, a.key, key_offset, tile * kTile, a.keys, a.dim, a.type, padding);
    if (g.masks.data) {
      int64_t offset = image * g.masks.batch + tile * kTile;
      load_tile<E, kTile, E::kRows>(stage.masks, g.masks, offset, m_start, a.queries, a.keys - tile * kTile,
                                    a.type);
    }
    if (!has_output) return;
    load_tile<E, D, kTile>(stage.second, a.value, value_offset, tile * kTile, a.keys, a.dim, a.type, padding);
    if (a.seed) load_keep<E, E::kRows, kTile>(stage.keep, a, image_head, m_start, tile * kTile);
  };

  Fragment<D> grad_query;
  grad_query.fill(0);
  pipeline<E>(shared.stages, tiles, load, [&](const auto& stage, int tile) {
    Fragment<kTile> grad_scores;
    grad_scores.fill(0);
    int left = a.keys - tile * kTile;
    if (has_output) {
      Fragment<kTile> weights;
      weights.fill(0);
      E::product_nt(weights, queries, stage.first);
      E::product_nt(grad_scores, grads, stage.second);
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float weight = fast_exp(fmaf(weights.at[j][i], a.scale, -lse[i / 2])), grad = grad_scores.at[j][i];
          if (a.seed) {
            uint32_t bits = stage.keep[(warp_index() * 16 + fragment_row(i)) * (kTile / 8) + j];
            grad = bits >> fragment_column(0, i) & 1 ? grad * a.keep_scale : 0;
          }
          grad_scores.at[j][i] = weight * (grad - delta[i / 2]);
        }
      }
      if (left < kTile) {  // there the weight may be infinite
#pragma unroll
        for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (fragment_column(j, i) >= left) grad_scores.at[j][i] = 0;
        }
      }
    }
    if (g.masks.data)
      E::add(grad_scores, stage.masks + warp_index() * 16 * (kTile + E::kPadding), mask_factor);
    if (padding) {
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int key = fragment_column(j, i);
          if (key < left && padding[tile * kTile + key]) grad_scores.at[j][i] = 0;
        }
      }
    }
    E::product_nn(grad_query, grad_scores, stage.first);
  });

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int query = row + fragment_row(2 * r);
    if (query >= a.queries) continue;
    int64_t offset = ((static_cast<int64_t>(image) * a.queries + query) * a.heads + head) * a.dim;
    if (g.query_parts)
      store_row<Engine<float, D>>(reinterpret_cast<char*>(g.query_parts), offset, a.dim, Type::f32,
                                  grad_query, r, a.scale);
    else
      store_row<E>(g.query, offset, a.dim, a.type, grad_query, r, a.scale);
  }
}

template <class T, int D, bool kPadded>
__global__ void __launch_bounds__(Engine<T, D>::kThreads, D == 32 && !kPadded ? 3 : kPadded ? 1 : 2)
    attention_bwd_key_value_kernel(Attention a, AttentionGradients g) {
  if constexpr (SEGVIT_HAS_MMA || !Engine<T, D>::kTensorCores) key_value<T, D, kPadded>(a, g);
}

template <class T, int D, bool kPadded>
__global__ void __launch_bounds__(Engine<T, D>::kThreads, kPadded ? 1 : 0)
    attention_bwd_query_kernel(Attention a, AttentionGradients g) {
  if constexpr (SEGVIT_HAS_MMA || !Engine<T, D>::kTensorCores) query<T, D, kPadded>(a, g);
}

constexpr int kThreads = 256;

// delta (batch, heads, queries): a warp a row.
__global__ void __launch_bounds__(kThreads)
    attention_bwd_delta_kernel(Attention a, Rows output, Rows grad_output, float* delta) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_index();
  if (index >= static_cast<int64_t>(a.batch) * a.queries * a.heads) return;
  int64_t head = index % a.heads, query = index / a.heads % a.queries, image = index / a.heads / a.queries;
  int64_t first = image * output.batch + query * output.row + head * output.head;
  int64_t grad = image * grad_output.batch + query * grad_output.row + head * grad_output.head;
  float sum = 0;
  for (int i = lane_index(); i < a.dim; i += 32)
    sum += read(output.data, first + i, a.type) * read(grad_output.data, grad + i, a.type);
  sum = warp_sum(sum);
  if (lane_index() == 0) delta[(image * a.heads + head) * a.queries + query] = sum;
}

// The gradients of a shared query, summed over the images in order.
__global__ void __launch_bounds__(kThreads)
    attention_bwd_sum_kernel(const float* parts, char* result, int batch, int64_t size, Type type) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= size) return;
  float sum = 0;
  for (int image = 0; image < batch; ++image) sum += parts[image * size + index];
  write(result, index, type, sum);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Optional grad_output, Optional grad_masks, Tensor query,
                                                 Tensor key, Tensor value, Tensor output, Tensor lse,
                                                 Optional seed, double scale, double dropout_p,
                                                 Optional padding) {
  Device device(query);
  query = unit_stride(query), key = unit_stride(key), value = unit_stride(value),
  output = unit_stride(output);
  grad_output = unit_stride(grad_output), grad_masks = unit_stride(grad_masks);
  padding = in_one_piece(padding);
  lse = torch::stable::contiguous(lse);
  Attention a = attention(query, key, value, seed, scale, dropout_p, padding);
  bool shared = query.size(0) != a.batch;
  Tensor grad_query = empty(query, {query.size(0), a.queries, a.heads, a.dim});
  Tensor grad_key = empty(key, {a.batch, a.keys, a.heads, a.dim});
  Tensor grad_value = empty(key, {a.batch, a.keys, a.heads, a.dim});
  int64_t size = static_cast<int64_t>(a.queries) * a.heads * a.dim;
  Tensor parts = empty(lse, {shared ? a.batch * size : 0}), delta = empty(lse, {a.batch, a.heads, a.queries});
  AttentionGradients g{rows_of(grad_output),   rows_of(grad_masks),
                       data<float>(lse),       data<float>(delta),
                       data<char>(grad_query), data<char>(grad_key),
                       data<char>(grad_value), shared ? data<float>(parts) : nullptr};
  if (grad_output)
    launch(&attention_bwd_delta_kernel,
           ceil_div(static_cast<int64_t>(a.batch) * a.queries * a.heads, kThreads / 32), kThreads, 0,
           device.stream, a, rows_of(output), g.output, data<float>(delta));
  with_engine(device, a, [&]<class T, int D>(Engine<T, D>) {
    using E = Engine<T, D>;
    unsigned heads = a.batch * a.heads;
    with_padding(a, [&]<bool kPadded>(std::bool_constant<kPadded>) {
      launch(&attention_bwd_key_value_kernel<T, D, kPadded>, ceil_div(a.keys, E::kRows) * heads, E::kThreads,
             sizeof(BackwardTiles<T, D>), device.stream, a, g);
      launch(&attention_bwd_query_kernel<T, D, kPadded>, ceil_div(a.queries, E::kRows) * heads, E::kThreads,
             sizeof(BackwardTiles<T, D>), device.stream, a, g);
    });
  });
  if (shared)
    launch(&attention_bwd_sum_kernel, ceil_div(size, kThreads), kThreads, 0, device.stream, g.query_parts,
           g.query, a.batch, size, a.type);
  return {grad_query, grad_key, grad_value};
}

}  // namespace segvit::cuda
