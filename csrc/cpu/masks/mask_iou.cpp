// Mask IoU; what is computed stands in segvit_kernels/ops/mask_iou.py.
//
// One task is some rows of an image, how many follows from sizes alone. Counts are whole numbers and added from all
// tasks; soft sums are kept in double for every part and added in order, so that they do not depend on the threads.
#include "mask_iou.h"

#include <cmath>

#include "../../operators.h"
#include "../common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kMostParts = 32;  // of an image, of which each has sums of its own

IouMasks masks_of(const Tensor& tensor, bool resize, const AxisTable& y, const AxisTable& x) {
  IouMasks masks{};
  masks.data = data<char>(tensor);
  masks.boolean = tensor.scalar_type() == ScalarType::Bool;
  masks.type = masks.boolean ? Type::f32 : type_of(tensor);
  masks.image_stride = tensor.stride(0), masks.mask_stride = tensor.stride(1), masks.row_stride = tensor.stride(2);
  masks.count = tensor.size(1), masks.height = tensor.size(2), masks.width = tensor.size(3);
  masks.resize = resize, masks.y = y.view(), masks.x = x.view();
  return masks;
}

size_t lay_out(IouScratch& s, const MaskIou& args, char* memory) {
  Layout layout{memory};
  int64_t both = args.sides[0].count + args.sides[1].count;
  layout.take(s.line, round_up(std::max(args.sides[0].width, args.sides[1].width)) + 32);
  layout.take(s.values, args.soft ? both * kIouPixels : 0);
  layout.take(s.bits, args.soft ? 0 : both * kIouWords);
  return layout.bytes;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mask_iou(Tensor a, Tensor b, int64_t height, int64_t width, bool soft,
                                            double threshold) {
  a = unit_stride(a), b = unit_stride(b);
  int64_t batch = a.size(0), n = a.size(1), m = b.size(1), each = n * m + n + m;
  ScalarType type = soft ? ScalarType::Float : ScalarType::Int;
  Tensor pairs = torch::stable::new_zeros(a, {batch, n, m}, type);
  Tensor first = torch::stable::new_zeros(a, {batch, n}, type);
  Tensor second = torch::stable::new_zeros(a, {batch, m}, type);
  if (!batch || !(n + m)) return {pairs, first, second};

  auto resized = [&](const Tensor& t) { return t.size(2) != height || t.size(3) != width; };
  AxisTable ay(height, a.size(2)), ax(width, a.size(3)), by(height, b.size(2)), bx(width, b.size(3));
  MaskIou args{};
  args.sides[0] = masks_of(a, resized(a), ay, ax), args.sides[1] = masks_of(b, resized(b), by, bx);
  args.height = height, args.width = width, args.soft = soft;
  args.threshold = static_cast<float>(threshold);

  int64_t rows = (height + kMostParts - 1) / kMostParts, parts = (height + rows - 1) / rows;
  std::vector<double> sums(soft ? batch * parts * each : 0, 0.0);
  std::vector<int32_t> counts(soft ? 0 : batch * each, 0);
  IouScratch none{};
  size_t size = lay_out(none, args, nullptr);
  auto* kernel = SEGVIT_PICK(mask_iou);
  parallel(batch * parts, size, [&](int64_t task, char* memory) {
    IouScratch scratch{};
    lay_out(scratch, args, memory);
    int64_t image = task / parts, top = task % parts * rows;
    if (soft) scratch.sums = sums.data() + task * each;
    else scratch.counts = counts.data() + image * each;
    kernel(args, image, top, std::min(height, top + rows), scratch);
  });
  for (int64_t image = 0; image < batch; ++image) {
    auto put = [&](const auto& total, auto* to_pairs, auto* to_first, auto* to_second) {
      for (int64_t i = 0; i < n * m; ++i) to_pairs[image * n * m + i] = total(i);
      for (int64_t i = 0; i < n; ++i) to_first[image * n + i] = total(n * m + i);
      for (int64_t i = 0; i < m; ++i) to_second[image * m + i] = total(n * m + n + i);
    };
    if (soft)
      put([&](int64_t i) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part) total += sums[(image * parts + part) * each + i];
        return static_cast<float>(total);
      }, data<float>(pairs), data<float>(first), data<float>(second));
    else
      put([&](int64_t i) { return counts[image * each + i]; }, data<int32_t>(pairs), data<int32_t>(first),
          data<int32_t>(second));
  }
  return {pairs, first, second};
}

}  // namespace segvit::cpu
