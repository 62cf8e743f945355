// Semantic argmax; what is computed stands in segvit_kernels/ops/semantic_argmax.py.
//
// Class probabilities are brought into the order and the formats of the kernels once per view, which takes
// little more memory than they have. One task is a few rows of a part of the width.
#include "semantic_argmax.h"

#include <cmath>
#include <memory>
#include <numeric>

#include "../../operators.h"
#include "../common.h"

namespace segvit::cpu {

namespace {

constexpr int64_t kRowsPerTask = 8, kLongest = 512;
constexpr int64_t kCellsHeld = 1 << 17, kScoresHeld = 1 << 17;  // floats of scratch memory
constexpr int64_t kTurn = 1024;       // classes whose scores are held at a time
constexpr int64_t kMostBytes = 1024;  // queries and classes that are bounded in 8 bits
constexpr int32_t kMany = 32;         // queries from which a head is looked for
constexpr double kFew = 0.25;         // of the largest probability: seldom decides
constexpr double kRounding = 2e-5;    // of sums of a thousand float32 terms, relative
constexpr double kSmallest = 1.5e-45; // of float32

// Class probabilities of one view as its kernels read them.
class Mixing {
 public:
  // `probs`: (queries, classes).
  void prepare(const float* probs, int64_t queries, int64_t classes, double prune, bool sigmoid) {
    classes_ = classes;
    std::vector<double> mass(queries);
    bounded_ = sigmoid;
    for (int64_t q = 0; q < queries; ++q) {
      const float* p = probs + q * classes;
      bool good = true;
      for (int64_t c = 0; c < classes; ++c) {
        mass[q] += p[c];
        good &= p[c] >= 0;
        largest = std::max(largest, p[c]);
      }
      bounded_ = bounded_ && good && mass[q] < 1e30;
    }
    order.reserve(queries);
    for (int64_t q = 0; q < queries; ++q)
      if (prune <= 0 || !(static_cast<float>(mass[q]) < prune)) order.push_back(static_cast<int32_t>(q));
    if (bounded_)
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return mass[a] > mass[b]; });
    stride = round_up(std::max<int64_t>(1, order.size()));
    rows_.reset(new float[classes * stride]);
    for (size_t i = 0; i < order.size(); ++i)
      for (int64_t c = 0; c < classes; ++c) rows_[c * stride + i] = probs[order[i] * classes + c];
  }

  // Intervals around 8-bit scores. With p = step·k + r and 255 σ = σ8 + d, |d| ≤ 1/2, it is
  // 255 Σ p σ = step Σ k σ8 + Σ r σ8 + Σ p d: the last sum is at most half the class mass, the one before
  // lies between 255 times the sums of the negative and of the positive r. k is the nearest integer: r is small.
  void pack(int32_t largest_k) {
    if (!bounded_ || order.empty()) return;
    int64_t groups = (classes_ + kArgmaxClasses - 1) / kArgmaxClasses, quads = (queries() + 3) / 4;
    int64_t padded = groups * kArgmaxClasses;
    values_.assign(padded * quads * 4, 0);
    bias_.assign(padded, 0);
    ends_.assign(3 * padded, 0);
    float *scale = ends_.data(), *low = scale + padded, *width = low + padded;
    std::fill(low + classes_, low + padded, -INFINITY);
    for (int64_t c = 0; c < classes_; ++c) {
      const float* p = rows_.get() + c * stride;
      float most = *std::max_element(p, p + queries());
      double step = static_cast<double>(most) / largest_k, mass = 0, below = 0, above = 0;
      int64_t group = c / kArgmaxClasses, row = c % kArgmaxClasses;
      uint8_t* values = values_.data() + (group * quads * kArgmaxClasses + row) * 4;
      for (int64_t q = 0; q < queries(); ++q) {
        int32_t k = step > 0 ? static_cast<int32_t>(p[q] / step + 0.5) : 0;
        k = std::min(k, largest_k);
        double r = p[q] - step * k;
        (r < 0 ? below : above) += r;
        mass += p[q];
        values[q / 4 * kArgmaxClasses * 4 + q % 4] = static_cast<uint8_t>(k);
        bias_[c] += 128 * k;
      }
      double error = mass * (0.5 / 255 + kRounding) + kSmallest * 255 * 255 * queries();
      scale[c] = static_cast<float>(step / 255);
      low[c] = static_cast<float>(below - error);
      width[c] = static_cast<float>(above - below + 2 * error);
    }
  }

  int32_t queries() const { return static_cast<int32_t>(order.size()); }
  const float* row(int64_t c) const { return rows_.get() + c * stride; }
  bool bounded() const { return bounded_; }
  void show(SemanticView& view) const {
    view.queries = queries(), view.order = order.data(), view.probs = rows_.get(), view.probs_stride = stride;
    if (bias_.empty()) return;
    const float* ends = ends_.data();
    view.bytes = {values_.data(), bias_.data(), ends, ends + bias_.size(), ends + 2 * bias_.size()};
  }

  std::vector<int32_t> order;
  int64_t stride = 0;
  float largest = 0;

 private:
  int64_t classes_ = 0;
  bool bounded_ = false;  // probabilities times σ: scores have bounds
  std::unique_ptr<float[]> rows_;
  std::vector<uint8_t> values_;
  std::vector<int32_t> bias_;
  std::vector<float> ends_;  // scale, low, width
};

struct Head {
  std::vector<int32_t> index;
  std::vector<float> rest;
};

// The few tokens and classes that have nearly all class mass, as in `_head` of the eager backend.
SemanticHead find_head(const Mixing* mixings, int64_t count, int64_t classes, Head& head) {
  int32_t queries = 0;
  float largest = 0;
  for (int64_t v = 0; v < count; ++v) {
    if (!mixings[v].bounded()) return {};
    queries = std::max(queries, mixings[v].queries());
    largest = std::max(largest, mixings[v].largest);
  }
  if (queries < kMany) return {};
  // tail[c][k]: class mass of the tokens from the k-th on, in the view where it is largest.
  std::vector<float> tail(classes * (queries + 1), 0.0f);
  double few = kFew * largest;
  int32_t keep = 0;
  for (int64_t c = 0; c < classes; ++c) {
    float* of_class = tail.data() + c * (queries + 1);
    for (int64_t v = 0; v < count; ++v) {
      double sum = 0;
      for (int32_t k = mixings[v].queries(); k-- > 0;) {
        sum += mixings[v].row(c)[k];
        of_class[k] = std::max(of_class[k], static_cast<float>(sum * (1 + kRounding)));
      }
    }
    while (keep < queries && of_class[keep] > few) ++keep;
  }
  if (2 * keep > queries || !keep) return {};
  float outside = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const float* of_class = tail.data() + c * (queries + 1);
    if (of_class[0] > few) {
      head.index.push_back(static_cast<int32_t>(c));
      head.rest.push_back(of_class[keep]);
    } else {
      outside = std::max(outside, of_class[0]);
    }
  }
  return {keep, static_cast<int32_t>(head.index.size()), head.index.data(), head.rest.data(), outside};
}

size_t lay_out(SemanticScratch& s, const SemanticArgmax& args, int64_t queries, char* memory) {
  Layout layout{memory};
  int64_t held = round_up(queries, 4), classes = round_up(args.classes, kArgmaxClasses);
  layout.take(s.rows, held * args.rows_stride);
  layout.take(s.sigma, held * kArgmaxTile);
  layout.take(s.bytes, held * kArgmaxTile);
  layout.take(s.scores, std::max(std::min(classes, args.turn) * args.chunk,
                                 std::min(classes, kMostBytes + kArgmaxClasses) * kArgmaxTile));
  layout.take(s.upper, classes * kArgmaxTile);
  for (float** array : {&s.fractions, &s.some_fractions, &s.weights, &s.some_weights, &s.groups, &s.members,
                        &s.best, &s.totals})
    layout.take(*array, args.chunk);
  layout.take(s.best_scores, args.best * args.chunk);
  layout.take(s.best_labels, args.best * args.chunk);
  for (int32_t** array : {&s.taps, &s.some_taps, &s.labels, &s.open, &s.open_labels})
    layout.take(*array, args.chunk);
  layout.take(s.list, classes + 1);
  return layout.bytes;
}

// Labels and scores, or with `best` so many classes and probabilities of every pixel.
std::tuple<Tensor, Tensor> run(std::vector<Tensor>& mask_logits, const Tensor& class_probs,
                               std::vector<Tensor>& views, int64_t batch, int64_t height, int64_t width,
                               bool sigmoid, bool need_scores, int64_t best, double prune) {
  int64_t queries = class_probs.size(1), classes = class_probs.size(2);
  bool wide = classes > 256;
  std::vector<int64_t> shape{batch, height, width}, none{0};
  if (best) shape.insert(shape.begin() + 1, best);
  Tensor labels = empty(class_probs, shape, wide ? ScalarType::Short : ScalarType::Byte);
  Tensor scores = empty(class_probs, need_scores ? shape : none, ScalarType::Float);
  if (!batch) return {labels, scores};

  int64_t count = class_probs.size(0);
  Tensor probs = *as_float(class_probs);
  std::vector<SemanticView> given;
  for (Tensor& stack : mask_logits) {
    stack = unit_stride(stack);
    for (int64_t i = 0; i < stack.size(0); ++i) {
      SemanticView view{};
      view.height = static_cast<int32_t>(stack.size(2)), view.width = static_cast<int32_t>(stack.size(3));
      view.mask = data<char>(stack) + i * stack.stride(0) * size_of(type_of(stack));
      view.query_stride = stack.stride(1), view.row_stride = stack.stride(2);
      given.push_back(view);
    }
  }
  STD_TORCH_CHECK(static_cast<int64_t>(given.size()) == count,
                  "semantic_argmax: one class_probs entry per mask");

  // Views of an image one after the other, and what they cover.
  std::vector<SemanticView> sorted(count);
  std::vector<int64_t> source(count), starts(batch + 1);
  if (views.empty()) {
    STD_TORCH_CHECK(count == batch, "semantic_argmax: one mask per image where there are no views");
    std::iota(starts.begin(), starts.end(), 0);
    for (int64_t i = 0; i < count; ++i) {
      SemanticView view = given[i];
      double y = static_cast<double>(view.height) / height, x = static_cast<double>(view.width) / width;
      double affine[] = {y, (y - 1) / 2, x, (x - 1) / 2};
      std::copy(affine, affine + 4, view.affine);
      view.bottom = static_cast<int32_t>(height), view.right = static_cast<int32_t>(width);
      sorted[i] = view, source[i] = i;
    }
  } else {
    for (Tensor& tensor : views) tensor = torch::stable::contiguous(tensor);
    STD_TORCH_CHECK(views[0].size(0) == batch + 1 && views[1].size(0) == count && views[2].size(0) == count,
                    "semantic_argmax: views are of another batch or count");
    const int32_t *first = data<int32_t>(views[0]), *layout = data<int32_t>(views[1]);
    const float* affine = data<float>(views[2]);
    std::copy(first, first + batch + 1, starts.begin());
    for (int64_t i = 0; i < count; ++i, layout += 7, affine += 4) {
      STD_TORCH_CHECK(0 <= layout[0] && layout[0] < count, "semantic_argmax: a view of no mask");
      SemanticView view = given[layout[0]];
      view.group = layout[1];
      view.top = layout[3], view.left = layout[4], view.bottom = layout[5], view.right = layout[6];
      std::copy(affine, affine + 4, view.affine);
      sorted[i] = view, source[i] = layout[0];
    }
  }

  SemanticArgmax args{};
  args.type = type_of(mask_logits[0]);
  args.height = height, args.width = width, args.classes = classes;
  args.sigmoid = sigmoid, args.wide = wide;
  args.labels = data<char>(labels);
  args.scores = need_scores ? data<float>(scores) : nullptr;
  args.best = best;
  args.turn = std::min(classes, kTurn);
  auto cells_of = [&](int64_t pixels) {
    double most = 0;
    for (const SemanticView& view : sorted)
      most = std::max(most, std::min((pixels - 1) * std::fabs(view.affine[2]) + 2, double(view.width)));
    return round_up(static_cast<int64_t>(most) + 1, 32) + 16;
  };
  bool bytes = isa() >= Isa::avx2 && sigmoid && !best && std::max(queries, classes) <= kMostBytes;
  args.chunk = std::min(kLongest, round_up(width, kArgmaxTile));
  auto too_much = [&](int64_t held) {
    return held * cells_of(args.chunk) > kCellsHeld || (args.turn + best) * args.chunk > kScoresHeld;
  };
  while (args.chunk > kArgmaxTile && too_much(bytes ? queries : kArgmaxBlock))
    args.chunk = round_up(args.chunk / 2, kArgmaxTile);
  bytes = bytes && queries * cells_of(args.chunk) <= 2 * kCellsHeld;
  args.rows_stride = cells_of(args.chunk);

  std::vector<Mixing> mixings(count);
  parallel(count, [&](int64_t i) {
    mixings[i].prepare(data<float>(probs) + source[i] * queries * classes, queries, classes, prune, sigmoid);
    if (bytes) mixings[i].pack(isa() >= Isa::avx512 ? 255 : 127);
    mixings[i].show(sorted[i]);
  });
  std::vector<SemanticImage> images(batch);
  std::vector<Head> heads(batch);
  parallel(batch, [&](int64_t b) {
    int64_t first = starts[b], views_of = starts[b + 1] - first;
    images[b] = {sorted.data() + first, views_of, {}};
    if (!sigmoid || need_scores) return;
    images[b].head = find_head(mixings.data() + first, views_of, classes, heads[b]);
  });
  args.images = images.data();

  int64_t held = bytes ? std::max<int64_t>(queries, kArgmaxBlock) : kArgmaxBlock;
  SemanticScratch unplaced{};
  size_t size = lay_out(unplaced, args, held, nullptr);
  int64_t chunks = (width + args.chunk - 1) / args.chunk, runs = (height + kRowsPerTask - 1) / kRowsPerTask;
  auto* kernel = SEGVIT_PICK(semantic_argmax);
  parallel(batch * runs * chunks, size, [&](int64_t task, char* memory) {
    SemanticScratch scratch{};
    lay_out(scratch, args, held, memory);
    int64_t x = task % chunks * args.chunk, y = task / chunks % runs * kRowsPerTask;
    kernel(args, task / chunks / runs, y, std::min(height, y + kRowsPerTask), x,
           std::min(width, x + args.chunk), scratch);
  });
  return {labels, scores};
}

}  // namespace

std::tuple<Tensor, Tensor> semantic_argmax(
    std::vector<Tensor> mask_logits, Tensor class_probs, std::vector<Tensor> views, int64_t batch,
    int64_t height, int64_t width, std::vector<double>, bool sigmoid, bool need_scores, double prune) {
  return run(mask_logits, class_probs, views, batch, height, width, sigmoid, need_scores, 0, prune);
}

std::tuple<Tensor, Tensor> semantic_topk(
    std::vector<Tensor> mask_logits, Tensor class_probs, std::vector<Tensor> views, int64_t batch,
    int64_t height, int64_t width, std::vector<double>, bool sigmoid, int64_t k, double prune) {
  STD_TORCH_CHECK(0 < k && k <= class_probs.size(2), "semantic_topk: k is not 1 to the number of classes");
  return run(mask_logits, class_probs, views, batch, height, width, sigmoid, true, k, prune);
}

}  // namespace segvit::cpu
