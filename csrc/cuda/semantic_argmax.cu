// Semantic argmax: labels of a mask classifier; what is computed stands in
// segvit_kernels/ops/semantic_argmax.py.
//
// A first kernel writes the class probabilities of every view as whole rows, padded with zeros, without the
// queries that `prune` leaves out, and says where the view's masks are. The second has one block per tile of
// output pixels. Over the views that cover the tile and over the queries it interpolates the masks, each
// pixel from its four cells in the caches, takes σ and adds σ · probabilities to the scores, which stay in
// registers with the running argmax. Classes that do not fit are taken in turns, each of which computes σ
// again.
//
// Half-precision masks, sm_80 and up: tiles of 8 by 16 pixels, a row a warp. Its lanes compute σ where the
// tensor cores want it, in fragments of 16 pixels by 16 queries; the probabilities of 32 queries come through
// shared memory while those before them are at work. σ is scaled by 2^10 and the probabilities by a power of
// two, so that neither underflows in float16. Otherwise: tiles of 8 by 8 pixels, σ through shared memory,
// products in float32 from registers, 8 pixels by up to 6 classes a thread.
//
// Bytes: masks and probabilities are read once per tile, from the caches; labels are written once. For 150
// classes, sm_80 and sm_90a, no spills: half precision 232 registers and 21 KiB of shared memory, otherwise
// 204 and 14 KiB.
#include "../operators.h"
#include "common.cuh"
#include "resize.cuh"

namespace segvit::cuda {

namespace {

constexpr int kStacks = 64;    // tensors of masks in one launch
constexpr int kThreads = 256;  // eight warps
constexpr int kQueries = 32;   // of one block in shared memory; a multiple of them is stored
[[maybe_unused]] constexpr float kSigmaScale = 1024;
constexpr float kProbsScale = 16384, kLargestHalf = 65504;

// Masks of a view: (Q, h, w), the last stride 1; strides in elements.
struct Masks {
  const char* data;
  int64_t query_stride;
  int row_stride, h, w;
};

struct Stack {
  const char* data;
  int64_t view_stride, query_stride;
  int row_stride, h, w, end;  // one past its last view
};

struct Prepare {
  Stack stacks[kStacks];
  int count, first_view;
  Type type;  // of masks
  const char* probs;
  int64_t view_stride, query_stride;
  Type probs_type;
  int queries, classes, padded_queries, padded_classes;
  float prune;
  bool half_precision;
  Masks* masks;  // (V)
  char* out;     // (V, padded_queries, padded_classes), float16 or float32
  float* units;  // (V): one over the power of two that the probabilities are scaled by
};

struct Argmax {
  const Masks* masks;
  Type type;
  const char* probs;
  const float* units;
  const int *starts, *layout;  // null: view i is image i, all of it
  const float* affine;
  int height, width, queries, classes, padded_queries, padded_classes, turns;
  double ay, by, ax, bx;  // without views
  bool sigmoid;
  char* labels;
  float* scores;  // null: not wanted
};

// One block per view, a warp per query.
__global__ void __launch_bounds__(1024) semantic_argmax_prepare_kernel(const Prepare a) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  int view = a.first_view + blockIdx.x, warps = static_cast<int>(blockDim.x / 32);
  int64_t element = size_of(a.probs_type);
  const char* probs = a.probs + view * a.view_stride * element;
  if (threadIdx.x == 0) {
    int i = 0;
    while (view >= a.stacks[i].end) ++i;
    const Stack& s = a.stacks[i];
    int local = view - (i ? a.stacks[i - 1].end : a.first_view);
    int64_t offset = local * s.view_stride * size_of(a.type);
    a.masks[view] = {s.data + offset, s.query_stride, s.row_stride, s.h, s.w};
  }
  float scale = 1;
  if (a.half_precision) {
    float largest = 0;
    for (int q = warp_index(); q < a.queries; q += warps)
      for (int c = lane_index(); c < a.classes; c += 32)
        largest = fmaxf(largest, fabsf(read(probs, q * a.query_stride + c, a.probs_type)));
    largest = warp_max(largest);
    if (lane_index() == 0) memory[warp_index()] = largest;
    __syncthreads();
    for (int warp = 0; warp < warps; ++warp) largest = fmaxf(largest, memory[warp]);
    // The largest to [2^14, 2^15), but by no more than 2^18 and no less than 2^9.
    int exponent = 14 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127);
    exponent = max(9, min(18, exponent));
    scale = __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
    if (threadIdx.x == 0) a.units[view] = __uint_as_float(static_cast<unsigned>(127 - exponent) << 23);
  } else if (threadIdx.x == 0) {
    a.units[view] = 1;
  }
  for (int q = warp_index(); q < a.padded_queries; q += warps) {
    float mass = 0;
    if (a.prune > 0 && q < a.queries)
      for (int c = lane_index(); c < a.classes; c += 32)
        mass += read(probs, q * a.query_stride + c, a.probs_type);
    mass = warp_sum(mass);
    bool kept = q < a.queries && (a.prune <= 0 || mass >= a.prune);
    int64_t out = (static_cast<int64_t>(view) * a.padded_queries + q) * a.padded_classes;
    for (int c = lane_index(); c < a.padded_classes; c += 32) {
      float p = kept && c < a.classes ? scale * read(probs, q * a.query_stride + c, a.probs_type) : 0;
      if (a.half_precision)
        reinterpret_cast<half*>(a.out)[out + c] =
            from_float<half>(fminf(fmaxf(p, -kLargestHalf), kLargestHalf));
      else
        reinterpret_cast<float*>(a.out)[out + c] = p;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Views

// Rows of the layout: index, group, views in the group, top, left, bottom, right.
SEGVIT_DEVICE bool inside(const int* layout, int y, int x) {
  return y >= layout[3] && y < layout[5] && x >= layout[4] && x < layout[6];
}
SEGVIT_DEVICE bool meets(const int* layout, int y, int x, int height, int width) {
  return layout[3] < y + height && layout[5] > y && layout[4] < x + width && layout[6] > x;
}
// How many of the views from `first` on, a group, cover a pixel.
SEGVIT_DEVICE int covering(const int* layout, int first, int y, int x) {
  int count = 0;
  for (int v = first, end = first + layout[first * 7 + 2]; v < end; ++v)
    count += inside(layout + v * 7, y, x);
  return count;
}
SEGVIT_DEVICE int covering_groups(const Argmax& a, int image, int y, int x) {
  int count = 0;
  for (int v = a.starts[image]; v < a.starts[image + 1]; v += a.layout[v * 7 + 2])
    count += covering(a.layout, v, y, x) > 0;
  return count;
}

// Where output pixels lie in the masks of a view.
struct Axis {
  double step, offset;  // few computations, and float32 would lose what far windows add to their offsets
};
SEGVIT_DEVICE Place place_of(int i, Axis axis, int cells) {
  double place = fmin(fmax(i * axis.step + axis.offset, 0.0), cells - 1.0);
  int before = static_cast<int>(place);
  return {before, min(before + 1, cells - 1), static_cast<float>(place - before)};
}

SEGVIT_DEVICE Taps taps_of(const Masks& masks, int y, int x, Axis ay, Axis ax) {
  return taps_of(place_of(y, ay, masks.h), place_of(x, ax, masks.w), masks.row_stride);
}

// Calls f(view, y axis, x axis, share) for every view of the image that meets the tile; share(y, x) is the
// view's share in the sum of a pixel, but for a factor of all views.
template <int height, int width, class F>
SEGVIT_DEVICE void for_views(const Argmax& a, int image, int y0, int x0, float scale, const F& f) {
  if (!a.layout) {
    f(image, Axis{a.ay, a.by}, Axis{a.ax, a.bx}, [](int, int) { return 1.0f; });
    return;
  }
  for (int first = a.starts[image], end; first < a.starts[image + 1]; first = end) {
    end = first + a.layout[first * 7 + 2];
    for (int v = first; v < end; ++v) {
      const int* layout = a.layout + v * 7;
      if (!meets(layout, y0, x0, height, width)) continue;
      const float* map = a.affine + v * 4;
      float unit = a.units[layout[0]] * scale;
      f(layout[0], Axis{map[0], map[1]}, Axis{map[2], map[3]}, [=](int y, int x) {
        return inside(layout, y, x) ? unit / static_cast<float>(covering(a.layout, first, y, x)) : 0;
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Labels

struct Best {
  float score = -__builtin_huge_valf();
  int label = 0;
  SEGVIT_DEVICE void take(float other, int its) {
    if (other > score || (other == score && its < label)) score = other, label = its;
  }
};
// The best of `lanes` neighbouring lanes.
template <int lanes>
SEGVIT_DEVICE Best warp_best(Best best) {
#pragma unroll
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    float score = __shfl_xor_sync(kAllLanes, best.score, bits);
    best.take(score, __shfl_xor_sync(kAllLanes, best.label, bits));
  }
  return best;
}

SEGVIT_DEVICE void write(const Argmax& a, int image, int y, int x, Best best, float scale) {
  if (y >= a.height || x >= a.width) return;
  int64_t at = (static_cast<int64_t>(image) * a.height + y) * a.width + x;
  if (a.classes <= 256)
    reinterpret_cast<uint8_t*>(a.labels)[at] = static_cast<uint8_t>(best.label);
  else
    reinterpret_cast<int16_t*>(a.labels)[at] = static_cast<int16_t>(best.label);
  if (!a.scores) return;
  float unit =
      a.layout ? 1 / (kProbsScale * static_cast<float>(covering_groups(a, image, y, x))) : a.units[image];
  a.scores[at] = best.score * unit * scale;
}

// Half-precision masks of type T; 8 · tiles classes a turn.
template <class T, int tiles>
__global__ void __launch_bounds__(kThreads, 1) semantic_argmax_mma_kernel(const Argmax a) {
#if SEGVIT_HAS_MMA
  constexpr int kHeight = 8, kWidth = 16, kPitch = tiles * 8 + 8;  // of a row in shared memory
  constexpr int kBlock = kQueries * kPitch;
  half* held = reinterpret_cast<half*>(shared_memory());  // two blocks of probabilities
  int columns = (a.width + kWidth - 1) / kWidth, per_image = (a.height + kHeight - 1) / kHeight * columns;
  int image = static_cast<int>(blockIdx.x / per_image), tile = static_cast<int>(blockIdx.x % per_image);
  int y0 = tile / columns * kHeight, x0 = tile % columns * kWidth;
  int lane = lane_index(), y = min(y0 + warp_index(), a.height - 1);
  // The lane has pixels lane / 4 and 8 further, and of 16 queries 2, 2 and 8 further.
  int x[2] = {min(x0 + lane / 4, a.width - 1), min(x0 + lane / 4 + 8, a.width - 1)},
      first_query = lane % 4 * 2;
  Best best[2];
  for (int turn = 0; turn < a.turns; ++turn) {
    float acc[tiles][4] = {};
    for_views<kHeight, kWidth>(
        a, image, y0, x0, kProbsScale, [&](int view, Axis ay, Axis ax, const auto& share_of) {
          Masks masks = a.masks[view];
          const T* data = reinterpret_cast<const T*>(masks.data);
          Taps taps[2];
          float share[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) taps[i] = taps_of(masks, y, x[i], ay, ax), share[i] = share_of(y, x[i]);
          const half* probs = reinterpret_cast<const half*>(a.probs) +
                              static_cast<int64_t>(view) * a.padded_queries * a.padded_classes +
                              turn * tiles * 8;
          auto fetch = [&](int block) {
            if (block * kQueries < a.padded_queries)
              for (int i = threadIdx.x; i < kQueries * tiles; i += kThreads) {
                int q = i / tiles, c = i % tiles * 8;
                copy_async16(held + block % 2 * kBlock + q * kPitch + c,
                             probs + static_cast<int64_t>(block * kQueries + q) * a.padded_classes + c, true);
              }
            copy_commit();
          };
          __syncthreads();  // the last view's probabilities may still be read
          fetch(0);
          for (int block = 0; block * kQueries < a.padded_queries; ++block) {
            fetch(block + 1);
            copy_wait<1>();
            __syncthreads();
            const half* from = held + block % 2 * kBlock + lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll 1
            for (int step = 0; step < kQueries; step += 16) {
              uint32_t sigma[4];
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                float values[2];
                int i = k % 2, q = block * kQueries + step + k / 2 * 8 + first_query;
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  const T* mask = data + min(q + j, a.queries - 1) * masks.query_stride;
                  float logit = interpolate(mask, taps[i], kLargestHalf);
                  if (a.sigmoid)
                    values[j] = share[i] * fast_rcp(1 / kSigmaScale + fast_exp2(logit * -kLog2e - 10));
                  else
                    values[j] = fminf(fmaxf(share[i] * logit, -kLargestHalf), kLargestHalf);
                }
                sigma[k] = pack2<half>(values[0], values[1]);
              }
#pragma unroll
              for (int n = 0; n < tiles; n += 2) {
                uint32_t p[4];
                ldmatrix_x4_trans(p, from + step * kPitch + n * 8);
                mma_m16n8k16(acc[n], sigma, {p[0], p[1]}, acc[n], half{});
                mma_m16n8k16(acc[n + 1], sigma, {p[2], p[3]}, acc[n + 1], half{});
              }
            }
            __syncthreads();
          }
          copy_wait<0>();
        });
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        int c = (turn * tiles + n) * 8 + first_query + k % 2;
        if (c < a.classes) best[k / 2].take(acc[n][k], c);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Best found = warp_best<4>(best[i]);
    if (lane % 4 == 0)
      write(a, image, y0 + warp_index(), x0 + lane / 4 + i * 8, found, a.sigmoid ? 1 / kSigmaScale : 1);
  }
#endif
}

// Masks of any type; 32 · each classes a turn.
template <int each>
__global__ void __launch_bounds__(kThreads, 1) semantic_argmax_fma_kernel(const Argmax a) {
  constexpr int kSide = 8, kPixels = kSide * kSide, kStep = 16, kClasses = 32 * each;
  float* sigma = reinterpret_cast<float*>(shared_memory());  // [kStep][kPixels]
  float* held = sigma + kStep * kPixels;                     // [kStep][kClasses]
  int columns = (a.width + kSide - 1) / kSide, per_image = (a.height + kSide - 1) / kSide * columns;
  int image = static_cast<int>(blockIdx.x / per_image), tile = static_cast<int>(blockIdx.x % per_image);
  int y0 = tile / columns * kSide, x0 = tile % columns * kSide, lane = lane_index();
  // σ: a pixel a thread. Scores: a row of pixels a warp, lanes have classes 32 apart.
  int pixel = static_cast<int>(threadIdx.x) % kPixels, first_query = static_cast<int>(threadIdx.x) / kPixels;
  int y = min(y0 + pixel / kSide, a.height - 1), x = min(x0 + pixel % kSide, a.width - 1);
  Best best[kSide];
  for (int turn = 0; turn < a.turns; ++turn) {
    float acc[kSide][each] = {};
    for_views<kSide, kSide>(
        a, image, y0, x0, kProbsScale, [&](int view, Axis ay, Axis ax, const auto& share_of) {
          Masks masks = a.masks[view];
          Taps taps = taps_of(masks, y, x, ay, ax);
          float share = share_of(y, x);
          const float* probs = reinterpret_cast<const float*>(a.probs) +
                               static_cast<int64_t>(view) * a.padded_queries * a.padded_classes +
                               turn * kClasses;
          for (int first = 0; first < a.padded_queries; first += kStep) {
            __syncthreads();
#pragma unroll
            for (int i = first_query; i < kStep; i += kThreads / kPixels) {
              int64_t offset = min(first + i, a.queries - 1) * masks.query_stride;
              float logit;
              if (a.type == Type::f32)
                logit = interpolate(reinterpret_cast<const float*>(masks.data) + offset, taps, kHuge);
              else if (a.type == Type::f16)
                logit = interpolate(reinterpret_cast<const half*>(masks.data) + offset, taps, kLargestHalf);
              else
                logit = interpolate(reinterpret_cast<const bf16*>(masks.data) + offset, taps, kLargestHalf);
              sigma[i * kPixels + pixel] =
                  share * (a.sigmoid ? fast_rcp(1 + fast_exp2(logit * -kLog2e)) : logit);
            }
            for (int i = threadIdx.x; i < kStep * kClasses; i += kThreads)
              held[i] = probs[static_cast<int64_t>(first + i / kClasses) * a.padded_classes + i % kClasses];
            __syncthreads();
            float part[kSide][each] = {};  // sums of sums lose less
#pragma unroll 4
            for (int q = 0; q < kStep; ++q) {
              float s[kSide], p[each];
#pragma unroll
              for (int i = 0; i < kSide; i += 4) {
                float4 four =
                    *reinterpret_cast<const float4*>(sigma + q * kPixels + warp_index() * kSide + i);
                s[i] = four.x, s[i + 1] = four.y, s[i + 2] = four.z, s[i + 3] = four.w;
              }
#pragma unroll
              for (int j = 0; j < each; ++j) p[j] = held[q * kClasses + j * 32 + lane];
#pragma unroll
              for (int i = 0; i < kSide; ++i)
#pragma unroll
                for (int j = 0; j < each; ++j) part[i][j] += s[i] * p[j];
            }
#pragma unroll
            for (int i = 0; i < kSide; ++i)
#pragma unroll
              for (int j = 0; j < each; ++j) acc[i][j] += part[i][j];
          }
        });
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
      for (int j = 0; j < each; ++j) {
        int c = turn * kClasses + j * 32 + lane;
        if (c < a.classes) best[i].take(acc[i][j], c);
      }
  }
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    Best found = warp_best<32>(best[i]);
    if (lane == i) write(a, image, y0 + warp_index(), x0 + i, found, 1);
  }
}

using Kernel = void (*)(Argmax);

// The kernel for so many sixteens of classes a turn, and how many it takes.
template <class T>
std::pair<Kernel, int> mma_kernel(int64_t classes) {
  if (classes <= 32) return {semantic_argmax_mma_kernel<T, 4>, 32};
  if (classes <= 80) return {semantic_argmax_mma_kernel<T, 10>, 80};
  if (classes <= 160) return {semantic_argmax_mma_kernel<T, 20>, 160};
  return {semantic_argmax_mma_kernel<T, 24>, 192};
}
std::pair<Kernel, int> fma_kernel(int64_t classes) {
  if (classes <= 32) return {semantic_argmax_fma_kernel<1>, 32};
  if (classes <= 96) return {semantic_argmax_fma_kernel<3>, 96};
  if (classes <= 160) return {semantic_argmax_fma_kernel<5>, 160};
  return {semantic_argmax_fma_kernel<6>, 192};
}

}  // namespace

std::tuple<Tensor, Tensor> semantic_argmax(std::vector<Tensor> mask_logits, Tensor class_probs,
                                           std::vector<Tensor> views, int64_t batch, int64_t height,
                                           int64_t width, std::vector<double>, bool sigmoid, bool need_scores,
                                           double prune) {
  Device device(class_probs);
  for (Tensor& masks : mask_logits) {
    masks = unit_stride(masks);
    // Cells of a mask are found by 32 bits.
    if (masks.size(2) * std::abs(masks.stride(2)) >= int64_t{1} << 30)
      masks = torch::stable::contiguous(masks);
    STD_TORCH_CHECK(masks.size(2) * masks.size(3) < int64_t{1} << 31,
                    "segvit: semantic_argmax: masks too large");
  }
  class_probs = unit_stride(class_probs);
  int64_t count = class_probs.size(0), queries = class_probs.size(1), classes = class_probs.size(2);
  Tensor labels =
      empty(class_probs, {batch, height, width}, classes <= 256 ? ScalarType::Byte : ScalarType::Short);
  Tensor scores = need_scores ? empty(class_probs, {batch, height, width}, ScalarType::Float)
                              : empty(class_probs, {0}, ScalarType::Float);
  if (batch == 0) return {labels, scores};

  Type type = type_of(mask_logits[0]);
  bool tensor_cores = type != Type::f32 && device.capability() >= 80;
  auto [kernel, width_of_turn] = !tensor_cores       ? fma_kernel(classes)
                                 : type == Type::f16 ? mma_kernel<half>(classes)
                                                     : mma_kernel<bf16>(classes);
  int64_t turns = (classes + width_of_turn - 1) / width_of_turn, padded_classes = turns * width_of_turn;
  int64_t padded_queries = round_up(queries, kQueries);
  Tensor probs = empty(class_probs, {count, padded_queries, padded_classes},
                       tensor_cores ? ScalarType::Half : ScalarType::Float);
  Tensor units = empty(class_probs, {count}, ScalarType::Float);
  Tensor table = empty(class_probs, {count, static_cast<int64_t>(sizeof(Masks))}, ScalarType::Byte);
  auto narrow = [](int64_t n) { return static_cast<int>(n); };
  Masks* masks = reinterpret_cast<Masks*>(data<char>(table));

  int64_t first_view = 0;
  for (size_t first = 0; first < mask_logits.size(); first += kStacks) {
    Prepare a{};
    a.first_view = narrow(first_view);
    a.count = narrow(std::min<int64_t>(kStacks, mask_logits.size() - first));
    for (int i = 0; i < a.count; ++i) {
      const Tensor& m = mask_logits[first + i];
      first_view += m.size(0);
      a.stacks[i] = {data<char>(m),     m.stride(0),       m.stride(1),       narrow(m.stride(2)),
                     narrow(m.size(2)), narrow(m.size(3)), narrow(first_view)};
    }
    a.type = type;
    a.probs = data<char>(class_probs);
    a.view_stride = class_probs.stride(0), a.query_stride = class_probs.stride(1);
    a.probs_type = type_of(class_probs);
    a.queries = narrow(queries), a.classes = narrow(classes);
    a.padded_queries = narrow(padded_queries), a.padded_classes = narrow(padded_classes);
    a.prune = static_cast<float>(prune);
    a.half_precision = tensor_cores;
    a.masks = masks;
    a.out = data<char>(probs);
    a.units = data<float>(units);
    launch(semantic_argmax_prepare_kernel, static_cast<unsigned>(first_view - a.first_view), 1024,
           32 * sizeof(float), device.stream, a);
  }

  Argmax a{};
  a.masks = masks;
  a.type = type;
  a.probs = data<char>(probs);
  a.units = data<float>(units);
  if (!views.empty()) {
    for (Tensor& tensor : views) tensor = torch::stable::contiguous(tensor);
    a.starts = data<int>(views[0]), a.layout = data<int>(views[1]), a.affine = data<float>(views[2]);
  }
  a.height = narrow(height), a.width = narrow(width);
  a.queries = narrow(queries), a.classes = narrow(classes);
  a.padded_queries = narrow(padded_queries), a.padded_classes = narrow(padded_classes),
  a.turns = narrow(turns);
  double step_y = static_cast<double>(mask_logits[0].size(2)) / height;
  double step_x = static_cast<double>(mask_logits[0].size(3)) / width;
  a.ay = step_y, a.by = step_y / 2 - 0.5, a.ax = step_x, a.bx = step_x / 2 - 0.5;
  a.sigmoid = sigmoid;
  a.labels = data<char>(labels);
  a.scores = need_scores ? data<float>(scores) : nullptr;
  int64_t tile_width = tensor_cores ? 16 : 8;
  int64_t blocks = batch * ((height + 7) / 8) * ((width + tile_width - 1) / tile_width);
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "segvit: semantic_argmax: the outputs are too large");
  size_t shared = tensor_cores ? 2 * kQueries * (width_of_turn + 8) * sizeof(half)
                               : 16 * (64 + width_of_turn) * sizeof(float);
  launch(kernel, static_cast<unsigned>(blocks), kThreads, shared, device.stream, a);
  return {labels, scores};
}

}  // namespace segvit::cuda
