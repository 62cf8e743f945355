// What the attention kernels share: their arguments, tiles in shared memory and the products of tiles.
//
// A block owns 16 rows a warp (queries, or keys in one half of the backward) and loops over tiles of the
// other side. A warp's product of its 16 rows with a tile lies over the lanes like the accumulators of
// mma.m16n8k16, whoever computes it, so that softmax and gradients are written once:
//   Engine<half or bf16, D>  tensor cores, sm_80 and up; the next tile is copied while this one is computed
//   Engine<float, D>         float32 multiply-adds; every element type, converted when a tile is loaded
// D is the head dim of the tile, 32, 64 or 128, zeros from the tensor's own on.
#pragma once

#include "attention.h"
#include "philox.cuh"

namespace segvit::cuda {

// (batch, tokens, heads, head dim), or masks (batch, queries, keys); unit last stride, the others in
// elements.
struct Rows {
  const char* data;  // null: there is none
  int64_t batch, row, head;
  bool aligned;  // every row starts and ends at a multiple of 16 bytes
};

struct Attention {
  Rows query, key, value;
  Type type;
  int batch, queries, keys, heads, dim;
  float scale;
  const uint64_t* seed;  // null: no dropout
  uint32_t threshold;
  float keep_scale;
  const bool* padding;  // (batch, keys): tokens that no query sees; null: there are none
};

struct AttentionGradients {
  Rows output, masks;         // of these
  const float *lse, *delta;   // (batch, heads, queries); delta: rowsum(dO ∘ O)
  char *query, *key, *value;  // results, contiguous
  float* query_parts;         // (batch, queries, heads, dim) where the batch shares its queries, else null
};

inline Rows rows_of(const Optional& tensor) {
  if (!tensor) return {nullptr, 0, 0, 0, false};
  Rows rows{data<char>(tensor), tensor->size(0) == 1 ? 0 : tensor->stride(0), tensor->stride(1),
            tensor->dim() == 4 ? tensor->stride(2) : 0};
  int64_t step = type_of(*tensor) == Type::f32 ? 4 : 8;
  rows.aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                 tensor->size(tensor->dim() - 1) % step == 0 && rows.batch % step == 0 &&
                 rows.row % step == 0 && rows.head % step == 0;
  return rows;
}

// The tensors have unit last stride and outlive the launches.
inline Attention attention(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& seed,
                           double scale, double dropout_p, const Optional& padding) {
  Attention a{rows_of(query), rows_of(key), rows_of(value), type_of(query)};
  STD_TORCH_CHECK(query.size(3) <= 128, "segvit: head dims up to 128");
  a.batch = static_cast<int>(key.size(0));
  a.queries = static_cast<int>(query.size(1));
  a.keys = static_cast<int>(key.size(1));
  a.heads = static_cast<int>(query.size(2));
  a.dim = static_cast<int>(query.size(3));
  a.scale = static_cast<float>(scale);
  a.seed = data<const uint64_t>(seed);
  a.threshold = seed ? std::min(static_cast<uint32_t>(std::nearbyint(dropout_p * 65536)), 65535u) : 0u;
  a.keep_scale = 65536.0f / static_cast<float>(65536 - a.threshold);
  a.padding = data<const bool>(padding);
  return a;
}

// -----------------------------------------------------------------------------------------------------------
// Engines

template <int columns>
struct Fragment {  // 16 rows of a warp by `columns`
  float at[columns / 8][4];

  SEGVIT_DEVICE void fill(float value) {
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) at[j][i] = value;
    }
  }
};

// Row (0 to 15) and column of element i of group j in this lane.
SEGVIT_DEVICE int fragment_row(int i) { return lane_index() / 4 + i / 2 * 8; }
SEGVIT_DEVICE int fragment_column(int j, int i) { return 8 * j + lane_index() % 4 * 2 + i % 2; }

template <class T, int D>
struct Engine {
  static constexpr bool kTensorCores = true;
  using Element = T;
  static constexpr int kWarps = 4, kRows = 16 * kWarps, kThreads = 32 * kWarps, kStages = 2;
  static constexpr int kTile = 64, kTileBackward = D == 128 ? 32 : 64;
  static constexpr int kPadding = 8, kStride = D + kPadding;  // of a row: ldmatrix meets every bank once

  static SEGVIT_DEVICE float read_global(const char* data, int64_t index, Type) {
    return to_float(reinterpret_cast<const T*>(data)[index]);
  }
  static SEGVIT_DEVICE void write_global(char* data, int64_t index, Type, float value) {
    reinterpret_cast<T*>(data)[index] = from_float<T>(value);
  }

  // s (16, columns) += rows (16, D) · tile (columns, D)ᵀ
  template <int columns>
  static SEGVIT_DEVICE void product_nt(Fragment<columns>& s, const T* rows, const T* tile) {
    int lane = lane_index();
    rows += lane % 16 * kStride + lane / 16 * 8;
    tile += (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, rows + k);
#pragma unroll
      for (int j = 0; j < columns / 8; j += 2) {
        ldmatrix_x4(b, tile + j * 8 * kStride + k);
        mma_m16n8k16(s.at[j], a, {b[0], b[1]}, s.at[j], T{});
        mma_m16n8k16(s.at[j + 1], a, {b[2], b[3]}, s.at[j + 1], T{});
      }
    }
  }

  // s (16, columns) += factor · tile (16, columns)
  template <int columns>
  static SEGVIT_DEVICE void add(Fragment<columns>& s, const T* tile, float factor) {
    int lane = lane_index();
    tile += lane % 16 * (columns + kPadding) + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < columns / 8; j += 2) {
      uint32_t x[4];
      ldmatrix_x4(x, tile + j * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) add_pair(s.at[j + i / 2], i % 2, x[i], factor);
    }
  }
  // s (16, columns) += factor · tile (columns, 16)ᵀ, whose rows are those of a tile of kRows columns
  template <int columns>
  static SEGVIT_DEVICE void add_transposed(Fragment<columns>& s, const T* tile, float factor) {
    int lane = lane_index();
    tile += (lane / 16 * 8 + lane % 8) * (kRows + kPadding) + lane / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < columns / 8; j += 2) {
      uint32_t x[4];
      ldmatrix_x4_trans(x, tile + j * 8 * (kRows + kPadding));
#pragma unroll
      for (int i = 0; i < 4; ++i) add_pair(s.at[j + i / 2], i % 2, x[i], factor);
    }
  }
  static SEGVIT_DEVICE void add_pair(float (&s)[4], int r, uint32_t pair, float factor) {
    float2 x = unpack2<T>(pair);
    s[2 * r] += factor * x.x;
    s[2 * r + 1] += factor * x.y;
  }

  // o (16, D) += weights (16, inner) · tile (inner, D)
  template <int inner>
  static SEGVIT_DEVICE void product_nn(Fragment<D>& o, const Fragment<inner>& weights, const T* tile) {
    int lane = lane_index();
    tile += lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < inner; k += 16) {
      const float (&first)[4] = weights.at[k / 8], (&second)[4] = weights.at[k / 8 + 1];
      uint32_t a[4] = {pack2<T>(first[0], first[1]), pack2<T>(first[2], first[3]),
                       pack2<T>(second[0], second[1]), pack2<T>(second[2], second[3])};
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, tile + k * kStride + j * 8);
        mma_m16n8k16(o.at[j], a, {b[0], b[1]}, o.at[j], T{});
        mma_m16n8k16(o.at[j + 1], a, {b[2], b[3]}, o.at[j + 1], T{});
      }
    }
  }
};

template <int D>
struct Engine<float, D> {
  static constexpr bool kTensorCores = false;
  using Element = float;
  static constexpr int kWarps = D == 128 ? 2 : 4, kRows = 16 * kWarps, kThreads = 32 * kWarps, kStages = 1;
  static constexpr int kTile = D == 32 ? 64 : 32, kTileBackward = D == 128 ? 16 : kTile;
  static constexpr int kPadding = 4, kStride = D + kPadding;

  static SEGVIT_DEVICE float read_global(const char* data, int64_t index, Type type) {
    return read(data, index, type);
  }
  static SEGVIT_DEVICE void write_global(char* data, int64_t index, Type type, float value) {
    write(data, index, type, value);
  }

  template <int columns>
  static SEGVIT_DEVICE void product_nt(Fragment<columns>& s, const float* rows, const float* tile) {
    rows += fragment_row(0) * kStride;
    tile += fragment_column(0, 0) * kStride;
    for (int k = 0; k < D; k += 4) {
      float4 a[2] = {*reinterpret_cast<const float4*>(rows + k),
                     *reinterpret_cast<const float4*>(rows + 8 * kStride + k)};
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float4 b = *reinterpret_cast<const float4*>(tile + (8 * j + i) * kStride + k);
#pragma unroll
          for (int r = 0; r < 2; ++r)
            s.at[j][2 * r + i] += a[r].x * b.x + a[r].y * b.y + a[r].z * b.z + a[r].w * b.w;
        }
      }
    }
  }

  template <int columns>
  static SEGVIT_DEVICE void add(Fragment<columns>& s, const float* tile, float factor) {
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s.at[j][i] += factor * tile[fragment_row(i) * (columns + kPadding) + fragment_column(j, i)];
    }
  }
  template <int columns>
  static SEGVIT_DEVICE void add_transposed(Fragment<columns>& s, const float* tile, float factor) {
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s.at[j][i] += factor * tile[fragment_column(j, i) * (kRows + kPadding) + fragment_row(i)];
    }
  }

  // The weights of a row lie in four lanes: each hands its own to the others.
  template <int inner>
  static SEGVIT_DEVICE void product_nn(Fragment<D>& o, const Fragment<inner>& weights, const float* tile) {
    tile += fragment_column(0, 0);
#pragma unroll
    for (int k = 0; k < inner / 8; ++k) {
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int from = (lane_index() & ~3) | t;
          float first = __shfl_sync(kAllLanes, weights.at[k][i], from);
          float second = __shfl_sync(kAllLanes, weights.at[k][2 + i], from);
          const float* row = tile + (8 * k + 2 * t + i) * kStride;
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
            float2 b = *reinterpret_cast<const float2*>(row + 8 * j);
            o.at[j][0] += first * b.x;
            o.at[j][1] += first * b.y;
            o.at[j][2] += second * b.x;
            o.at[j][3] += second * b.y;
          }
        }
      }
    }
  }
};

// Calls f(Engine) for the element type, head dim and device.
template <class T, class F>
void with_head_dim(int dim, const F& f) {
  if (dim <= 32)
    f(Engine<T, 32>{});
  else if (dim <= 64)
    f(Engine<T, 64>{});
  else
    f(Engine<T, 128>{});
}
// What a block may have on every GPU that the engine runs on.
template <class E>
constexpr size_t kMaxSharedBytes = (E::kTensorCores ? 99 : 64) << 10;

template <class F>
void with_engine(const Device& device, const Attention& a, const F& f) {
  if (a.type == Type::f32 || device.capability() < 80)
    with_head_dim<float>(a.dim, f);
  else if (a.type == Type::f16)
    with_head_dim<half>(a.dim, f);
  else
    with_head_dim<bf16>(a.dim, f);
}

// -----------------------------------------------------------------------------------------------------------
// Tiles

// The padding of an image's tokens; null, for the compiler too, in kernels for calls without: they keep their
// registers.
template <bool kPadded>
SEGVIT_DEVICE const bool* padding_of(const Attention& a, int image) {
  if constexpr (kPadded) return a.padding + static_cast<int64_t>(image) * a.keys;
  return nullptr;
}

// Calls f(std::bool_constant) for whether there is padding.
template <class F>
void with_padding(const Attention& a, const F& f) {
  if (a.padding)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// `count` rows of `columns` into a tile, from row `start` on and element `offset` of it; zeros where there
// are fewer than `total` rows or `left` columns, or where a row is padding. A row of the tile has kPadding
// more.
template <class E, int columns, int count>
SEGVIT_DEVICE void load_tile(typename E::Element* tile, const Rows& from, int64_t offset, int start,
                             int total, int left, Type type, const bool* padding = nullptr) {
  using Element = typename E::Element;
  constexpr int kStride = columns + E::kPadding;
  if (from.aligned && (E::kTensorCores || type == Type::f32)) {
    constexpr int kStep = 16 / sizeof(Element), kChunks = columns / kStep, kRows = E::kThreads / kChunks;
    int row = threadIdx.x / kChunks, column = threadIdx.x % kChunks * kStep;
    int rows_left = column < left ? total - start - row : 0;
    const Element* source =
        reinterpret_cast<const Element*>(from.data) + offset + (start + row) * from.row + column;
    Element* target = tile + row * kStride + column;
#pragma unroll
    for (int i = 0; i < count; i += kRows) {
      copy_async16(target + i * kStride, source, i < rows_left && !(padding && padding[start + row + i]));
      source += kRows * from.row;
    }
  } else {
    for (int i = threadIdx.x; i < count * columns; i += E::kThreads) {
      int row = i / columns, column = i % columns;
      float x = 0;
      if (start + row < total && column < left && !(padding && padding[start + row]))
        x = E::read_global(from.data, offset + (start + row) * from.row + column, type);
      tile[row * kStride + column] = from_float<Element>(x);
    }
  }
}

// Row fragment_row(2 r) of a fragment, times `factor`, to at most `left` elements from `offset` on.
template <class E, int columns>
SEGVIT_DEVICE void store_row(char* data, int64_t offset, int left, Type type, const Fragment<columns>& x,
                             int r, float factor) {
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
    int column = fragment_column(j, 0);
    float first = x.at[j][2 * r] * factor, second = x.at[j][2 * r + 1] * factor;
    if constexpr (E::kTensorCores) {
      using T = typename E::Element;
      if ((offset | left) % 2 == 0) {
        if (column < left) reinterpret_cast<uint32_t*>(data)[(offset + column) / 2] = pack2<T>(first, second);
        continue;
      }
    }
    if (column < left) E::write_global(data, offset + column, type, first);
    if (column + 1 < left) E::write_global(data, offset + column + 1, type, second);
  }
}

// Which weights of a tile survive dropout: a byte for eight keys, (queries, keys / 8).
template <class E, int queries, int keys>
SEGVIT_DEVICE void load_keep(unsigned char* keep, const Attention& a, int image_head, int query, int key) {
  uint32_t groups = (a.keys + 7) / 8;
  for (int i = threadIdx.x; i < queries * (keys / 8); i += E::kThreads) {
    uint32_t c0 = (query + i / (keys / 8)) * groups + (key / 8 + i % (keys / 8));
    keep[i] = static_cast<unsigned char>(keep_bits(*a.seed, c0, image_head, a.threshold));
  }
}

}  // namespace segvit::cuda
