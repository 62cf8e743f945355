// Forward of the attention: online softmax over tiles of keys, and the masks of ATM.
//
// Output and log-sum-exp: a block per (image, head, 64 queries); K and V pass through shared memory in tiles
// of 64 keys, S stays in registers. Masks: a block per (image, 64 queries, 64 keys) that sums the products of
// all heads, one product of inner length heads · D. Bytes: Q, O and the masks once, K and V once for 64
// queries; the masks read Q again for 64 keys and K for 64 queries, mostly from the L2 cache.
//
// Registers and KiB of shared memory of a block, head dim 32 / 64 / 128, half precisions, sm_80:
//   attention_fwd_kernel    121 / 128 / 192    26 / 46 / 86
//   attention_masks_kernel  110 / 110 / 108    20 / 36 / 68
#include "attention.cuh"

namespace segvit::cuda {

namespace {

template <class T, int D>
struct ForwardTiles {
  using E = Engine<T, D>;
  struct Stage {
    alignas(16) typename E::Element key[E::kTile * E::kStride], value[E::kTile * E::kStride];
    alignas(16) unsigned char keep[E::kRows * (E::kTile / 8)];
  };
  alignas(16) typename E::Element query[E::kRows * E::kStride];
  Stage stages[E::kStages];
};

template <class T, int D>
struct MaskTiles {
  using E = Engine<T, D>;
  struct Stage {
    alignas(16) typename E::Element query[E::kRows * E::kStride], key[E::kTile * E::kStride];
  };
  Stage stages[E::kStages];
};

template <class T, int D, bool kPadded>
SEGVIT_DEVICE void forward(const Attention& a, char* output, float* lse) {
  using E = Engine<T, D>;
  constexpr int kTile = E::kTile;
  static_assert(sizeof(ForwardTiles<T, D>) <= kMaxSharedBytes<E>);
  auto& shared = *reinterpret_cast<ForwardTiles<T, D>*>(shared_memory());
  int blocks = (a.queries + E::kRows - 1) / E::kRows, tiles = (a.keys + kTile - 1) / kTile;
  int image_head = blockIdx.x / blocks, image = image_head / a.heads, head = image_head % a.heads;
  int m_start = blockIdx.x % blocks * E::kRows, row = m_start + warp_index() * 16;
  int64_t key_offset = image * a.key.batch + head * a.key.head;
  int64_t value_offset = image * a.value.batch + head * a.value.head;
  const bool* padding = padding_of<kPadded>(a, image);

  auto load = [&](int tile) {
    auto& stage = shared.stages[tile % E::kStages];
    load_tile<E, D, kTile>(stage.key, a.key, key_offset, tile * kTile, a.keys, a.dim, a.type, padding);
    load_tile<E, D, kTile>(stage.value, a.value, value_offset, tile * kTile, a.keys, a.dim, a.type, padding);
    if (a.seed) load_keep<E, E::kRows, kTile>(stage.keep, a, image_head, m_start, tile * kTile);
    copy_commit();
  };

  int64_t query_offset = image * a.query.batch + head * a.query.head;
  load_tile<E, D, E::kRows>(shared.query, a.query, query_offset, m_start, a.queries, a.dim, a.type);
  if (E::kStages > 1) load(0);

  // Logits in units of log 2 save an instruction and cost float32 a rounding.
  constexpr float kUnit = E::kTensorCores ? kLn2 : 1, kToLog2 = E::kTensorCores ? 1 : kLog2e;
  const float scale = E::kTensorCores ? a.scale * kLog2e : a.scale;
  Fragment<D> o;
  o.fill(0);
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  for (int tile = 0; tile < tiles; ++tile) {
    if (E::kStages == 1) {
      __syncthreads();  // the tile before this one has been used
      load(tile);
    }
    copy_wait();
    __syncthreads();
    if (E::kStages > 1 && tile + 1 < tiles) load(tile + 1);
    const auto& stage = shared.stages[tile % E::kStages];

    Fragment<kTile> s;
    s.fill(0);
    E::product_nt(s, shared.query + warp_index() * 16 * E::kStride, stage.key);
    // Rounded before the largest is taken away: with a fused multiply-add, the largest of huge ones would not give 0.
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s.at[j][i] = __fmul_rn(s.at[j][i], scale);
    }
    if (int left = a.keys - tile * kTile; left < kTile || padding) {
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int key = fragment_column(j, i);
          if (key >= left || (padding && padding[tile * kTile + key])) s.at[j][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = -INFINITY;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) now = fmaxf(now, fmaxf(s.at[j][2 * r], s.at[j][2 * r + 1]));
      now = fmaxf(largest[r], warp_max<4>(now));
      if (padding) now = fmaxf(now, -1e38f);  // minus infinity less itself is NaN
      float shrink = fast_exp2((largest[r] - now) * kToLog2);
      largest[r] = now;
      total[r] *= shrink;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        o.at[j][2 * r] *= shrink;
        o.at[j][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float weight = fast_exp2((s.at[j][i] - largest[i / 2]) * kToLog2);
        total[i / 2] += weight;
        s.at[j][i] = weight;
      }
    }
    if (a.seed) {
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t bits = stage.keep[(warp_index() * 16 + fragment_row(i)) * (kTile / 8) + j];
          if (!(bits >> (fragment_column(0, i)) & 1)) s.at[j][i] = 0;
        }
      }
    }
    E::product_nn(o, s, stage.value);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int query = row + fragment_row(2 * r);
    total[r] = warp_sum<4>(total[r]);
    if (query >= a.queries) continue;
    if (lane_index() % 4 == 0)
      lse[static_cast<int64_t>(image_head) * a.queries + query] = fmaf(largest[r], kUnit, fast_log(total[r]));
    int64_t offset = ((static_cast<int64_t>(image) * a.queries + query) * a.heads + head) * a.dim;
    float factor = padding && total[r] == 0 ? 0 : a.keep_scale * fast_rcp(total[r]);
    store_row<E>(output, offset, a.dim, a.type, o, r, factor);
  }
}

// The sum over the heads stays in registers.
template <class T, int D, bool kPadded>
SEGVIT_DEVICE void head_mean(const Attention& a, const Rows& previous, char* masks) {
  using E = Engine<T, D>;
  constexpr int kTile = E::kTile;
  static_assert(sizeof(MaskTiles<T, D>) <= kMaxSharedBytes<E>);
  auto& shared = *reinterpret_cast<MaskTiles<T, D>*>(shared_memory());
  int blocks = (a.queries + E::kRows - 1) / E::kRows, tiles = (a.keys + kTile - 1) / kTile;
  int index = blockIdx.x / blocks, image = index / tiles, n_start = index % tiles * kTile;
  int m_start = blockIdx.x % blocks * E::kRows;

  auto load = [&](int head) {
    auto& stage = shared.stages[head % E::kStages];
    int64_t query = image * a.query.batch + head * a.query.head,
            key = image * a.key.batch + head * a.key.head;
    load_tile<E, D, E::kRows>(stage.query, a.query, query, m_start, a.queries, a.dim, a.type);
    load_tile<E, D, kTile>(stage.key, a.key, key, n_start, a.keys, a.dim, a.type, padding_of<kPadded>(a, image));
    copy_commit();
  };

  Fragment<kTile> s;
  s.fill(0);
  if (E::kStages > 1) load(0);
  for (int head = 0; head < a.heads; ++head) {
    if (E::kStages == 1) {
      __syncthreads();
      load(head);
    }
    copy_wait();
    __syncthreads();
    if (E::kStages > 1 && head + 1 < a.heads) load(head + 1);
    const auto& stage = shared.stages[head % E::kStages];
    E::product_nt(s, stage.query + warp_index() * 16 * E::kStride, stage.key);
  }

  const float factor = a.scale / a.heads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int query = m_start + warp_index() * 16 + fragment_row(2 * r);
    if (query >= a.queries) continue;
    if (previous.data) {
      int64_t offset = image * previous.batch + query * previous.row + n_start;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          int key = fragment_column(j, i);
          float x = n_start + key < a.keys ? E::read_global(previous.data, offset + key, a.type) : 0;
          s.at[j][i] = s.at[j][i] * factor + x;
        }
      }
    }
    int64_t offset = (static_cast<int64_t>(image) * a.queries + query) * a.keys + n_start;
    store_row<E>(masks, offset, a.keys - n_start, a.type, s, r, previous.data ? 1 : factor);
  }
}

template <class T, int D, bool kPadded>
__global__ void __launch_bounds__(Engine<T, D>::kThreads, D == 128 || kPadded ? 2 : 4)
    attention_fwd_kernel(Attention a, char* output, float* lse) {
  if constexpr (SEGVIT_HAS_MMA || !Engine<T, D>::kTensorCores) forward<T, D, kPadded>(a, output, lse);
}

template <class T, int D, bool kPadded>
__global__ void __launch_bounds__(Engine<T, D>::kThreads, kPadded ? 3 : 4)
    attention_masks_kernel(Attention a, Rows previous, char* masks) {
  if constexpr (SEGVIT_HAS_MMA || !Engine<T, D>::kTensorCores) head_mean<T, D, kPadded>(a, previous, masks);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_fwd(Tensor query, Tensor key, Tensor value,
                                                 Optional previous_masks, Optional seed, double scale,
                                                 double dropout_p, bool need_masks, Optional padding) {
  Device device(query);
  query = unit_stride(query), key = unit_stride(key), value = unit_stride(value);
  previous_masks = unit_stride(previous_masks), padding = in_one_piece(padding);
  Attention a = attention(query, key, value, seed, scale, dropout_p, padding);
  Tensor output = empty(query, {a.batch, a.queries, a.heads, a.dim});
  Tensor lse = empty(query, {a.batch, a.heads, a.queries}, ScalarType::Float);
  Tensor masks = need_masks ? empty(query, {a.batch, a.queries, a.keys}) : empty(query, {0});
  with_engine(device, a, [&]<class T, int D>(Engine<T, D>) {
    using E = Engine<T, D>;
    unsigned blocks = ceil_div(a.queries, E::kRows) * a.batch, tiles = ceil_div(a.keys, E::kTile);
    with_padding(a, [&]<bool kPadded>(std::bool_constant<kPadded>) {
      launch(&attention_fwd_kernel<T, D, kPadded>, blocks * a.heads, E::kThreads, sizeof(ForwardTiles<T, D>),
             device.stream, a, data<char>(output), data<float>(lse));
      if (need_masks)
        launch(&attention_masks_kernel<T, D, kPadded>, blocks * tiles, E::kThreads, sizeof(MaskTiles<T, D>),
               device.stream, a, rows_of(previous_masks), data<char>(masks));
    });
  });
  return {output, masks, lse};
}

}  // namespace segvit::cuda
