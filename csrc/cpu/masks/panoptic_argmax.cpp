// Panoptic argmax; what is computed stands in segvit_kernels/ops/panoptic_argmax.py.
//
// One task is some rows of a part of the width. What it takes beside the results are two rows of cells of every
// query that takes part. Areas are whole numbers, whose sum does not depend on the order of the tasks.
#include "panoptic_argmax.h"

#include "../../operators.h"
#include "../common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kMostRows = 32, kLongest = 512, kTasksPerThread = 8;
constexpr int64_t kCellsHeld = 1 << 17;  // floats of scratch memory
constexpr float kLargestScore = 1e8f;    // of which no product with a mask is infinite

size_t lay_out(PanopticScratch& s, const PanopticArgmax& args, int64_t queries, char* memory) {
  Layout layout{memory};
  int64_t padded = round_up(queries);
  for (int slot = 0; slot < 2; ++slot) {
    layout.take(s.rows[slot], queries * args.stride);
    layout.take(s.most[slot], queries * args.stride / kPanopticCells);
  }
  layout.take(s.between, args.resize ? round_up(args.grid_width) + 16 : 0);
  for (float** array : {&s.bounds, &s.products, &s.scores}) layout.take(*array, padded);
  layout.take(s.counts, 3 * queries);
  return layout.bytes;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> panoptic_argmax(
    Tensor mask_logits, Tensor scores, int64_t height, int64_t width, int64_t resized_height,
    int64_t resized_width, int64_t crop_height, int64_t crop_width, bool first, bool last, double threshold,
    bool weighted) {
  mask_logits = unit_stride(mask_logits);
  int64_t batch = scores.size(0), all_queries = scores.size(1);
  Tensor queries = empty(scores, {batch, height, width}, ScalarType::Short);
  Tensor inside = empty(scores, {batch, height, width}, ScalarType::Bool);
  Tensor areas = torch::stable::new_zeros(scores, {batch, 3, all_queries}, ScalarType::Int);
  if (!batch) return {queries, inside, areas};

  Tensor given = *as_float(scores);
  std::vector<std::vector<int32_t>> index(batch);
  std::vector<std::vector<float>> values(batch);
  std::vector<PanopticQueries> images(batch);
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t q = 0; q < all_queries; ++q)
      if (float score = data<float>(given)[b * all_queries + q]; score >= 0) {
        index[b].push_back(static_cast<int32_t>(q));
        values[b].push_back(std::min(score, kLargestScore));
      }
    images[b] = {index[b].data(), values[b].data(), static_cast<int64_t>(index[b].size())};
    most = std::max(most, images[b].count);
  }

  PanopticArgmax args{};
  args.masks = data<char>(mask_logits), args.type = type_of(mask_logits);
  args.image_stride = mask_logits.stride(0), args.query_stride = mask_logits.stride(1);
  args.row_stride = mask_logits.stride(2);
  args.grid_height = mask_logits.size(2), args.grid_width = mask_logits.size(3);
  args.cells_height = crop_height, args.cells_width = crop_width;
  args.resize = resized_height != args.grid_height || resized_width != args.grid_width;
  AxisTable cells_y(resized_height, args.grid_height), cells_x(resized_width, args.grid_width);
  AxisTable y(height, crop_height), x(width, crop_width);
  args.cells_y = cells_y.view(), args.cells_x = cells_x.view(), args.y = y.view(), args.x = x.view();
  args.height = height, args.width = width;
  args.first = first, args.last = last, args.weighted = weighted;
  args.threshold = static_cast<float>(threshold);
  args.images = images.data(), args.all_queries = all_queries;
  args.queries = data<int16_t>(queries), args.inside = data<uint8_t>(inside), args.areas = data<int32_t>(areas);

  double step = static_cast<double>(crop_width) / static_cast<double>(width);
  auto cells_of = [&](int64_t pixels) {
    int64_t touched = static_cast<int64_t>(static_cast<double>(pixels - 1) * step) + 4;
    return round_up(std::min(touched, crop_width)) + 2 * kPanopticCells;
  };
  args.chunk = std::min(kLongest, round_up(width, kPanopticTile));
  while (args.chunk > kPanopticTile && 2 * most * cells_of(args.chunk) > kCellsHeld)
    args.chunk = round_up(args.chunk / 2, kPanopticTile);
  args.stride = cells_of(args.chunk);
  int64_t chunks = (width + args.chunk - 1) / args.chunk, rows = kMostRows;
  auto runs = [&] { return (height + rows - 1) / rows; };
  while (rows > 4 && batch * chunks * runs() < kTasksPerThread * torch::stable::get_num_threads()) rows /= 2;

  PanopticScratch none{};
  size_t size = lay_out(none, args, most, nullptr);
  auto* kernel = SEGVIT_PICK(panoptic_argmax);
  parallel(batch * runs() * chunks, size, [&](int64_t task, char* memory) {
    PanopticScratch scratch{};
    lay_out(scratch, args, most, memory);
    int64_t left = task % chunks * args.chunk, top = task / chunks % runs() * rows;
    kernel(args, task / chunks / runs(), top, std::min(height, top + rows), left,
           std::min(width, left + args.chunk), scratch);
  });
  return {queries, inside, areas};
}

}  // namespace segvit::cpu
