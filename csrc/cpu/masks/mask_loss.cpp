// Mask loss; what is computed stands in segvit_kernels/ops/mask_loss.py.
//
// One task is a strip of rows of an image with all its active pairs. Targets are read once a strip into a
// tile of int32 (labels) or float32 (a mask), 256 KB at most. Between two rows of the grid, a *band*, logits
// are linear in y: these rows are upsampled along x once and kept, and a register of 16 columns then goes
// down the band with one multiply-add a pixel row. One exponential and one reciprocal a pixel give both
// sigmoids, a polynomial the logarithm. The backward sums dx of a band into two rows in registers and applies
// the adjoint along x once a row.
//
// Everything is summed per strip and the strips in order: results do not depend on threads. Beside the
// results there are 32 bytes a strip and pair forward; backward the rows of the grid that each strip meets,
// about twice the active pairs' gradients.
//
// mask_matching_sums: one task is a block of queries. Targets of a piece of the image are cut into runs: rows
// of a register of columns with the same targets throughout. Maps are summed over a run and added to the
// run's targets; only registers that a target's border crosses are weighed. There is no product with zeros.
// Masks in bytes are looked through once for where they have pixels.
#include "mask_loss.h"

#include "../../operators.h"
#include "../common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kTilePixels = 1 << 16;

Target target_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return Target::u8;
    case ScalarType::Char:
      return Target::i8;
    case ScalarType::Short:
      return Target::i16;
    case ScalarType::Int:
      return Target::i32;
    case ScalarType::Long:
      return Target::i64;
    case ScalarType::Bool:
      return Target::boolean;
    case ScalarType::Float:
      return Target::f32;
    case ScalarType::Half:
      return Target::f16;
    case ScalarType::BFloat16:
      return Target::bf16;
    case ScalarType::Double:
      return Target::f64;
    default:
      STD_TORCH_CHECK(false, "segvit: mask_loss has no targets of this dtype");
  }
}

MaskTargets targets_of(const Tensor& tensor, int64_t count) {
  bool labels = tensor.dim() == 3;
  Target type = target_of(tensor.scalar_type());
  STD_TORCH_CHECK(labels == (type <= Target::i64), "segvit: labels are integers and masks are not");
  STD_TORCH_CHECK(labels || tensor.size(1) == count, "segvit: expected as many masks as num_classes says");
  int64_t rows = tensor.dim() - 2;
  return {static_cast<const char*>(tensor.data_ptr()),
          type,
          tensor.stride(0),
          labels ? 0 : tensor.stride(1),
          tensor.stride(rows),
          tensor.size(rows),
          tensor.size(rows + 1),
          count};
}

// Tables of bilinear interpolation along one axis, align_corners=False.
struct Axis {
  std::vector<int32_t> cell, first, begin;
  std::vector<float> weight, taps;
  int64_t source;

  Axis(int64_t source, int64_t size) : cell(round_up(size)), weight(round_up(size)), source(source) {
    double scale = static_cast<double>(source) / size;
    for (int64_t i = 0; i < round_up(size); ++i) {
      double position = std::clamp((std::min(i, size - 1) + 0.5) * scale - 0.5, 0.0, source - 1.0);
      cell[i] = static_cast<int32_t>(position);
      weight[i] = static_cast<float>(position - cell[i]);
    }
  }
  MaskAxis view() const { return {source, cell.data(), weight.data()}; }

  MaskAdjoint adjoint(int64_t size) {
    int64_t low = 0, high = 0;  // the columns made from cell c or the one before it
    for (int64_t c = 0; c < source; ++c) {
      while (low < size && cell[low] < c - 1) ++low;
      high = std::max(high, low);
      while (high < size && cell[high] <= c) ++high;
      first.push_back(static_cast<int32_t>(low));
      begin.push_back(static_cast<int32_t>(taps.size()));
      for (int64_t i = low; i < high; ++i) taps.push_back(cell[i] == c ? 1 - weight[i] : weight[i]);
      taps.resize(round_up(taps.size()), 0.0f);
    }
    begin.push_back(static_cast<int32_t>(taps.size()));
    return {first.data(), begin.data(), taps.data()};
  }
};

// The arguments that forward and backward share, and what they point to.
struct Problem {
  Tensor targets_tensor;
  MaskTargets targets;
  std::vector<Tensor> logits;
  std::vector<Axis> rows, columns;
  std::vector<MaskEntry> entries;
  std::vector<MaskPair> pairs;
  std::vector<int64_t> first_pair, pair_of;
  int64_t batch, queries, strip_rows, strips, grid_width = 0, grid_size = 0;

  Problem(std::vector<Tensor> mask_logits, const Tensor& given_targets, int64_t count)
      : targets_tensor(unit_stride(given_targets)), targets(targets_of(targets_tensor, count)) {
    batch = mask_logits[0].size(0);
    queries = mask_logits[0].size(1);
    STD_TORCH_CHECK(targets_tensor.size(0) == batch, "segvit: targets of another batch than mask_logits");
    strip_rows = std::clamp<int64_t>(kTilePixels / round_up(targets.width), 1, kMaskRows);
    strips = (targets.height + strip_rows - 1) / strip_rows;
    for (Tensor& tensor : mask_logits) {
      STD_TORCH_CHECK(tensor.size(0) == batch && tensor.size(1) == queries,
                      "segvit: shapes of mask_logits differ");
      const Tensor& x = logits.emplace_back(unit_stride(tensor));
      rows.emplace_back(x.size(2), targets.height);
      columns.emplace_back(x.size(3), targets.width);
      entries.push_back({static_cast<const char*>(x.data_ptr()), type_of(x), x.stride(0), x.stride(1),
                         x.stride(2), rows.back().view(), columns.back().view()});
      grid_width = std::max(grid_width, x.size(3));
      grid_size = std::max(grid_size, x.size(2) * x.size(3));
    }
  }

  bool labels() const { return targets_tensor.dim() == 3; }

  // area(image, target) is asked for labels only.
  template <class F>
  void find_pairs(const Optional& given_matches, const F& area) {
    Optional matches = given_matches;
    if (matches) matches = torch::stable::contiguous(*matches);
    const int64_t* match = data<int64_t>(matches);
    pair_of.assign(batch * queries, -1);
    for (int64_t b = 0; b < batch; ++b) {
      first_pair.push_back(pairs.size());
      for (int64_t q = 0; q < queries; ++q) {
        int64_t target = match ? match[b * queries + q] : q;
        if (target < 0 || target >= targets.count || (labels() && !(area(b, target) > 0))) continue;
        pair_of[b * queries + q] = pairs.size();
        pairs.push_back({static_cast<int32_t>(q), static_cast<int32_t>(target)});
      }
    }
    first_pair.push_back(pairs.size());
  }

  MaskLoss loss(double alpha, double gamma, bool mask_ignored) const {
    return {targets,
            entries.data(),
            static_cast<int64_t>(entries.size()),
            strip_rows,
            static_cast<int64_t>(pairs.size()),
            grid_width,
            pairs.data(),
            first_pair.data(),
            static_cast<float>(alpha),
            static_cast<float>(1 - alpha),
            static_cast<float>(gamma),
            mask_ignored};
  }

  // Of one task: the tile, five rows of the image and two of the grid, each with its padding.
  size_t scratch() const {
    int64_t width = round_up(targets.width);
    return (width * strip_rows + 5 * (width + 32) + 2 * (round_up(grid_width) + 32)) * sizeof(float);
  }
};

// (batch, count) in float32.
Tensor areas_of(const Tensor& like, const MaskTargets& targets, int64_t batch) {
  Tensor areas = empty(like, {batch, targets.count}, ScalarType::Float);
  float* out = data<float>(areas);
  size_t bytes = round_up(targets.width) * sizeof(float);
  if (targets.type > Target::i64) {
    auto* kernel = SEGVIT_PICK(mask_loss_area);
    parallel(batch * targets.count, [&](int64_t task) {
      Scratch scratch(bytes);
      kernel(targets, task / targets.count, task % targets.count, out + task, scratch.as<float>());
    });
    return areas;
  }
  std::vector<std::atomic<int64_t>> totals(batch * targets.count);
  auto* kernel = SEGVIT_PICK(mask_loss_count);
  int64_t rows = std::max<int64_t>(1, kTilePixels / 4 / targets.width),
          strips = (targets.height + rows - 1) / rows;
  parallel(batch * strips, [&](int64_t task) {
    int64_t image = task / strips, begin = task % strips * rows;
    Scratch scratch(bytes);
    std::vector<int32_t> counts(targets.count + 1);
    kernel(targets, image, begin, std::min(begin + rows, targets.height), counts.data() + 1,
           scratch.as<float>());
    for (int64_t c = 0; c < targets.count; ++c)
      if (counts[c + 1])
        totals[image * targets.count + c].fetch_add(counts[c + 1], std::memory_order_relaxed);
  });
  for (size_t i = 0; i < totals.size(); ++i) out[i] = static_cast<float>(totals[i].load());
  return areas;
}

}  // namespace

std::tuple<Tensor, Tensor> mask_loss_fwd(std::vector<Tensor> mask_logits, Tensor targets, Optional matches,
                                         int64_t num_classes, double focal_alpha, double focal_gamma,
                                         bool mask_ignored) {
  Problem problem(mask_logits, targets, num_classes);
  int64_t entries = problem.entries.size(), batch = problem.batch, queries = problem.queries;
  Tensor areas = areas_of(mask_logits[0], problem.targets, batch);
  problem.find_pairs(matches, [&](int64_t b, int64_t c) { return data<float>(areas)[b * num_classes + c]; });
  int64_t pairs = problem.pairs.size(), strips = problem.strips;
  std::vector<double> sums(strips * entries * pairs * 4);
  MaskLossFwd args{problem.loss(focal_alpha, focal_gamma, mask_ignored), sums.data()};
  auto* kernel = SEGVIT_PICK(mask_loss_fwd);
  parallel(pairs ? batch * strips : 0, [&](int64_t task) {
    Scratch scratch(problem.scratch());
    kernel(args, task / strips, task % strips, scratch.as<float>());
  });
  Tensor result = empty(mask_logits[0], {entries, batch, queries, 4}, ScalarType::Float);
  float* out = data<float>(result);
  for (int64_t i = 0; i < entries * batch * queries; ++i) {
    int64_t pair = problem.pair_of[i % (batch * queries)];
    double total[4] = {};
    for (int64_t strip = 0; pair >= 0 && strip < strips; ++strip)
      for (int k = 0; k < 4; ++k)
        total[k] += sums[((strip * entries + i / (batch * queries)) * pairs + pair) * 4 + k];
    for (int k = 0; k < 4; ++k) out[i * 4 + k] = static_cast<float>(total[k]);
  }
  return {result, areas};
}

std::vector<Tensor> mask_loss_bwd(Tensor grad_sums, std::vector<Tensor> mask_logits, Tensor targets,
                                  Optional matches, Tensor areas, int64_t num_classes, double focal_alpha,
                                  double focal_gamma, bool mask_ignored) {
  Problem problem(mask_logits, targets, num_classes);
  grad_sums = torch::stable::contiguous(grad_sums);
  areas = torch::stable::contiguous(areas);
  problem.find_pairs(matches, [&](int64_t b, int64_t c) { return data<float>(areas)[b * num_classes + c]; });
  int64_t batch = problem.batch, queries = problem.queries, strips = problem.strips;
  int64_t entries = problem.entries.size(), pairs = problem.pairs.size();

  std::vector<Tensor> results;
  std::vector<MaskGradient> gradients;
  std::vector<std::vector<int64_t>> first_cell(entries), first_row(entries);
  int64_t total = 0;  // floats of all strips' gradients
  for (int64_t l = 0; l < entries; ++l) {
    const Axis& axis = problem.rows[l];
    int64_t rows = 0;
    for (int64_t strip = 0; strip < strips; ++strip) {
      int64_t top = strip * problem.strip_rows;
      int64_t bottom = std::min(top + problem.strip_rows, problem.targets.height);
      first_cell[l].push_back(axis.cell[top]);
      first_row[l].push_back(rows);
      rows += std::min<int64_t>(axis.cell[bottom - 1] + 1, axis.source - 1) - axis.cell[top] + 1;
    }
    first_row[l].push_back(rows);
    results.push_back(empty(mask_logits[l], {batch, queries, axis.source, problem.columns[l].source}));
    gradients.push_back({problem.columns[l].adjoint(problem.targets.width), nullptr, first_cell[l].data(),
                         first_row[l].data(), rows, static_cast<char*>(results[l].data_ptr())});
    total += pairs * rows * problem.columns[l].source;
  }
  Scratch grads(total * sizeof(float));
  float* next = grads.as<float>();
  for (int64_t l = 0; l < entries; ++l) {
    gradients[l].grads = next;
    next += pairs * gradients[l].rows * problem.columns[l].source;
  }

  MaskLossBwd args{problem.loss(focal_alpha, focal_gamma, mask_ignored),
                   data<float>(grad_sums),
                   batch,
                   queries,
                   gradients.data(),
                   problem.pair_of.data()};
  auto* kernel = SEGVIT_PICK(mask_loss_bwd);
  parallel(pairs ? batch * strips : 0, [&](int64_t task) {
    Scratch scratch(problem.scratch());
    kernel(args, task / strips, task % strips, scratch.as<float>());
  });
  auto* sum = SEGVIT_PICK(mask_loss_bwd_sum);
  constexpr int64_t kGroup = 16;
  int64_t groups = (batch * queries + kGroup - 1) / kGroup;
  parallel(entries * groups, [&](int64_t task) {
    int64_t begin = task % groups * kGroup, end = std::min(begin + kGroup, batch * queries);
    Scratch scratch(problem.grid_size * sizeof(float));
    sum(args, task / groups, begin, end, strips, scratch.as<float>());
  });
  return results;
}

namespace {

// MaskMatching::occurs of masks that are kept in bytes: every task would look for its targets in all of them.
std::vector<char> occurrences(const MaskTargets& targets, int64_t batch) {
  if (targets.type != Target::boolean) return {};
  int64_t pieces = (targets.width + kMaskPiece - 1) / kMaskPiece, each = targets.height * pieces;
  std::vector<char> found(batch * targets.count * each);
  parallel(batch * targets.count, [&](int64_t task) {
    const char* row = targets.data + task / targets.count * targets.image_stride +
                      task % targets.count * targets.mask_stride;
    char* out = found.data() + task * each;
    for (int64_t y = 0; y < targets.height; ++y, row += targets.row_stride) {
      for (int64_t left = 0; left < targets.width; left += kMaskPiece) {
        char any = 0;
        for (int64_t i = left; i < std::min(left + kMaskPiece, targets.width); ++i) any |= row[i];
        *out++ = any;
      }
    }
  });
  return found;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mask_matching_sums(Tensor mask_logits, Tensor targets, int64_t num_classes,
                                                      double focal_alpha, double focal_gamma) {
  Problem problem({mask_logits}, targets, num_classes);
  int64_t batch = problem.batch, queries = problem.queries, width = round_up(problem.targets.width);
  Tensor areas = areas_of(mask_logits, problem.targets, batch);
  Tensor products = empty(mask_logits, {3, batch, queries, num_classes}, ScalarType::Float);
  Tensor totals = empty(mask_logits, {3, batch, queries}, ScalarType::Float);
  // A register of 16 labels has 16 classes at most.
  int64_t depth = std::max<int64_t>(1, problem.labels() ? std::min<int64_t>(16, num_classes) : num_classes);
  // Rows between two of the grid have the same logits above and below: a piece ends with them.
  int64_t band = (problem.targets.height + problem.entries[0].rows.source - 1) / problem.entries[0].rows.source;
  int64_t pixels = kTilePixels / depth, rows = std::clamp<int64_t>(std::min(pixels / 16, band), 1, 16);
  int64_t columns = std::clamp<int64_t>(pixels / rows / 16 * 16, 16, width);
  std::vector<char> occurs = occurrences(problem.targets, batch);
  MaskMatching args{problem.targets,
                    problem.entries[0],
                    batch,
                    queries,
                    static_cast<float>(focal_alpha),
                    static_cast<float>(1 - focal_alpha),
                    static_cast<float>(focal_gamma),
                    rows,
                    columns,
                    depth,
                    occurs.empty() ? nullptr : occurs.data(),
                    data<float>(products),
                    data<float>(totals)};
  int64_t block = std::clamp<int64_t>((queries + 7) / 8, 4, 16), blocks = (queries + block - 1) / block;
  pixels = rows * columns;
  size_t bytes = 3 * block * (num_classes + 1) * sizeof(double) + 3 * num_classes * sizeof(int32_t) +
                 pixels / 4 * (20 + 16 * depth) + 4 * pixels * (depth + 1) +
                 4 * (3 * 16 * (problem.labels() ? std::min(num_classes, pixels) : num_classes) + 2 * width +
                      columns + 2 * (problem.grid_width + 32)) +
                 17 * 64;
  auto* kernel = SEGVIT_PICK(mask_matching);
  parallel(batch * blocks, [&](int64_t task) {
    int64_t begin = task % blocks * block;
    Scratch scratch(bytes);
    kernel(args, task / blocks, begin, std::min(begin + block, queries), scratch.as<char>());
  });
  return {products, totals, areas};
}

}  // namespace segvit::cpu
