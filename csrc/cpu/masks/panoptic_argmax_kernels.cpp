// Panoptic argmax of a part of some rows, 64 pixels at a time.
//
// Rows of cells, the last grid before the output, are held for two rows at a time: σ is taken there if it comes
// first, once per cell in place of once per pixel. For every 16 cells the largest value is kept, which bounds every
// pixel between them. The query with the largest bound over a tile is computed first; another one whose bound
// neither reaches the least of the best products of the tile nor the threshold changes nothing, and is passed over.
// Trained masks are near zero nearly everywhere, so that most are.
#include "panoptic_argmax.h"

#include "pixels.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kTile = kPanopticTile, kCells = kPanopticCells, kVectors = kTile / kWidth;
constexpr float kSlack = 4e-6f;  // covers the rounding of an interpolation and of σ, relative

struct Work {
  const PanopticArgmax& args;
  const PanopticScratch& scratch;
  const PanopticQueries& queries;
  int64_t image, first_cell, cells;  // of a row
  int64_t held[2];                   // which rows the scratch memory holds
};

SEGVIT_INLINE int32_t count_of(IVec mask) { return __builtin_popcount(bits_of(mask)); }

SEGVIT_INLINE float smallest(Vec v) { return -largest(-v); }

SEGVIT_INLINE Vec between(Vec a, Vec b, Vec share) { return a + share * (b - a); }

template <class T>
SEGVIT_INLINE Vec cells_at(const T* row, int64_t i, int64_t count) {
  return finite(load_up_to(row + i, count - i));
}

// A row of cells of one mask, as they are or between two rows of it and along them.
template <class T>
SEGVIT_INLINE void fill_row(const Work& work, const T* mask, int64_t y, float* row) {
  const PanopticArgmax& args = work.args;
  int64_t count = work.cells;
  auto put = [&](int64_t i, Vec v) { store(row + i, args.first ? sigmoid(v) : v); };
  if (!args.resize) {
    const T* from = mask + y * args.row_stride + work.first_cell;
    for (int64_t i = 0; i < count; i += kWidth) put(i, cells_at(from, i, count));
  } else {
    const int32_t* cells = args.cells_x.cells + work.first_cell;
    const float* shares = args.cells_x.shares + work.first_cell;
    int64_t first = cells[0], end = min_of<int64_t>(cells[count - 1] + 2, args.grid_width);
    int64_t upper = args.cells_y.cells[y], lower = min_of<int64_t>(upper + 1, args.grid_height - 1);
    Vec share = splat(args.cells_y.shares[y]);
    const T *above = mask + upper * args.row_stride + first, *below = mask + lower * args.row_stride + first;
    float* line = work.scratch.between;
    for (int64_t i = 0; i < end - first; i += kWidth)
      store(line + i, between(cells_at(above, i, end - first), cells_at(below, i, end - first), share));
    line[end - first] = line[end - first - 1];
    for (int64_t i = 0; i < count; i += kWidth) {
      IVec left = load_ints(cells + i) - (int32_t)first;
      put(i, between(gather(line, left), gather(line, left + 1), load(shares + i)));
    }
  }
  // Whole registers of cells are read; past the last one numbers do not matter, but subnormal ones take long.
  Vec end = splat(row[count - 1]);
  for (int64_t i = 0; i < 2 * kCells; i += kWidth) store(row + count + i, end);
}

// Row y of the cells of all masks.
void hold(Work& work, int64_t y) {
  const PanopticArgmax& args = work.args;
  int64_t slot = y % 2;
  if (work.held[slot] == y) return;
  work.held[slot] = y;
  int64_t blocks = (work.cells + kCells - 1) / kCells;
  auto all = [&]<class T>(const T* masks) {
    for (int64_t i = 0; i < work.queries.count; ++i) {
      float* row = work.scratch.rows[slot] + i * args.stride;
      float* most = work.scratch.most[slot] + i * (args.stride / kCells);
      fill_row(work, masks + work.image * args.image_stride + work.queries.index[i] * args.query_stride, y, row);
      for (int64_t block = 0; block < blocks; ++block) {
        Vec top = load(row + block * kCells);
        for (int j = kWidth; j < kCells; j += kWidth) top = vmax(top, load(row + block * kCells + j));
        most[block] = largest(top);
      }
    }
  };
  if (args.type == Type::f32) all(reinterpret_cast<const float*>(args.masks));
  else if (args.type == Type::f16) all(reinterpret_cast<const f16*>(args.masks));
  else all(reinterpret_cast<const bf16*>(args.masks));
}

struct Tile {
  const float *upper, *lower;  // rows of cells of the first query
  float share;                 // of the lower one
  const int32_t* left;         // the cell before every pixel
  const float* right;          // the share of the next one
  int32_t first_cell, count;   // subtracted from `left`; pixels
  bool window;                 // 16 pixels lie between cells that one register holds
  int64_t vectors;
  Vec best[kVectors];
  IVec code[kVectors];  // 2 · query, as they are counted here, + whether the pixel is in its mask
  float least;          // of best
};

// Masks of query i, joined to the tile.
template <bool kWindow, bool kLast>
[[gnu::noinline]] void join(const Work& work, Tile& tile, int32_t i) {
  const PanopticArgmax& args = work.args;
  const float *upper = tile.upper + i * args.stride, *lower = tile.lower + i * args.stride;
  Vec share = splat(tile.share), score = splat(work.queries.scores[i]), threshold = splat(args.threshold);
  int32_t above = 0;
  IVec changed{};
  for (int64_t v = 0; v < tile.vectors; ++v) {
    IVec left = load_ints(tile.left + v * kWidth) - tile.first_cell;
    Vec a, b;
    if (kWindow) {
      int32_t base = left[0];
      Vec cells = between(load(upper + base), load(lower + base), share);
      a = permute(cells, left - base), b = permute(cells, left - base + 1);
    } else {
      a = between(gather(upper, left), gather(lower, left), share);
      b = between(gather(upper, left + 1), gather(lower, left + 1), share);
    }
    Vec x = between(a, b, load(tile.right + v * kWidth));
    if (kLast) x = sigmoid(x);
    Vec product = x * score;
    IVec in = (args.weighted ? product : x) >= threshold;
    IVec wins = (product > tile.best[v]) | ((product == tile.best[v]) & (tile.code[v] > 2 * i + 1));
    tile.best[v] = wins ? product : tile.best[v];
    tile.code[v] = wins ? 2 * i - in : tile.code[v];
    changed |= wins;
    above += count_of(in & (iota() < (int32_t)(tile.count - v * kWidth)));
  }
  work.scratch.counts[work.queries.count + i] += above;
  if (!count_of(changed)) return;
  Vec least = tile.best[0];
  for (int64_t v = 1; v < tile.vectors; ++v) least = vmin(least, tile.best[v]);
  tile.least = smallest(least);
}

// The most that masks, and their products with the scores, can be over a tile; the query with the largest.
int32_t bound(const Work& work, int64_t upper, int64_t lower, int64_t begin, int64_t end) {
  const PanopticArgmax& args = work.args;
  const PanopticScratch& s = work.scratch;
  int64_t count = work.queries.count, blocks = args.stride / kCells;
  for (int64_t i = 0; i < count; ++i) {
    const float *a = s.most[upper] + i * blocks, *b = s.most[lower] + i * blocks;
    float most = -kInfinity;
    for (int64_t block = begin; block < end; ++block) most = max_of(most, max_of(a[block], b[block]));
    s.bounds[i] = most;
  }
  Vec largest_yet = splat(-kInfinity);
  IVec whose{};
  for (int64_t i = 0; i < count; i += kWidth) {
    Vec x = load(s.bounds + i);
    if (args.last) x = sigmoid(x + vabs(x) * kSlack);
    x += vabs(x) * kSlack;
    Vec product = x * load(s.scores + i);
    product += vabs(product) * kSlack;
    store(s.products + i, product);
    store(s.bounds + i, args.weighted ? product : x);
    product = iota() < (int32_t)(count - i) ? product : splat(-kInfinity);
    whose = product > largest_yet ? iota() + (int32_t)i : whose;
    largest_yet = vmax(product, largest_yet);
  }
  int lane = 0;
  for (int l = 1; l < kWidth; ++l)
    if (largest_yet[l] > largest_yet[lane]) lane = l;
  return whose[lane];
}

template <bool kWindow, bool kLast>
void solve(const Work& work, Tile& tile, int32_t first) {
  const PanopticScratch& s = work.scratch;
  join<kWindow, kLast>(work, tile, first);
  int32_t count = static_cast<int32_t>(work.queries.count);
  for (int32_t i = 0; i < count; ++i)
    if (i != first && (s.products[i] >= tile.least || s.bounds[i] >= work.args.threshold))
      join<kWindow, kLast>(work, tile, i);
}

// Writes a tile and counts its pixels.
void finish(const Work& work, const Tile& tile, int16_t* queries, uint8_t* inside) {
  int32_t codes[kTile];
  IVec first = IVec{} + tile.code[0][0], other{};
  for (int64_t v = 0; v < tile.vectors; ++v) {
    store_ints(codes + v * kWidth, tile.code[v]);
    other |= tile.code[v] != first;
  }
  int64_t count = work.queries.count;
  int32_t *won = work.scratch.counts, *kept = won + 2 * count;
  for (int32_t i = 0; i < tile.count; ++i) {
    queries[i] = static_cast<int16_t>(work.queries.index[codes[i] >> 1]);
    inside[i] = static_cast<uint8_t>(codes[i] & 1);
  }
  if (!count_of(other)) {
    won[codes[0] >> 1] += tile.count;
    kept[codes[0] >> 1] += (codes[0] & 1) * tile.count;
    return;
  }
  for (int32_t i = 0; i < tile.count; ++i) {
    ++won[codes[i] >> 1];
    kept[codes[i] >> 1] += codes[i] & 1;
  }
}

}  // namespace

void panoptic_argmax(const PanopticArgmax& args, int64_t image, int64_t y0, int64_t y1, int64_t x0,
                     int64_t x1, const PanopticScratch& s) {
  const PanopticQueries& queries = args.images[image];
  int64_t offset = image * args.height * args.width;
  int16_t* query_rows = args.queries + offset;
  uint8_t* inside_rows = args.inside + offset;
  if (!queries.count) {
    for (int64_t y = y0; y < y1; ++y) {
      __builtin_memset(query_rows + y * args.width + x0, 255, (x1 - x0) * sizeof(int16_t));
      __builtin_memset(inside_rows + y * args.width + x0, 0, x1 - x0);
    }
    return;
  }
  int64_t first_cell = args.x.cells[x0];
  Work work{args, s, queries, image, first_cell,
            min_of<int64_t>(args.x.cells[x1 - 1] + 2, args.cells_width) - first_cell, {-1, -1}};
  __builtin_memset(s.counts, 0, 3 * queries.count * sizeof(int32_t));
  for (int64_t i = 0; i < (queries.count + kWidth - 1) / kWidth * kWidth; ++i)
    s.scores[i] = i < queries.count ? queries.scores[i] : 0, s.bounds[i] = 0;
  for (int64_t y = y0; y < y1; ++y) {
    int64_t upper = args.y.cells[y], lower = min_of<int64_t>(upper + 1, args.cells_height - 1);
    hold(work, upper);
    hold(work, lower);
    for (int64_t x = x0; x < x1; x += kTile) {
      Tile tile;
      tile.count = static_cast<int32_t>(min_of<int64_t>(kTile, x1 - x));
      tile.vectors = (tile.count + kWidth - 1) / kWidth;
      tile.upper = s.rows[upper % 2], tile.lower = s.rows[lower % 2], tile.share = args.y.shares[y];
      tile.left = args.x.cells + x, tile.right = args.x.shares + x;
      tile.first_cell = static_cast<int32_t>(first_cell);
      tile.window = true;
      for (int64_t v = 0; v < tile.vectors; ++v) {
        const int32_t* left = tile.left + v * kWidth;
        tile.window &= left[kWidth - 1] + 1 - left[0] < kWidth;
        tile.best[v] = splat(-kInfinity);
        tile.code[v] = IVec{};
      }
      tile.least = -kInfinity;
      int64_t begin = (tile.left[0] - first_cell) / kCells;
      int64_t last = min_of(tile.left[tile.count - 1] + 1 - first_cell, work.cells - 1);
      int32_t first = bound(work, upper % 2, lower % 2, begin, last / kCells + 1);
      auto* f = args.last ? (tile.window ? &solve<true, true> : &solve<false, true>)
                          : (tile.window ? &solve<true, false> : &solve<false, false>);
      f(work, tile, first);
      finish(work, tile, query_rows + y * args.width + x, inside_rows + y * args.width + x);
    }
  }
  int32_t* areas = args.areas + image * 3 * args.all_queries;
  for (int64_t kind = 0; kind < 3; ++kind)
    for (int64_t i = 0; i < queries.count; ++i)
      if (int32_t count = s.counts[kind * queries.count + i])
        __atomic_fetch_add(areas + kind * args.all_queries + queries.index[i], count, __ATOMIC_RELAXED);
}

}  // namespace segvit::SEGVIT_ISA
