// Mask IoU; what is computed stands in segvit_kernels/ops/mask_iou.py.
//
// A block has 64 of the first masks by 64 of the second and a part of the pixels, through which it goes 16 at a time:
// its threads make the values of both sides, each pixel from its four cells in the caches, into shared memory, and
// multiply 4 masks by 4 each from there. Hard values are 0 and 1, whose sums in float32 are exact for as many pixels
// as a part has. A second kernel adds the parts in order, so that sums repeat.
//
// Bytes: cells are read from the caches once for every 64 masks of the other side. 8.5 KiB of shared memory.
#include "../operators.h"
#include "common.cuh"
#include "resize.cuh"

namespace segvit::cuda {

namespace {

constexpr int kThreads = 256, kBlock = 64, kPixels = 16, kPitch = kBlock + 4, kSide = 4;
constexpr int64_t kMostPixels = 1 << 23;  // of a part, whose counts float32 holds

// Strides in elements; the last one is 1.
struct Masks {
  const char* data;
  Type type;
  bool boolean, resize;
  int64_t image_stride, mask_stride;
  int row_stride, count, h, w;
  float step_y, step_x;
};

struct Iou {
  Masks a, b;
  int batch, width, pixels, parts, part;
  bool soft;
  float threshold;
  float* partial;  // (B, parts, N M + N + M)
  char *pairs, *area_a, *area_b;  // int32 or float32
};

// Value of a pixel of one mask.
SEGVIT_DEVICE float value_of(const Iou& args, const Masks& masks, int image, int mask, int pixel) {
  int y = pixel / args.width, x = pixel % args.width;
  int64_t offset = image * masks.image_stride + mask * masks.mask_stride;
  if (masks.boolean) return masks.data[offset + static_cast<int64_t>(y) * masks.row_stride + x] ? 1.0f : 0.0f;
  Place row{y, y, 0}, column{x, x, 0};
  if (masks.resize) row = place_of(y, masks.step_y, masks.h), column = place_of(x, masks.step_x, masks.w);
  Taps taps = taps_of(row, column, masks.row_stride);
  float value = masks.type == Type::f32 ? interpolate(reinterpret_cast<const float*>(masks.data) + offset, taps, kHuge)
                : masks.type == Type::f16
                    ? interpolate(reinterpret_cast<const half*>(masks.data) + offset, taps, kHuge)
                    : interpolate(reinterpret_cast<const bf16*>(masks.data) + offset, taps, kHuge);
  if (args.soft) return sigmoid(value);
  return value > args.threshold ? 1.0f : 0.0f;
}

__global__ void __launch_bounds__(kThreads) mask_iou_kernel(const Iou args) {
  float* a = reinterpret_cast<float*>(shared_memory());  // [kPixels][kPitch]
  float* b = a + kPixels * kPitch;
  int n = args.a.count, m = args.b.count;
  int blocks_m = max(1, (m + kBlock - 1) / kBlock), blocks_n = max(1, (n + kBlock - 1) / kBlock);
  int i = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  int first_b = i % blocks_m * kBlock, first_a = i / blocks_m % blocks_n * kBlock;
  i /= blocks_m * blocks_n;
  int part = i % args.parts, image = i / args.parts;
  int begin = part * args.part, end = min(begin + args.part, args.pixels);
  int row = thread / 16 * kSide, column = thread % 16 * kSide;
  float sums[kSide][kSide] = {}, area = 0;  // of mask thread of the first, or of the second past 64
  for (int p = begin; p < end; p += kPixels) {
    __syncthreads();
    for (int k = thread; k < 2 * kBlock * kPixels; k += kThreads) {
      // Neighbouring threads have neighbouring pixels.
      int pixel = p + k % kPixels, mask = k / kPixels % kBlock;
      bool second = k >= kBlock * kPixels;
      const Masks& masks = second ? args.b : args.a;
      int own = mask + (second ? first_b : first_a);
      float value = own < masks.count && pixel < end ? value_of(args, masks, image, own, pixel) : 0.0f;
      (second ? b : a)[k % kPixels * kPitch + mask] = value;
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kPixels; ++k) {
      float u[kSide], v[kSide];
#pragma unroll
      for (int j = 0; j < kSide; ++j) u[j] = a[k * kPitch + row + j], v[j] = b[k * kPitch + column + j];
#pragma unroll
      for (int r = 0; r < kSide; ++r)
#pragma unroll
        for (int c = 0; c < kSide; ++c) sums[r][c] += u[r] * v[c];
      if (thread < 2 * kBlock) area += (thread < kBlock ? a : b)[k * kPitch + thread % kBlock];
    }
  }
  float* out = args.partial + (static_cast<int64_t>(image) * args.parts + part) *
                                  (static_cast<int64_t>(n) * m + n + m);
#pragma unroll
  for (int r = 0; r < kSide; ++r)
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      int64_t x = first_a + row + r, y = first_b + column + c;
      if (x < n && y < m) out[x * m + y] = sums[r][c];
    }
  int64_t pairs = static_cast<int64_t>(n) * m;
  if (thread < kBlock) {
    if (first_b == 0 && first_a + thread < n) out[pairs + first_a + thread] = area;
  } else if (thread < 2 * kBlock) {
    int own = first_b + thread - kBlock;
    if (first_a == 0 && own < m) out[pairs + n + own] = area;
  }
}

// The parts of every result, added in order.
__global__ void __launch_bounds__(kThreads) mask_iou_sum_kernel(const Iou args) {
  int64_t n = args.a.count, m = args.b.count, each = n * m + n + m;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= each * args.batch) return;
  int64_t image = i / each, own = i % each;
  const float* from = args.partial + image * args.parts * each + own;
  float total = 0;
  int whole = 0;
  for (int part = 0; part < args.parts; ++part) {
    float found = from[part * each];
    total += found, whole += static_cast<int>(found);
  }
  char* out = args.pairs;
  int64_t at = image * n * m + own;
  if (own >= n * m + n) out = args.area_b, at = image * m + own - n * m - n;
  else if (own >= n * m) out = args.area_a, at = image * n + own - n * m;
  if (args.soft) reinterpret_cast<float*>(out)[at] = total;
  else reinterpret_cast<int*>(out)[at] = whole;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mask_iou(Tensor a, Tensor b, int64_t height, int64_t width, bool soft,
                                            double threshold) {
  Device device(a);
  auto prepared = [](Tensor t) {
    t = unit_stride(t);
    // Cells of a mask are found by 32 bits.
    return t.size(2) * std::abs(t.stride(2)) < int64_t{1} << 30 ? t : torch::stable::contiguous(t);
  };
  a = prepared(a), b = prepared(b);
  int64_t batch = a.size(0), n = a.size(1), m = b.size(1), pixels = height * width;
  STD_TORCH_CHECK(pixels < int64_t{1} << 31 && a.size(2) * a.size(3) < int64_t{1} << 31 &&
                      b.size(2) * b.size(3) < int64_t{1} << 31,
                  "segvit: mask_iou: masks too large");
  ScalarType type = soft ? ScalarType::Float : ScalarType::Int;
  Tensor pairs = empty(a, {batch, n, m}, type), area_a = empty(a, {batch, n}, type);
  Tensor area_b = empty(a, {batch, m}, type);
  if (!batch || !(n + m)) return {pairs, area_a, area_b};

  auto narrow = [](int64_t x) { return static_cast<int>(x); };
  auto masks_of = [&](const Tensor& t) {
    Masks masks{};
    masks.data = data<char>(t);
    masks.boolean = t.scalar_type() == ScalarType::Bool;
    masks.type = masks.boolean ? Type::f32 : type_of(t);
    masks.resize = t.size(2) != height || t.size(3) != width;
    masks.image_stride = t.stride(0), masks.mask_stride = t.stride(1), masks.row_stride = narrow(t.stride(2));
    masks.count = narrow(t.size(1)), masks.h = narrow(t.size(2)), masks.w = narrow(t.size(3));
    masks.step_y = static_cast<float>(t.size(2)) / static_cast<float>(height);
    masks.step_x = static_cast<float>(t.size(3)) / static_cast<float>(width);
    return masks;
  };
  Iou args{};
  args.a = masks_of(a), args.b = masks_of(b);
  args.batch = narrow(batch), args.width = narrow(width), args.pixels = narrow(pixels);
  args.soft = soft, args.threshold = static_cast<float>(threshold);
  auto blocks_of = [](int64_t count) { return std::max<int64_t>(1, (count + kBlock - 1) / kBlock); };
  int64_t blocks = batch * blocks_of(n) * blocks_of(m), steps = (pixels + kPixels - 1) / kPixels;
  int64_t parts = std::clamp<int64_t>(8 * device.multiprocessors() / blocks, 1, steps);
  parts = std::max(parts, (pixels + kMostPixels - 1) / kMostPixels);
  int64_t part = round_up((pixels + parts - 1) / parts, kPixels);
  parts = (pixels + part - 1) / part;
  args.parts = narrow(parts), args.part = narrow(part);
  Tensor partial = empty(a, {batch, parts, n * m + n + m}, ScalarType::Float);
  args.partial = data<float>(partial);
  args.pairs = data<char>(pairs), args.area_a = data<char>(area_a), args.area_b = data<char>(area_b);
  STD_TORCH_CHECK(blocks * parts < int64_t{1} << 31, "segvit: mask_iou: too many masks");
  launch(mask_iou_kernel, static_cast<unsigned>(blocks * parts), kThreads, 2 * kPixels * kPitch * sizeof(float),
         device.stream, args);
  launch(mask_iou_sum_kernel, ceil_div(batch * (n * m + n + m), kThreads), kThreads, 0, device.stream, args);
  return {pairs, area_a, area_b};
}

}  // namespace segvit::cuda
