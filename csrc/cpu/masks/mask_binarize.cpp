// Binary masks; what is computed stands in segvit_kernels/ops/mask_binarize.py.
//
// One task is a strip of rows of one mask. Beside the results there are two rows of the output and 32 rows of bits a task.
#include "mask_binarize.h"

#include <cmath>
#include <limits>
#include <string>

#include "../../operators.h"
#include "../common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kStrip = 256;  // rows of a task
constexpr int32_t kNone = std::numeric_limits<int32_t>::max();

// Tables of one axis; without a box the grid is stretched over the whole of it.
struct Axis {
  std::vector<int32_t> cell;
  std::vector<float> weight;
  int64_t cells, size, first = 0, last = 0;

  Axis(int64_t cells, int64_t size) : cells(cells), size(size) { fill(0, static_cast<double>(size)), last = size; }
  Axis(int64_t cells, int64_t size, float low, float high) : cells(cells), size(size) {
    float extent = high - low;
    if (!(extent > 0 && std::isfinite(extent))) return;
    // Pixels whose centre lies in [low, high).
    auto reach = [&](double edge) {
      return static_cast<int64_t>(std::clamp(std::ceil(edge - 0.5), 0.0, static_cast<double>(size)));
    };
    first = reach(low), last = reach(high);
    if (first < last) fill(low, static_cast<double>(high) - low);
  }

  void fill(double low, double extent) {
    int64_t padded = round_up(size, kBinaryBlock);
    cell.resize(padded), weight.resize(padded);
    double scale = cells / extent;
    for (int64_t i = 0; i < padded; ++i) {
      double place = std::clamp((std::min(i, size - 1) + 0.5 - low) * scale - 0.5, 0.0, cells - 1.0);
      cell[i] = static_cast<int32_t>(place);
      weight[i] = static_cast<float>(place - cell[i]);
    }
  }
  BinaryAxis view() const { return {cell.data(), weight.data(), cells, size, first, last}; }
};

size_t lay_out(BinaryScratch& s, int64_t h, int64_t w, int64_t width, char* memory) {
  Layout layout{memory};
  int64_t blocks = (width + kBinaryBlock - 1) / kBinaryBlock;
  layout.take(s.cells, w + 2 * kBinaryBlock);
  layout.take(s.upper, blocks * kBinaryBlock);
  layout.take(s.lower, blocks * kBinaryBlock);
  layout.take(s.spans, 2 * h);
  layout.take(s.tile, blocks * kBinaryRows);
  return layout.bytes;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mask_binarize(Tensor mask_logits, Optional boxes, int64_t height, int64_t width,
                                                 double threshold, int64_t layout) {
  STD_TORCH_CHECK(0 <= layout && layout <= 2, "mask_binarize: layout is 0, 1 or 2");
  mask_logits = unit_stride(mask_logits);
  boxes = in_one_piece(boxes);
  int64_t batch = mask_logits.size(0), count = mask_logits.size(1), h = mask_logits.size(2), w = mask_logits.size(3);
  bool pixels = layout == 0;
  int64_t outer = layout == 2 ? width : height, inner = layout == 2 ? height : width;
  if (!pixels) inner = (inner + 31) / 32;
  Tensor masks = empty(mask_logits, {batch, count, outer, inner}, pixels ? ScalarType::Bool : ScalarType::Int);
  Tensor areas = empty(mask_logits, {batch, count}, ScalarType::Int);
  Tensor tight = empty(mask_logits, {batch, count, 4}, ScalarType::Int);
  if (!batch || !count) return {masks, areas, tight};

  BinaryMask shared{};
  shared.type = type_of(mask_logits), shared.row_stride = mask_logits.stride(2);
  shared.threshold = static_cast<float>(threshold), shared.layout = static_cast<BinaryLayout>(layout);
  const char* logits = data<char>(mask_logits);
  char* out = static_cast<char*>(masks.data_ptr());
  const float* box = data<float>(boxes);
  int64_t bytes = outer * inner * (pixels ? 1 : 4), strips = (height + kStrip - 1) / kStrip;
  const Axis whole_y(h, height), whole_x(w, width);
  std::vector<BinaryStats> stats(batch * count * strips, BinaryStats{0, kNone, kNone, 0, 0});
  auto* kernel = SEGVIT_PICK(mask_binarize);
  BinaryScratch none{};
  size_t scratch_bytes = lay_out(none, h, w, width, nullptr);
  parallel(batch * count * strips, scratch_bytes, [&](int64_t task, char* memory) {
    int64_t index = task / strips, y0 = task % strips * kStrip;
    BinaryMask mask = shared;
    mask.logits = logits + (index / count * mask_logits.stride(0) + index % count * mask_logits.stride(1)) *
                               size_of(shared.type);
    mask.out = out + index * bytes;
    BinaryScratch scratch{};
    lay_out(scratch, h, w, width, memory);
    auto run = [&](const Axis& y, const Axis& x) {
      mask.y = y.view(), mask.x = x.view();
      kernel(mask, y0, std::min(y0 + kStrip, height), scratch, stats[task]);
    };
    if (box) {
      const float* b = box + index * 4;
      Axis y(h, height, b[1], b[3]), x(w, width, b[0], b[2]);
      if (x.first >= x.last) y.first = y.last = 0;
      run(y, x);
    } else {
      run(whole_y, whole_x);
    }
  });
  int32_t *area = data<int32_t>(areas), *ends = data<int32_t>(tight);
  for (int64_t i = 0; i < batch * count; ++i) {
    BinaryStats sum{0, kNone, kNone, 0, 0};
    for (int64_t strip = 0; strip < strips; ++strip) {
      const BinaryStats& one = stats[i * strips + strip];
      sum.area += one.area;
      sum.left = std::min(sum.left, one.left), sum.top = std::min(sum.top, one.top);
      sum.right = std::max(sum.right, one.right), sum.bottom = std::max(sum.bottom, one.bottom);
    }
    if (!sum.area) sum.left = sum.top = 0;
    area[i] = sum.area;
    ends[4 * i] = sum.left, ends[4 * i + 1] = sum.top, ends[4 * i + 2] = sum.right, ends[4 * i + 3] = sum.bottom;
  }
  return {masks, areas, tight};
}

namespace {

// Appends a run as COCO writes it: digits of five bits, the lowest first, a sixth for whether more follow.
void write_run(std::string& text, int64_t rest) {
  for (bool more = true; more;) {
    int64_t digit = rest & 31;
    rest >>= 5;
    more = rest != (digit & 16 ? -1 : 0);
    text.push_back(static_cast<char>(digit + 32 * more + 48));
  }
}

// One mask of words along columns.
void encode(const uint32_t* words, int64_t width, int64_t height, std::string& text) {
  int64_t each = (height + 31) / 32, from = 0, before[2] = {0, 0}, runs = 0;
  uint32_t last = 0;  // the pixel before, in every bit
  auto end_run = [&](int64_t at) {
    int64_t run = at - from;
    write_run(text, runs > 2 ? run - before[runs % 2] : run);
    before[runs % 2] = run, from = at, ++runs;
  };
  for (int64_t x = 0; x < width; ++x)
    for (int64_t j = 0; j < each; ++j) {
      uint32_t word = words[x * each + j], valid = static_cast<uint32_t>(std::min<int64_t>(32, height - 32 * j));
      uint32_t inside = valid < 32 ? (1u << valid) - 1 : ~0u;
      if (((word ^ last) & inside) == 0) continue;
      uint32_t changes = (word ^ (word << 1 | (last & 1))) & inside;
      for (; changes; changes &= changes - 1) end_run(x * height + 32 * j + __builtin_ctz(changes));
      last = word >> (valid - 1) & 1 ? ~0u : 0;
    }
  end_run(width * height);
}

}  // namespace

std::tuple<Tensor, Tensor> mask_rle(Tensor columns, int64_t height) {
  columns = torch::stable::contiguous(columns);
  int64_t count = columns.size(0), width = columns.size(1), words = columns.size(2);
  STD_TORCH_CHECK(words == (height + 31) / 32, "mask_rle: words of another height");
  std::vector<std::string> texts(count);
  const uint32_t* first = data<uint32_t>(columns);
  parallel(count, [&](int64_t i) { encode(first + i * width * words, width, height, texts[i]); });
  Tensor ends = empty(columns, {count}, ScalarType::Long);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) data<int64_t>(ends)[i] = total += texts[i].size();
  Tensor text = empty(columns, {total}, ScalarType::Byte);
  char* out = data<char>(text);
  for (const std::string& one : texts) out = std::copy(one.begin(), one.end(), out);
  return {text, ends};
}

}  // namespace segvit::cpu
