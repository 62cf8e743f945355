// Panoptic argmax; what is computed stands in segvit_kernels/ops/panoptic_argmax.py.
//
// Where masks are interpolated twice, or σ comes first, a first kernel writes the cells of the last grid before the
// output in float32, one a thread. The second has blocks that go through tiles of 8 by 32 output pixels, a row a
// warp and a pixel a thread: over the queries each thread interpolates its pixel from four cells, in the caches, and
// keeps the best product. Pixels above the threshold are counted by a vote of the warp for every query, into shared
// memory, those won once at the end of a tile. Counts are whole numbers: their sum is the same in any order.
//
// Bytes: masks once per tile, from the caches; 3 bytes a pixel are written. 40 registers on sm_80.
#include "../operators.h"
#include "common.cuh"
#include "resize.cuh"

namespace segvit::cuda {

namespace {

constexpr int kThreads = 256, kTileHeight = 8, kTileWidth = 32;
constexpr int kHeldQueries = 2048;     // whose counts are kept in shared memory
constexpr float kLargestScore = 1e8f;  // of which no product with a mask is infinite

// Masks (B, Q, h, w) in elements; the last stride is 1.
struct Grid {
  const char* data;
  int64_t image_stride, query_stride;
  int row_stride, h, w;
};

struct Panoptic {
  Grid masks;
  const float* scores;  // (B, Q)
  float* cells;         // (B, Q, cells_height, cells_width)
  int cells_height, cells_width;
  float resize_y, resize_x;  // cells of the masks a cell of those
  int batch, queries, height, width;
  float step_y, step_x;  // cells a pixel
  float threshold;
  bool first, last, weighted;
  int blocks;  // for each image
  int16_t* map;
  uint8_t* inside;
  int* areas;  // (B, 3, Q), zeros
};

template <class T>
__global__ void __launch_bounds__(kThreads) panoptic_argmax_cells_kernel(const Panoptic a) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t area = static_cast<int64_t>(a.cells_height) * a.cells_width;
  int64_t mask = i / area;
  int image = static_cast<int>(mask / a.queries), q = static_cast<int>(mask % a.queries);
  if (image >= a.batch || !(a.scores[mask] >= 0)) return;
  int y = static_cast<int>(i % area / a.cells_width), x = static_cast<int>(i % area % a.cells_width);
  const T* from =
      reinterpret_cast<const T*>(a.masks.data) + image * a.masks.image_stride + q * a.masks.query_stride;
  Taps taps = taps_of(place_of(y, a.resize_y, a.masks.h), place_of(x, a.resize_x, a.masks.w),
                      a.masks.row_stride);
  float value = interpolate(from, taps, kHuge);
  a.cells[i] = a.first ? sigmoid(value) : value;
}

// Masks of type T: those given, or the cells.
template <class T>
__global__ void __launch_bounds__(kThreads) panoptic_argmax_kernel(const Panoptic a) {
  int* held = reinterpret_cast<int*>(shared_memory());  // won, above, kept
  int image = static_cast<int>(blockIdx.x) / a.blocks, lane = lane_index();
  int* areas = a.areas + static_cast<int64_t>(image) * 3 * a.queries;
  bool shared = a.queries <= kHeldQueries;
  int* counts = shared ? held : areas;
  if (shared) {
    for (int i = static_cast<int>(threadIdx.x); i < 3 * a.queries; i += kThreads) held[i] = 0;
    __syncthreads();
  }
  int columns = (a.width + kTileWidth - 1) / kTileWidth;
  int tiles = (a.height + kTileHeight - 1) / kTileHeight * columns;
  const float* scores = a.scores + static_cast<int64_t>(image) * a.queries;
  const T* masks = reinterpret_cast<const T*>(a.masks.data) + image * a.masks.image_stride;
  for (int tile = static_cast<int>(blockIdx.x) % a.blocks; tile < tiles; tile += a.blocks) {
    int y = tile / columns * kTileHeight + warp_index(), x = tile % columns * kTileWidth + lane;
    bool valid = y < a.height && x < a.width;
    Taps taps = taps_of(place_of(min(y, a.height - 1), a.step_y, a.masks.h),
                        place_of(min(x, a.width - 1), a.step_x, a.masks.w), a.masks.row_stride);
    float best = -__builtin_huge_valf();
    int query = -1;
    bool inside = false;
#pragma unroll 4
    for (int q = 0; q < a.queries; ++q) {
      float score = fminf(scores[q], kLargestScore);
      if (!(scores[q] >= 0)) continue;
      float value = interpolate(masks + q * a.masks.query_stride, taps, kHuge);
      if (a.last) value = sigmoid(value);
      float product = value * score;
      bool above = (a.weighted ? product : value) >= a.threshold;
      if (product > best) best = product, query = q, inside = above;
      unsigned many = __ballot_sync(kAllLanes, above && valid);
      if (many && lane == 0) atomicAdd(counts + a.queries + q, __popc(many));
    }
    if (!valid) continue;
    int64_t at = (static_cast<int64_t>(image) * a.height + y) * a.width + x;
    a.map[at] = static_cast<int16_t>(query);
    a.inside[at] = inside;
    if (query < 0) continue;
    atomicAdd(counts + query, 1);
    if (inside) atomicAdd(counts + 2 * a.queries + query, 1);
  }
  if (!shared) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 3 * a.queries; i += kThreads)
    if (held[i]) atomicAdd(areas + i, held[i]);
}

template <class T>
void run(const Panoptic& a, const Device& device) {
  size_t shared = a.queries <= kHeldQueries ? 3 * a.queries * sizeof(int) : 0;
  launch(panoptic_argmax_kernel<T>, static_cast<unsigned>(a.batch * a.blocks), kThreads, shared, device.stream,
         a);
}

template <class T>
void run_cells(const Panoptic& a, const Device& device) {
  int64_t cells = static_cast<int64_t>(a.batch) * a.queries * a.cells_height * a.cells_width;
  STD_TORCH_CHECK(cells < int64_t{1} << 38, "segvit: panoptic_argmax: the resized masks are too large");
  launch(panoptic_argmax_cells_kernel<T>, ceil_div(cells, kThreads), kThreads, 0, device.stream, a);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> panoptic_argmax(
    Tensor mask_logits, Tensor scores, int64_t height, int64_t width, int64_t resized_height,
    int64_t resized_width, int64_t crop_height, int64_t crop_width, bool first, bool last, double threshold,
    bool weighted) {
  Device device(scores);
  mask_logits = unit_stride(mask_logits);
  // Cells of a mask are found by 32 bits.
  if (mask_logits.size(2) * std::abs(mask_logits.stride(2)) >= int64_t{1} << 30)
    mask_logits = torch::stable::contiguous(mask_logits);
  int64_t batch = scores.size(0), queries = scores.size(1), h = mask_logits.size(2), w = mask_logits.size(3);
  STD_TORCH_CHECK(h * w < int64_t{1} << 31 && crop_height * crop_width < int64_t{1} << 31,
                  "segvit: panoptic_argmax: masks too large");
  STD_TORCH_CHECK(height * width < int64_t{1} << 31, "segvit: panoptic_argmax: the output is too large");
  Tensor map = empty(scores, {batch, height, width}, ScalarType::Short);
  Tensor inside = empty(scores, {batch, height, width}, ScalarType::Bool);
  Tensor areas = torch::stable::new_zeros(scores, {batch, 3, queries}, ScalarType::Int);
  if (!batch) return {map, inside, areas};
  scores = *as_float(scores);

  auto narrow = [](int64_t n) { return static_cast<int>(n); };
  Panoptic a{};
  a.masks = {data<char>(mask_logits),      mask_logits.stride(0), mask_logits.stride(1),
             narrow(mask_logits.stride(2)), narrow(h),             narrow(w)};
  a.scores = data<float>(scores);
  a.cells_height = narrow(crop_height), a.cells_width = narrow(crop_width);
  auto step = [](int64_t cells, int64_t size) { return static_cast<float>(cells) / static_cast<float>(size); };
  a.resize_y = step(h, resized_height), a.resize_x = step(w, resized_width);
  a.step_y = step(crop_height, height), a.step_x = step(crop_width, width);
  a.batch = narrow(batch), a.queries = narrow(queries);
  a.height = narrow(height), a.width = narrow(width);
  a.threshold = static_cast<float>(threshold);
  a.first = first, a.last = last, a.weighted = weighted;
  a.map = data<int16_t>(map), a.inside = data<uint8_t>(inside), a.areas = data<int>(areas);
  int64_t tiles = (height + kTileHeight - 1) / kTileHeight * ((width + kTileWidth - 1) / kTileWidth);
  a.blocks = narrow(std::max<int64_t>(1, std::min(tiles, int64_t{16} * device.multiprocessors())));

  Type type = type_of(mask_logits);
  Tensor cells;
  if (first || resized_height != h || resized_width != w) {
    cells = empty(scores, {batch, queries, crop_height, crop_width}, ScalarType::Float);
    a.cells = data<float>(cells);
    type == Type::f32 ? run_cells<float>(a, device)
    : type == Type::f16 ? run_cells<half>(a, device)
                        : run_cells<bf16>(a, device);
    a.masks = {data<char>(cells), queries * crop_height * crop_width, crop_height * crop_width,
               a.cells_width,     a.cells_height,                     a.cells_width};
    type = Type::f32;
  } else {
    a.masks.h = a.cells_height, a.masks.w = a.cells_width;
  }
  type == Type::f32 ? run<float>(a, device) : type == Type::f16 ? run<half>(a, device) : run<bf16>(a, device);
  return {map, inside, areas};
}

}  // namespace segvit::cuda
