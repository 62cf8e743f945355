// Binary masks; what is computed stands in segvit_kernels/ops/mask_binarize.py.
//
// A block has a strip of one mask's results. A thread makes one element at a time: a pixel, or a word of 32 along a row
// or a column, bit after bit. Every pixel reads its four cells, which lie in the cache. Areas and boxes are counted in
// registers and reduced once a block; a second kernel joins the strips of a mask.
//
// Bytes: the grids once, an eighth of a byte or one a pixel written, 20 a block.
#include "../operators.h"
#include "common.cuh"

namespace segvit::cuda {

namespace {

constexpr int kThreads = 128, kMerged = 64, kStats = 5;
constexpr int64_t kBlocksEach = 8;  // a multiprocessor
constexpr float kHuge = 1e30f;      // stands for infinity
constexpr int kNone = 0x7fffffff;

struct Binarize {
  const char* logits;
  Type type;
  int64_t stride_b, stride_k, stride_h, stride_w;
  const float* boxes;  // null: the whole output
  int masks, count, h, w, height, width;
  float threshold;
  char* out;
  int* partial;  // (5, strips, masks): area, left, top, right, bottom
  int strips, rows;
};

// One axis of the box, or of the whole output.
struct Axis {
  float low, high, step;
  int cells, size;
};

// The pixel's cell before, the one after, and its share; whether the box holds the pixel.
struct Place {
  int lower, upper;
  float share;
  bool inside;
};

SEGVIT_DEVICE Axis axis_of(const float* box, int first, int cells, int size) {
  if (!box) return {0, static_cast<float>(size), static_cast<float>(cells) / size, cells, size};
  float low = box[first], high = box[first + 2], extent = high - low;
  bool good = extent > 0 && extent <= 3.4028234e38f;
  return {good ? low : 0, good ? high : 0, good ? cells / extent : 0, cells, size};
}

SEGVIT_DEVICE Place place_of(const Axis& axis, int pixel) {
  float centre = pixel + 0.5f, place = (centre - axis.low) * axis.step - 0.5f;
  place = fminf(fmaxf(place, 0.0f), axis.cells - 1.0f);
  int lower = static_cast<int>(place), upper = lower + 1 < axis.cells ? lower + 1 : axis.cells - 1;
  return {lower, upper, place - lower, pixel < axis.size && centre >= axis.low && centre < axis.high};
}

SEGVIT_DEVICE int warp_total(int x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}
SEGVIT_DEVICE int warp_least(int x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    int other = __shfl_xor_sync(kAllLanes, x, bits);
    x = other < x ? other : x;
  }
  return x;
}
SEGVIT_DEVICE int warp_most(int x) { return -warp_least(-x); }

// bits_y by bits_x pixels make an element: 1 by 1, 1 by 32 or 32 by 1.
template <int bits_y, int bits_x>
__global__ void __launch_bounds__(kThreads) mask_binarize_kernel(Binarize args) {
  int mask = blockIdx.x / args.strips, strip = blockIdx.x % args.strips;
  int out_y = (args.height + bits_y - 1) / bits_y, out_x = (args.width + bits_x - 1) / bits_x;
  const float* box = args.boxes ? args.boxes + 4 * static_cast<int64_t>(mask) : nullptr;
  const Axis ys = axis_of(box, 1, args.h, args.height), xs = axis_of(box, 0, args.w, args.width);
  int64_t first = mask / args.count * args.stride_b + mask % args.count * args.stride_k;
  int64_t base = static_cast<int64_t>(mask) * out_y * out_x;
  auto cell = [&](int y, int x) {
    float value = read(args.logits, first + y * args.stride_h + x * args.stride_w, args.type);
    value = value > -kHuge ? value : -kHuge;  // where it is not a number too
    return fminf(value, kHuge) - args.threshold;
  };
  int area = 0, left = kNone, top = kNone, right = 0, bottom = 0;
  int begin = strip * args.rows, end = begin + args.rows < out_y ? begin + args.rows : out_y;
  for (int64_t i = static_cast<int64_t>(begin) * out_x + threadIdx.x; i < static_cast<int64_t>(end) * out_x;
       i += kThreads) {
    int row = static_cast<int>(i / out_x), column = static_cast<int>(i % out_x);
    unsigned word = 0;
    for (int bit = 0; bit < bits_y * bits_x; ++bit) {
      int pixel_y = row * bits_y + (bits_y > 1 ? bit : 0), pixel_x = column * bits_x + (bits_x > 1 ? bit : 0);
      Place y = place_of(ys, pixel_y), x = place_of(xs, pixel_x);
      float upper = cell(y.lower, x.lower) * (1 - x.share) + cell(y.lower, x.upper) * x.share;
      float lower = cell(y.upper, x.lower) * (1 - x.share) + cell(y.upper, x.upper) * x.share;
      if (!(upper * (1 - y.share) + lower * y.share > 0 && y.inside && x.inside)) continue;
      word |= 1u << bit;
      left = pixel_x < left ? pixel_x : left, right = pixel_x + 1 > right ? pixel_x + 1 : right;
      top = pixel_y < top ? pixel_y : top, bottom = pixel_y + 1 > bottom ? pixel_y + 1 : bottom;
    }
    area += __popc(word);
    int64_t at = base + (bits_y > 1 ? static_cast<int64_t>(column) * out_y + row : i);
    if constexpr (bits_y * bits_x == 1)
      args.out[at] = static_cast<char>(word);
    else
      reinterpret_cast<unsigned*>(args.out)[at] = word;
  }
  int* memory = reinterpret_cast<int*>(shared_memory());
  int found[kStats] = {warp_total(area), warp_least(left), warp_least(top), warp_most(right), warp_most(bottom)};
  if (lane_index() == 0)
    for (int i = 0; i < kStats; ++i) memory[warp_index() * kStats + i] = found[i];
  __syncthreads();
  if (threadIdx.x) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    const int* other = memory + warp * kStats;
    found[0] += other[0];
    for (int i = 1; i < 3; ++i) found[i] = other[i] < found[i] ? other[i] : found[i];
    for (int i = 3; i < kStats; ++i) found[i] = other[i] > found[i] ? other[i] : found[i];
  }
  for (int i = 0; i < kStats; ++i)
    args.partial[(static_cast<int64_t>(i) * args.strips + strip) * args.masks + mask] = found[i];
}

__global__ void __launch_bounds__(kMerged)
    mask_binarize_merge_kernel(const int* partial, int* areas, int* tight, int masks, int strips) {
  int mask = blockIdx.x * kMerged + threadIdx.x;
  if (mask >= masks) return;
  int found[kStats] = {0, kNone, kNone, 0, 0};
  for (int strip = 0; strip < strips; ++strip)
    for (int i = 0; i < kStats; ++i) {
      int value = partial[(static_cast<int64_t>(i) * strips + strip) * masks + mask];
      if (i == 0) found[0] += value;
      else if (i < 3) found[i] = value < found[i] ? value : found[i];
      else found[i] = value > found[i] ? value : found[i];
    }
  areas[mask] = found[0];
  for (int i = 1; i < kStats; ++i) tight[4 * static_cast<int64_t>(mask) + i - 1] = found[0] ? found[i] : 0;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mask_binarize(Tensor mask_logits, Optional boxes, int64_t height, int64_t width,
                                                 double threshold, int64_t layout) {
  STD_TORCH_CHECK(0 <= layout && layout <= 2, "mask_binarize: layout is 0, 1 or 2");
  Device device(mask_logits);
  boxes = in_one_piece(boxes);
  int64_t batch = mask_logits.size(0), count = mask_logits.size(1);
  int64_t out_y = layout == 2 ? (height + 31) / 32 : height, out_x = layout == 1 ? (width + 31) / 32 : width;
  Tensor masks = empty(mask_logits, {batch, count, layout == 2 ? out_x : out_y, layout == 2 ? out_y : out_x},
                       layout ? ScalarType::Int : ScalarType::Bool);
  Tensor areas = empty(mask_logits, {batch, count}, ScalarType::Int);
  Tensor tight = empty(mask_logits, {batch, count, 4}, ScalarType::Int);
  int64_t total = batch * count;
  if (!total) return {masks, areas, tight};
  int64_t wanted = (kBlocksEach * device.multiprocessors() + total - 1) / total;
  int64_t rows = (out_y + wanted - 1) / wanted, strips = (out_y + rows - 1) / rows;
  Tensor partial = empty(mask_logits, {kStats, strips, total}, ScalarType::Int);
  Binarize args{data<char>(mask_logits),
                type_of(mask_logits),
                mask_logits.stride(0),
                mask_logits.stride(1),
                mask_logits.stride(2),
                mask_logits.stride(3),
                data<float>(boxes),
                static_cast<int>(total),
                static_cast<int>(count),
                static_cast<int>(mask_logits.size(2)),
                static_cast<int>(mask_logits.size(3)),
                static_cast<int>(height),
                static_cast<int>(width),
                static_cast<float>(threshold),
                data<char>(masks),
                data<int>(partial),
                static_cast<int>(strips),
                static_cast<int>(rows)};
  auto* kernel = layout == 0   ? mask_binarize_kernel<1, 1>
                 : layout == 1 ? mask_binarize_kernel<1, 32>
                               : mask_binarize_kernel<32, 1>;
  launch(kernel, static_cast<unsigned>(total * strips), kThreads, kThreads / 32 * kStats * sizeof(int), device.stream,
         args);
  launch(mask_binarize_merge_kernel, ceil_div(total, kMerged), kMerged, 0, device.stream, data<int>(partial),
         data<int>(areas), data<int>(tight), static_cast<int>(total), static_cast<int>(strips));
  return {masks, areas, tight};
}

}  // namespace segvit::cuda
