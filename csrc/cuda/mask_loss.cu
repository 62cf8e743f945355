// Mask loss: focal, BCE and dice sums of upsampled logits, their gradient, and the sums that matching needs;
// what is computed stands in segvit_kernels/ops/mask_loss.py.
//
// Areas: labels are counted in histograms in shared memory and added as integers. One block writes the list
// of active pairs. The main kernels are persistent: blocks walk the items (active pair, tile), whose number
// they read from memory, so that inactive pairs cost nothing and the host learns nothing.
//
// Forward: a tile is kStrip output rows by kColumns columns a thread. The two rows of the map between which
// an output row lies are interpolated along x once and stay in registers while rows go down; a pixel then
// costs one multiply-add and its loss. Four sums a tile, added in order by another kernel.
//
// Backward, a gather: a tile is some rows of cells, and a block walks all output pixels in their support in
// the same way. Threads add what their columns give to the row above and below; whenever the walk passes a
// row of cells its sums go through shared memory to four lanes per cell, which add the columns in the cell's
// support. Rows between two tiles are walked by both.
//
// Matching: blocks of 64 queries by 32 targets by some output rows. Three values of every query and pixel and
// the targets go through shared memory, 64 pixels at a time; products in float32 from registers, 4 by 2 a
// thread.
//
// Bytes: maps and targets are read once per active pair, mostly from the caches; nothing of full size is
// written. sm_80 and sm_90a, no spills: forward 80 registers, backward 118 and 11 KiB of shared memory for
// 640 columns, matching 136 and 60 KiB.
#include "../operators.h"
#include "common.cuh"

namespace segvit::cuda {

namespace {

constexpr int kEntries = 16;  // of the list of logits, in one launch
constexpr int kColumns = 4;   // output columns of a thread, a block's width apart
constexpr int kMaxThreads = 256;
constexpr int kStrip = 16;      // output rows of a tile of the forward
constexpr int kLanes = 4;       // that add up a cell
constexpr int kCounted = 8192;  // labels or mask elements of one block
constexpr int kClasses = 8192;  // of a histogram in shared memory
constexpr int kQueryTile = 64, kTargetTile = 32, kPixelTile = 64, kPitch = kPixelTile + 4;
constexpr float kLow = -1e30f;  // a logit that adds nothing to sums and gradients outside a target

// What the targets are made of.
enum class Element : int { u8, i8, i16, i32, i64, boolean, f16, bf16, f32, f64 };
// How a kernel reads them: bytes, other labels, masks of bool, other masks.
enum class Kind { bytes, labels, hard, soft };

struct Focal {
  float alpha, other, gamma;  // other: 1 − alpha, from float64
};

struct Targets {
  const char* data;
  const int64_t* matches;             // (B, Q), or null
  int64_t image_stride, mask_stride;  // in bytes; no mask stride: labels
  Element element;
  int queries, targets, height, width;
  bool labels, mask_ignored;
};

struct Entry {
  const char* x;
  char* grad;
  int h, w, begin;  // first tile
};

struct Loss {
  Entry entries[kEntries];
  int count, tiles;
  Type type;
  Targets targets;
  const int* pairs;        // how many are active, then these
  float* partial;          // forward: (B·Q, tiles, 4)
  const float* grad_sums;  // backward: (entries, B·Q, 4)
  int64_t total;           // B·Q
  int cell_rows;           // backward: rows of cells of a tile
  Focal focal;
};

// ---------------------------------------------------------------------------------------------------------------
// Targets and maps

template <class T>
SEGVIT_DEVICE T at(const char* data, int64_t index) {
  return reinterpret_cast<const T*>(data)[index];
}

// A label as a number that fits, -1 if it does not.
SEGVIT_DEVICE int read_label(const char* plane, Element element, int64_t index) {
  switch (element) {
    case Element::u8: return at<uint8_t>(plane, index);
    case Element::i8: return at<int8_t>(plane, index);
    case Element::i16: return at<int16_t>(plane, index);
    case Element::i32: return at<int32_t>(plane, index);
    default: {
      int64_t label = at<int64_t>(plane, index);
      return label == static_cast<int>(label) ? static_cast<int>(label) : -1;
    }
  }
}
SEGVIT_DEVICE float read_mask(const char* plane, Element element, int64_t index) {
  switch (element) {
    case Element::f16: return to_float(at<half>(plane, index));
    case Element::bf16: return to_float(at<bf16>(plane, index));
    case Element::f32: return at<float>(plane, index);
    case Element::f64: return static_cast<float>(at<double>(plane, index));
    default: return at<uint8_t>(plane, index) ? 1.0f : 0.0f;
  }
}

// The target of a pair, or -1 where it is not active. `sizes` (B, M): areas or counts.
template <class T>
SEGVIT_DEVICE int target_of(const Targets& t, const T* sizes, int64_t pair) {
  int64_t target = t.matches ? t.matches[pair] : pair % t.queries;
  if (target < 0 || target >= t.targets) return -1;
  if (t.labels && !(sizes[pair / t.queries * t.targets + target] > 0)) return -1;
  return static_cast<int>(target);
}

// Output elements i of an axis of `size` among `cells`. Positions are in units of 1 / (2 size): exact.
struct Place {
  int before;  // the cell before it
  int rest;    // the way past that one, maybe beyond both ends
};
SEGVIT_DEVICE Place place_of(int i, int cells, int size) {
  int position = (2 * i + 1) * cells - size, before = position < 0 ? 0 : position / (2 * size);
  if (before > cells - 1) before = cells - 1;
  return {before, position - before * 2 * size};
}
SEGVIT_DEVICE float way_of(Place place, int cells, int size) {
  if (place.rest <= 0 || place.before >= cells - 1) return 0;
  return static_cast<float>(place.rest) / static_cast<float>(2 * size);
}
// The first output element that lies at cell `cell` or after it.
SEGVIT_DEVICE int first_at(int cell, int cells, int size) {
  if (cell <= 0) return 0;
  if (cell >= cells) return size;
  int distance = (2 * cell + 1) * size - cells;
  return distance <= 0 ? 0 : min(size, (distance + 2 * cells - 1) / (2 * cells));
}

// ---------------------------------------------------------------------------------------------------------------
// The loss of a pixel

// log(1 + e) for e in [0, 1]: e times a minimax polynomial, relative error below 1.3e-7.
SEGVIT_DEVICE float log1p_of(float e) {
  float y = e * 0.005364821292459965f - 0.030065780505537987f;
  y = y * e + 0.07920452207326889f;
  y = y * e - 0.13753801584243774f;
  y = y * e + 0.191536545753479f;
  y = y * e - 0.24857163429260254f;
  y = y * e + 0.3332132399082184f;
  y = y * e - 0.49999648332595825f;
  return e * (y * e + 1);
}

struct Logistic {
  float p, q, log;  // σ(x), σ(−x), log(1 + exp(−|x|))
};
SEGVIT_DEVICE Logistic logistic(float x) {
  float e = fast_exp2(fabsf(x) * -kLog2e), larger = fast_rcp(1 + e), smaller = e * larger;
  return {x > 0 ? larger : smaller, x > 0 ? smaller : larger, log1p_of(e)};
}

SEGVIT_DEVICE float power(float m, float gamma) {
  if (gamma == 2) return m * m;
  return m > 0 ? fast_exp2(gamma * fast_log2(m)) : 0;  // where m is 0, so is what it multiplies
}

struct Sums {
  float focal = 0, bce = 0, overlap = 0, total = 0;
};

SEGVIT_DEVICE void add_losses(Sums& sums, float x, bool t, const Focal& o) {
  Logistic l = logistic(x);
  float bce = fmaxf(t ? -x : x, 0) + l.log;
  sums.focal += (t ? o.alpha : o.other) * power(t ? l.q : l.p, o.gamma) * bce;
  sums.bce += bce;
  sums.overlap += t ? l.p : 0;
  sums.total += l.p;
}
SEGVIT_DEVICE void add_losses(Sums& sums, float x, float t, const Focal& o) {
  Logistic l = logistic(x);
  float bce = l.log + x * ((x > 0 ? 1.0f : 0.0f) - t), m = l.p * (1 - t) + l.q * t;
  sums.focal += (o.alpha * t + o.other * (1 - t)) * power(m, o.gamma) * bce;
  sums.bce += bce;
  sums.overlap += l.p * t;
  sums.total += l.p;
}

// Derivative of g.focal · focal + g.bce · bce + g.overlap · p t + g.total · p in x.
SEGVIT_DEVICE float slope(const Sums& g, float x, bool t, const Focal& o) {
  // With z = −x inside and x outside: bce = softplus(z), m = σ(z), n = 1 − m.
  Logistic l = logistic(x);
  float bce = fmaxf(t ? -x : x, 0) + l.log, m = t ? l.q : l.p, n = t ? l.p : l.q;
  float focal = (t ? -o.alpha * g.focal : o.other * g.focal) * (o.gamma * n * bce + m);
  float rest = (t ? -g.bce : g.bce) + (t ? g.overlap + g.total : g.total) * n;
  return o.gamma == 2 ? m * (m * focal + rest) : power(m, o.gamma) * focal + m * rest;
}
SEGVIT_DEVICE float slope(const Sums& g, float x, float t, const Focal& o) {
  Logistic l = logistic(x);
  float bce = l.log + x * ((x > 0 ? 1.0f : 0.0f) - t), m = l.p * (1 - t) + l.q * t;
  float both = l.p * l.q, error = l.p * (1 - t) - l.q * t, focal;
  if (o.gamma == 2) {
    focal = m * (2 * (1 - 2 * t) * both * bce + m * error);
  } else {
    // m is at least the smaller of p and 1 − p, so that the ratio is at most 1.
    focal = power(m, o.gamma) * (o.gamma * (1 - 2 * t) * (m > 0 ? both / m : 0) * bce + error);
  }
  return g.focal * (o.alpha * t + o.other * (1 - t)) * focal + g.bce * error +
         (g.overlap * t + g.total) * both;
}

// ---------------------------------------------------------------------------------------------------------------
// Areas and active pairs

// counts (B, M) += pixels of every class among kCounted pixels of image blockIdx.y.
__global__ void __launch_bounds__(256) mask_count_kernel(Targets t, int* counts) {
  int* histogram = reinterpret_cast<int*>(shared_memory());
  bool small = t.targets <= kClasses;
  counts += static_cast<int64_t>(blockIdx.y) * t.targets;
  const char* plane = t.data + blockIdx.y * t.image_stride;
  if (small) {
    for (int c = threadIdx.x; c < t.targets; c += blockDim.x) histogram[c] = 0;
    __syncthreads();
  }
  int64_t pixels = static_cast<int64_t>(t.height) * t.width,
          begin = static_cast<int64_t>(blockIdx.x) * kCounted;
  for (int i = threadIdx.x; i < kCounted; i += blockDim.x) {
    int label = begin + i < pixels ? read_label(plane, t.element, begin + i) : -1;
    // Neighbours mostly have one label: then one lane counts for its warp.
    int first = __shfl_sync(kAllLanes, label, 0), many = 1;
    if (__all_sync(kAllLanes, label == first)) {
      many = 32;
      if (lane_index() > 0) continue;
    }
    if (label >= 0 && label < t.targets) atomicAdd((small ? histogram : counts) + label, many);
  }
  if (!small) return;
  __syncthreads();
  for (int c = threadIdx.x; c < t.targets; c += blockDim.x)
    if (histogram[c]) atomicAdd(counts + c, histogram[c]);
}

// partial (chunks, B·M) = the sum of kCounted elements of mask blockIdx.x.
__global__ void __launch_bounds__(256) mask_area_kernel(Targets t, float* partial) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const char* plane =
      t.data + blockIdx.x / t.targets * t.image_stride + blockIdx.x % t.targets * t.mask_stride;
  int64_t pixels = static_cast<int64_t>(t.height) * t.width,
          begin = static_cast<int64_t>(blockIdx.y) * kCounted;
  float sum = 0;
  for (int i = threadIdx.x; i < kCounted && begin + i < pixels; i += blockDim.x)
    sum += read_mask(plane, t.element, begin + i);
  sum = warp_sum(sum);
  if (lane_index() == 0) memory[warp_index()] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < 8; ++warp) sum += memory[warp];
  partial[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// out (size) = Σ over parts of partial (parts, size), in order.
__global__ void __launch_bounds__(256)
    mask_sum_kernel(const float* partial, float* out, int64_t size, int parts) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  double sum = 0;
  for (int part = 0; part < parts; ++part) sum += partial[part * size + i];
  out[i] = static_cast<float>(sum);
}

// The list of active pairs with its length in front, if there is room for it; with counts also the areas. One
// block of 1024 threads.
__global__ void __launch_bounds__(1024)
    mask_pairs_kernel(Targets t, const int* counts, float* areas, int64_t size, int* pairs, int64_t total) {
  int* found = reinterpret_cast<int*>(shared_memory());  // by every warp, in turns of two
  if (counts)
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) areas[i] = static_cast<float>(counts[i]);
  int length = 0, turn = 0;
  for (int64_t start = 0; start < total; start += blockDim.x, turn ^= 32) {
    int64_t pair = start + threadIdx.x;
    bool active = false;
    if (pair < total) active = (counts ? target_of(t, counts, pair) : target_of(t, areas, pair)) >= 0;
    unsigned ballot = __ballot_sync(kAllLanes, active);
    if (lane_index() == 0) found[turn + warp_index()] = __popc(ballot);
    __syncthreads();
    int before = length;
    for (int warp = 0; warp < 32; ++warp) {
      if (warp < warp_index()) before += found[turn + warp];
      length += found[turn + warp];
    }
    if (active) pairs[1 + before + __popc(ballot & ((1u << lane_index()) - 1))] = static_cast<int>(pair);
  }
  if (pairs && threadIdx.x == 0) pairs[0] = length;
}

// ---------------------------------------------------------------------------------------------------------------
// The walk over output rows

// The columns of a thread: where they lie, and the map's rows above and below, interpolated there.
struct Columns {
  int before[kColumns], after[kColumns];
  float way[kColumns], upper[kColumns], lower[kColumns];

  SEGVIT_DEVICE void start(const Loss& a, const Entry& entry, int first) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      int x = first + static_cast<int>(threadIdx.x) + k * static_cast<int>(blockDim.x);
      Place place = place_of(min(x, a.targets.width - 1), entry.w, a.targets.width);
      before[k] = place.before;
      after[k] = min(place.before + 1, entry.w - 1);
      // Past the edge a row of low logits takes the map's place.
      way[k] = x < a.targets.width ? way_of(place, entry.w, a.targets.width) : -1;
    }
  }
  template <class T>
  SEGVIT_DEVICE void read_as(const char* map, int64_t row, int w, float (&to)[kColumns]) const {
    const T* from = reinterpret_cast<const T*>(map) + row * w;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      float left = to_float(from[before[k]]), right = to_float(from[after[k]]);
      to[k] = way[k] < 0 ? kLow : left + way[k] * (right - left);
    }
  }
  SEGVIT_DEVICE void read(const char* map, Type type, int row, const Entry& entry,
                          float (&to)[kColumns]) const {
    row = min(row, entry.h - 1);
    if (type == Type::f32)
      read_as<float>(map, row, entry.w, to);
    else if (type == Type::f16)
      read_as<half>(map, row, entry.w, to);
    else
      read_as<bf16>(map, row, entry.w, to);
  }
};

// Output rows begin...end: calls f(x, t, k, down) for the pixel of every column k of the thread, `down` of
// the way from the row of cells above it to the one below, and passed(row) when it leaves the row above it
// behind. Gives the row of cells that it ends in.
template <Kind kind, class F, class Passed>
SEGVIT_DEVICE int walk(const Loss& a, const Entry& entry, const char* map, const char* plane, int target,
                       int first, int begin, int end, Columns& columns, const F& f, const Passed& passed) {
  const Targets& t = a.targets;
  Place place = place_of(begin, entry.h, t.height);
  int row = place.before;
  columns.read(map, a.type, row, entry, columns.upper);
  columns.read(map, a.type, row + 1, entry, columns.lower);
  float unit = 1.0f / static_cast<float>(2 * t.height);
  for (int y = begin; y < end; ++y, place.rest += 2 * entry.h) {
    while (place.rest >= 2 * t.height && row < entry.h - 1) {
      place.rest -= 2 * t.height;
      passed(row++);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) columns.upper[k] = columns.lower[k];
      columns.read(map, a.type, row + 1, entry, columns.lower);
    }
    float down = row < entry.h - 1 ? fmaxf(static_cast<float>(place.rest) * unit, 0) : 0;
    int64_t line = static_cast<int64_t>(y) * t.width;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      int column = first + static_cast<int>(threadIdx.x) + k * static_cast<int>(blockDim.x);
      bool inside = column < t.width;
      int64_t index = line + (inside ? column : 0);
      float x = columns.upper[k] + down * (columns.lower[k] - columns.upper[k]);
      if constexpr (kind == Kind::bytes || kind == Kind::labels) {
        int label = kind == Kind::bytes ? at<uint8_t>(plane, index) : read_label(plane, t.element, index);
        if (t.mask_ignored && static_cast<unsigned>(label) >= static_cast<unsigned>(t.targets)) x = kLow;
        f(x, inside && label == target, k, down);
      } else if constexpr (kind == Kind::hard) {
        f(x, inside && at<uint8_t>(plane, index), k, down);
      } else {
        f(x, inside ? read_mask(plane, t.element, index) : 0.0f, k, down);
      }
    }
  }
  return row;
}

// The item's pair, and its entry of the list and the tile there.
struct Item {
  int64_t pair;
  int tile, entry, local, target;
  const char *map, *plane;
};
SEGVIT_DEVICE Item item_of(const Loss& a, int64_t index) {
  Item item;
  item.pair = a.pairs[1 + index / a.tiles];
  item.tile = static_cast<int>(index % a.tiles);
  item.entry = 0;
  while (item.entry + 1 < a.count && item.tile >= a.entries[item.entry + 1].begin) ++item.entry;
  const Entry& entry = a.entries[item.entry];
  item.local = item.tile - entry.begin;
  const Targets& t = a.targets;
  item.target = static_cast<int>(t.matches ? t.matches[item.pair] : item.pair % t.queries);
  item.map = entry.x + item.pair * entry.h * entry.w * size_of(a.type);
  item.plane = t.data + item.pair / t.queries * t.image_stride + item.target * t.mask_stride;
  return item;
}

template <Kind kind>
__global__ void __launch_bounds__(kMaxThreads) mask_loss_fwd_kernel(const Loss a) {
  float4* memory = reinterpret_cast<float4*>(shared_memory());
  int warps = static_cast<int>(blockDim.x / 32), span = static_cast<int>(blockDim.x) * kColumns, turn = 0;
  int spans = (a.targets.width + span - 1) / span;
  int64_t items = static_cast<int64_t>(a.pairs[0]) * a.tiles;
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x, turn ^= warps) {
    Item item = item_of(a, index);
    const Entry& entry = a.entries[item.entry];
    int first = item.local % spans * span, begin = item.local / spans * kStrip;
    Columns columns;
    columns.start(a, entry, first);
    Sums sums, row;  // short sums of short sums lose less
    auto pixel = [&](float x, auto t, int k, float) {
      add_losses(row, x, t, a.focal);
      if (k < kColumns - 1) return;
      sums.focal += row.focal, sums.bce += row.bce, sums.overlap += row.overlap, sums.total += row.total;
      row = Sums{};
    };
    walk<kind>(a, entry, item.map, item.plane, item.target, first, begin,
               min(begin + kStrip, a.targets.height), columns, pixel, [](int) {});
    float4 sum =
        make_float4(warp_sum(sums.focal), warp_sum(sums.bce), warp_sum(sums.overlap), warp_sum(sums.total));
    if (lane_index() == 0) memory[turn + warp_index()] = sum;
    __syncthreads();
    if (threadIdx.x > 0) continue;
    for (int warp = 1; warp < warps; ++warp) {
      float4 more = memory[turn + warp];
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    reinterpret_cast<float4*>(a.partial)[item.pair * a.tiles + item.tile] = sum;
  }
}

// sums (entries, B·Q, 4): the partials added in order; zero for inactive pairs.
__global__ void __launch_bounds__(256) mask_loss_sum_kernel(const Loss a, const float* areas, float4* sums) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.count * a.total) return;
  int entry = static_cast<int>(i / a.total);
  int64_t pair = i % a.total;
  double focal = 0, bce = 0, overlap = 0, all = 0;
  if (target_of(a.targets, areas, pair) >= 0) {
    int end = entry + 1 < a.count ? a.entries[entry + 1].begin : a.tiles;
    for (int tile = a.entries[entry].begin; tile < end; ++tile) {
      float4 more = reinterpret_cast<const float4*>(a.partial)[pair * a.tiles + tile];
      focal += more.x, bce += more.y, overlap += more.z, all += more.w;
    }
  }
  sums[i] = make_float4(static_cast<float>(focal), static_cast<float>(bce), static_cast<float>(overlap),
                        static_cast<float>(all));
}

template <Kind kind>
__global__ void __launch_bounds__(kMaxThreads, 2) mask_loss_bwd_kernel(const Loss a) {
  const Targets& t = a.targets;
  int threads = static_cast<int>(blockDim.x), span = threads * kColumns, turn = 0;
  float* line =
      reinterpret_cast<float*>(shared_memory());  // two of them: what the columns give to a row of cells
  float* way = line + 2 * span;
  int* before = reinterpret_cast<int*>(way + span);
  float* cells = reinterpret_cast<float*>(before + span);  // (cell_rows, w)
  int64_t items = static_cast<int64_t>(a.pairs[0]) * a.tiles;
  int lane = static_cast<int>(threadIdx.x) % kLanes, owner = static_cast<int>(threadIdx.x) / kLanes;
  int owners = threads / kLanes;
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    Item item = item_of(a, index);
    const Entry& entry = a.entries[item.entry];
    int first_row = item.local * a.cell_rows, last_row = min(first_row + a.cell_rows, entry.h);
    int begin = first_at(first_row - 1, entry.h, t.height), end = first_at(last_row, entry.h, t.height);
    const float* grad = a.grad_sums + (item.entry * a.total + item.pair) * 4;
    Sums g{grad[0], grad[1], grad[2], grad[3]};
    __syncthreads();  // the last item's cells and columns may still be read
    // A cell belongs to the same lanes throughout: nobody waits for these sums.
    for (int c = owner; c < entry.w; c += owners)
      for (int row = first_row; row < last_row && lane == 0; ++row)
        cells[(row - first_row) * entry.w + c] = 0;
    for (int first = 0; first < t.width; first += span) {
      if (first > 0) __syncthreads();
      Columns columns;
      columns.start(a, entry, first);
      float above[kColumns] = {}, below[kColumns] = {};
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        before[threadIdx.x + k * threads] = columns.before[k];
        way[threadIdx.x + k * threads] = columns.way[k];
      }
      auto passed = [&](int row) {
        if (row >= first_row && row < last_row) {
          float* values = line + turn * span;
          turn ^= 1;
#pragma unroll
          for (int k = 0; k < kColumns; ++k) values[threadIdx.x + k * threads] = above[k];
          __syncthreads();
          for (int base = 0; base < entry.w; base += owners) {
            int c = base + owner;
            float sum = 0;
            if (c < entry.w) {
              int from = max(first_at(c - 1, entry.w, t.width), first) - first;
              int to = min(first_at(c + 1, entry.w, t.width), first + span) - first;
              for (int x = from + lane; x < to; x += kLanes) {
                float weight = before[x] == c ? 1 - way[x] : before[x] == c - 1 ? way[x] : 0;
                sum += weight * values[x];
              }
            }
            sum = warp_sum<kLanes>(sum);
            if (c < entry.w && lane == 0) cells[(row - first_row) * entry.w + c] += sum;
          }
        }
#pragma unroll
        for (int k = 0; k < kColumns; ++k) above[k] = below[k], below[k] = 0;
      };
      auto pixel = [&](float x, auto target, int k, float down) {
        float dx = slope(g, x, target, a.focal);
        above[k] += (1 - down) * dx;
        below[k] += down * dx;
      };
      int row =
          walk<kind>(a, entry, item.map, item.plane, item.target, first, begin, end, columns, pixel, passed);
      for (; row < last_row; ++row) passed(row);
    }
    for (int c = owner; c < entry.w; c += owners)
      for (int row = first_row; row < last_row && lane == 0; ++row)
        write(entry.grad, (item.pair * entry.h + row) * entry.w + c, a.type,
              cells[(row - first_row) * entry.w + c]);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Matching

struct Matching {
  const char* x;
  Type type;
  int h, w, batch, rows;  // rows: of a split
  Targets targets;
  float *products, *totals;  // (splits, 3, B, Q, M) and (splits, 3, B, Q)
  Focal focal;
};

// A sum that remembers what rounding took (Kahan).
struct Exact {
  float sum = 0, lost = 0;
  SEGVIT_DEVICE void add(float x) {
    x -= lost;
    float more = sum + x;
    lost = (more - sum) - x;
    sum = more;
  }
};

__global__ void __launch_bounds__(256, 1) mask_matching_kernel(const Matching a) {
  const Targets& t = a.targets;
  float* values = reinterpret_cast<float*>(shared_memory());  // [3][kQueryTile][kPitch]
  float* hits = values + 3 * kQueryTile * kPitch;             // [kTargetTile][kPitch]
  float* way = hits + kTargetTile * kPitch;
  int* before = reinterpret_cast<int*>(way + kPixelTile);
  int* found = before + kPixelTile;  // the last pixels with a target of this block
  int first_q = blockIdx.x * kQueryTile, first_m = blockIdx.y * kTargetTile;
  int image = static_cast<int>(blockIdx.z % a.batch), split = static_cast<int>(blockIdx.z / a.batch);
  const char* plane = t.data + image * t.image_stride;
  // Values: 4 lanes a query. Products: queries 16 apart by targets 16 apart.
  int q = first_q + threadIdx.x / 4, lane = threadIdx.x % 4;
  int64_t map = (static_cast<int64_t>(image) * t.queries + min(q, t.queries - 1)) * a.h * a.w;
  int row_q = threadIdx.x / 16, row_m = threadIdx.x % 16;
  Exact sum[3][4][2], total[3];
  if (threadIdx.x == 0) *found = -1;
  int end = min((split + 1) * a.rows, t.height), number = 0;
  for (int y = split * a.rows; y < end; ++y) {
    Place place = place_of(y, a.h, t.height);
    float down = way_of(place, a.h, t.height);
    int64_t upper = map + static_cast<int64_t>(place.before) * a.w;
    int64_t lower = map + static_cast<int64_t>(min(place.before + 1, a.h - 1)) * a.w;
    for (int x = 0; x < t.width; x += kPixelTile, ++number) {
      __syncthreads();
      if (threadIdx.x < kPixelTile && x + static_cast<int>(threadIdx.x) < t.width) {
        Place column = place_of(x + threadIdx.x, a.w, t.width);
        before[threadIdx.x] = column.before;
        way[threadIdx.x] = way_of(column, a.w, t.width);
      }
      bool any = false;
      for (int i = threadIdx.x; i < kTargetTile * kPixelTile; i += 256) {
        int pixel = i % kPixelTile, m = first_m + i / kPixelTile;
        float hit = 0;
        if (x + pixel < t.width && m < t.targets) {
          int64_t at = static_cast<int64_t>(y) * t.width + x + pixel;
          hit = t.labels ? (read_label(plane, t.element, at) == m ? 1.0f : 0.0f)
                         : read_mask(plane + m * t.mask_stride, t.element, at);
        }
        hits[i / kPixelTile * kPitch + pixel] = hit;
        any |= hit != 0;
      }
      if (any) *found = number;
      __syncthreads();
      any = *found == number;
      if (!any && blockIdx.y > 0) continue;  // the first targets' block has the totals too
      float part[3] = {};
#pragma unroll 4
      for (int pixel = lane; pixel < kPixelTile; pixel += 4) {
        float focal = 0, negated = 0, p = 0;
        if (x + pixel < t.width) {
          int left = before[pixel], right = min(left + 1, a.w - 1);
          float v00 = read(a.x, upper + left, a.type), v01 = read(a.x, upper + right, a.type);
          float v10 = read(a.x, lower + left, a.type), v11 = read(a.x, lower + right, a.type);
          v00 += way[pixel] * (v01 - v00), v10 += way[pixel] * (v11 - v10);
          float logit = v00 + down * (v10 - v00);
          Logistic l = logistic(logit);
          float outside = fmaxf(logit, 0) + l.log;
          float negative = a.focal.other * power(l.p, a.focal.gamma) * outside;
          focal = a.focal.alpha * power(l.q, a.focal.gamma) * (fmaxf(-logit, 0) + l.log) - negative;
          negated = -logit, p = l.p;
          part[0] += negative, part[1] += outside, part[2] += p;
        }
        float* value = values + static_cast<int>(threadIdx.x) / 4 * kPitch + pixel;
        value[0] = focal;
        value[kQueryTile * kPitch] = negated;
        value[2 * kQueryTile * kPitch] = p;
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) total[k].add(part[k]);
      __syncthreads();
      if (!any) continue;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        float product[4][2] = {};
#pragma unroll 2
        for (int pixel = 0; pixel < kPixelTile; pixel += 4) {
          float4 hit[2];
#pragma unroll
          for (int j = 0; j < 2; ++j)
            hit[j] = *reinterpret_cast<const float4*>(hits + (row_m + 16 * j) * kPitch + pixel);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float4 v =
                *reinterpret_cast<const float4*>(values + (k * kQueryTile + row_q + 16 * i) * kPitch + pixel);
#pragma unroll
            for (int j = 0; j < 2; ++j)
              product[i][j] += v.x * hit[j].x + v.y * hit[j].y + v.z * hit[j].z + v.w * hit[j].w;
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) sum[k][i][j].add(product[i][j]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    int64_t out = (static_cast<int64_t>(split * 3 + k) * a.batch + image) * t.queries;
    float all = warp_sum<4>(total[k].sum);
    if (blockIdx.y == 0 && lane == 0 && q < t.queries) a.totals[out + q] = all;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int query = first_q + row_q + 16 * i, m = first_m + row_m + 16 * j;
        if (query < t.queries && m < t.targets) a.products[(out + query) * t.targets + m] = sum[k][i][j].sum;
      }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Launchers

Element element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return Element::u8;
    case ScalarType::Char: return Element::i8;
    case ScalarType::Short: return Element::i16;
    case ScalarType::Int: return Element::i32;
    case ScalarType::Long: return Element::i64;
    case ScalarType::Bool: return Element::boolean;
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    default: STD_TORCH_CHECK(false, "segvit: targets: expected labels of an integer dtype or masks");
  }
}

int64_t bytes_of(Element element) {
  switch (element) {
    case Element::i16:
    case Element::f16:
    case Element::bf16: return 2;
    case Element::i32:
    case Element::f32: return 4;
    case Element::i64:
    case Element::f64: return 8;
    default: return 1;
  }
}

Kind kind_of(const Targets& t) {
  if (t.labels) return t.element == Element::u8 ? Kind::bytes : Kind::labels;
  return t.element == Element::boolean ? Kind::hard : Kind::soft;
}

Focal focal_of(double alpha, double gamma) {
  return {static_cast<float>(alpha), static_cast<float>(1 - alpha), static_cast<float>(gamma)};
}


// The tensor, or a copy of it where the planes of its last two axes are not in one piece.
Tensor whole_planes(const Tensor& tensor) {
  int64_t dim = tensor.dim(), height = tensor.size(dim - 2), width = tensor.size(dim - 1);
  bool rows = tensor.stride(dim - 2) == width || height == 1;
  return rows && (tensor.stride(dim - 1) == 1 || width == 1) ? tensor : torch::stable::contiguous(tensor);
}

// Of tensors that the caller keeps.
Targets targets_of(const Tensor& targets, const Optional& matches, int64_t queries, int64_t num_targets,
                   bool mask_ignored) {
  bool labels = targets.dim() == 3;
  Element element = element_type(targets.scalar_type());
  int64_t bytes = bytes_of(element), dim = targets.dim();
  STD_TORCH_CHECK(queries < 1 << 30 && num_targets < 1 << 30,
                  "segvit: mask_loss: too many queries or targets");
  return {data<char>(targets),
          data<int64_t>(matches),
          targets.stride(0) * bytes,
          labels ? 0 : targets.stride(1) * bytes,
          element,
          static_cast<int>(queries),
          static_cast<int>(num_targets),
          static_cast<int>(targets.size(dim - 2)),
          static_cast<int>(targets.size(dim - 1)),
          labels,
          mask_ignored && labels};
}

void check_sizes(const Tensor& logits, const Tensor& targets) {
  int64_t h = logits.size(2), w = logits.size(3), dim = targets.dim();
  int64_t height = targets.size(dim - 2), width = targets.size(dim - 1);
  STD_TORCH_CHECK(std::max(h * height, w * width) < 1 << 29 && std::max(height, width) < 1 << 28,
                  "segvit: mask_loss: logits of ", h, " by ", w, " and targets of ", height, " by ", width,
                  " are too large for 32-bit positions: use backend='eager'");
  STD_TORCH_CHECK(logits.size(0) * logits.size(1) < int64_t{1} << 31,
                  "segvit: mask_loss: 2^31 pairs or more");
}

// areas (B, M); for labels also the counts that they are to be made from.
std::tuple<Tensor, Optional> areas_of(const Device& device, const Targets& t, const Tensor& like,
                                      int64_t batch) {
  Tensor areas = empty(like, {batch, t.targets}, ScalarType::Float);
  unsigned chunks = ceil_div(static_cast<int64_t>(t.height) * t.width, kCounted);
  if (t.labels) {
    Tensor counts = torch::stable::new_zeros(like, {batch, t.targets}, ScalarType::Int);
    launch(mask_count_kernel, dim3(chunks, static_cast<unsigned>(batch)), 256,
           t.targets <= kClasses ? t.targets * sizeof(int) : 0, device.stream, t, data<int>(counts));
    return {areas, counts};
  }
  int64_t size = batch * t.targets;
  Tensor partial = empty(areas, {chunks, size});
  launch(mask_area_kernel, dim3(static_cast<unsigned>(size), chunks), 256, 8 * sizeof(float), device.stream,
         t, data<float>(partial));
  launch(mask_sum_kernel, ceil_div(size, 256), 256, 0, device.stream, data<float>(partial),
         data<float>(areas), size, static_cast<int>(chunks));
  return {areas, std::nullopt};
}

void launch_pairs(const Device& device, const Targets& t, const Optional& counts, const Tensor& areas,
                  const Optional& pairs, int64_t total) {
  launch(mask_pairs_kernel, 1, 1024, 64 * sizeof(int), device.stream, t, data<int>(counts),
         data<float>(areas), areas.numel(), data<int>(pairs), total);
}

// Threads of a block, so that a whole number of them covers a row.
unsigned threads_for(int64_t width) {
  int64_t tiles = (width + kMaxThreads * kColumns - 1) / (kMaxThreads * kColumns);
  return static_cast<unsigned>(round_up((width + tiles * kColumns - 1) / (tiles * kColumns), 32));
}

// Some entries of the list. `tiles_of(h, w)` says how many tiles one has.
template <class F>
Loss loss_of(const std::vector<Tensor>& logits, size_t first, const Targets& targets, const Tensor& pairs,
             double alpha, double gamma, const F& tiles_of) {
  Loss a{};
  a.count = static_cast<int>(std::min<size_t>(kEntries, logits.size() - first));
  int64_t tiles = 0;
  for (int i = 0; i < a.count; ++i) {
    const Tensor& x = logits[first + i];
    a.entries[i] = {data<char>(x), nullptr, static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                    static_cast<int>(tiles)};
    tiles += tiles_of(x.size(2), x.size(3));
  }
  STD_TORCH_CHECK(tiles < int64_t{1} << 31, "segvit: mask_loss: targets are too large: use backend='eager'");
  a.tiles = static_cast<int>(tiles);
  a.type = type_of(logits[0]);
  a.targets = targets;
  a.pairs = data<int>(pairs);
  a.total = logits[0].size(0) * logits[0].size(1);
  a.focal = focal_of(alpha, gamma);
  return a;
}

unsigned persistent_blocks(const Device& device, const Loss& a) {
  return static_cast<unsigned>(std::min<int64_t>(a.total * a.tiles, 8 * device.multiprocessors()));
}

}  // namespace

std::tuple<Tensor, Tensor> mask_loss_fwd(std::vector<Tensor> mask_logits, Tensor targets, Optional matches,
                                         int64_t num_classes, double focal_alpha, double focal_gamma,
                                         bool mask_ignored) {
  Device device(targets);
  targets = whole_planes(targets);
  if (matches) matches = torch::stable::contiguous(*matches);
  for (Tensor& logits : mask_logits) check_sizes(logits, targets), logits = torch::stable::contiguous(logits);
  int64_t batch = mask_logits[0].size(0), queries = mask_logits[0].size(1), total = batch * queries;
  Targets t = targets_of(targets, matches, queries, num_classes, mask_ignored);
  auto [areas, counts] = areas_of(device, t, mask_logits[0], batch);
  int64_t entries = static_cast<int64_t>(mask_logits.size());
  Tensor sums = empty(areas, {entries, batch, queries, 4});
  Tensor pairs = empty(areas, {1 + total}, ScalarType::Int);
  launch_pairs(device, t, counts, areas, pairs, total);
  unsigned threads = threads_for(t.width);
  int64_t spans = ceil_div(t.width, threads * kColumns);
  for (size_t first = 0; first < mask_logits.size(); first += kEntries) {
    Loss a = loss_of(mask_logits, first, t, pairs, focal_alpha, focal_gamma,
                     [&](int64_t, int64_t) { return spans * ceil_div(t.height, kStrip); });
    Tensor partial = empty(areas, {total, a.tiles, 4});
    a.partial = data<float>(partial);
    void (*kernels[])(Loss) = {mask_loss_fwd_kernel<Kind::bytes>, mask_loss_fwd_kernel<Kind::labels>,
                               mask_loss_fwd_kernel<Kind::hard>, mask_loss_fwd_kernel<Kind::soft>};
    launch(kernels[static_cast<int>(kind_of(t))], persistent_blocks(device, a), threads,
           2 * threads / 32 * sizeof(float4), device.stream, a);
    launch(mask_loss_sum_kernel, ceil_div(a.count * total, 256), 256, 0, device.stream, a,
           data<float>(areas), reinterpret_cast<float4*>(data<float>(sums)) + first * total);
  }
  return {sums, areas};
}

std::vector<Tensor> mask_loss_bwd(Tensor grad_sums, std::vector<Tensor> mask_logits, Tensor targets,
                                  Optional matches, Tensor areas, int64_t num_classes, double focal_alpha,
                                  double focal_gamma, bool mask_ignored) {
  Device device(targets);
  targets = whole_planes(targets);
  if (matches) matches = torch::stable::contiguous(*matches);
  grad_sums = torch::stable::contiguous(grad_sums);
  areas = torch::stable::contiguous(areas);
  std::vector<Tensor> gradients;
  int64_t widest = 1;
  for (Tensor& logits : mask_logits) {
    check_sizes(logits, targets), logits = torch::stable::contiguous(logits);
    gradients.push_back(
        torch::stable::new_zeros(logits, {logits.size(0), logits.size(1), logits.size(2), logits.size(3)}));
    widest = std::max(widest, logits.size(3));
  }
  int64_t batch = mask_logits[0].size(0), queries = mask_logits[0].size(1), total = batch * queries;
  Targets t = targets_of(targets, matches, queries, num_classes, mask_ignored);
  Tensor pairs = empty(areas, {1 + total}, ScalarType::Int);
  launch_pairs(device, t, std::nullopt, areas, pairs, total);
  unsigned threads = threads_for(t.width);
  // Fewer rows of cells a tile give more tiles, and more rows that two of them walk. 16 KiB of sums at most.
  int64_t rows = batch * static_cast<int64_t>(mask_logits.size()) < 16 ? 4 : 8;
  rows = std::max<int64_t>(1, std::min<int64_t>(rows, 4096 / widest));
  size_t shared = (4 * threads * kColumns + rows * widest) * sizeof(float);
  for (size_t first = 0; first < mask_logits.size(); first += kEntries) {
    Loss a = loss_of(mask_logits, first, t, pairs, focal_alpha, focal_gamma,
                     [&](int64_t h, int64_t) { return static_cast<int64_t>(ceil_div(h, rows)); });
    for (int i = 0; i < a.count; ++i) a.entries[i].grad = data<char>(gradients[first + i]);
    a.grad_sums = data<float>(grad_sums) + first * total * 4;
    a.cell_rows = static_cast<int>(rows);
    void (*kernels[])(Loss) = {mask_loss_bwd_kernel<Kind::bytes>, mask_loss_bwd_kernel<Kind::labels>,
                               mask_loss_bwd_kernel<Kind::hard>, mask_loss_bwd_kernel<Kind::soft>};
    launch(kernels[static_cast<int>(kind_of(t))], persistent_blocks(device, a), threads, shared,
           device.stream, a);
  }
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> mask_matching_sums(Tensor mask_logits, Tensor targets, int64_t num_classes,
                                                      double focal_alpha, double focal_gamma) {
  Device device(targets);
  targets = whole_planes(targets);
  check_sizes(mask_logits, targets);
  mask_logits = torch::stable::contiguous(mask_logits);
  int64_t batch = mask_logits.size(0), queries = mask_logits.size(1);
  Targets t = targets_of(targets, std::nullopt, queries, num_classes, false);
  auto [areas, counts] = areas_of(device, t, mask_logits, batch);
  if (counts) launch_pairs(device, t, counts, areas, std::nullopt, 0);
  // As many splits as fill the device twice.
  unsigned tiles_q = ceil_div(queries, kQueryTile),
           tiles_m = std::max(1u, ceil_div(num_classes, kTargetTile));
  int64_t blocks = std::max<int64_t>(1, batch * tiles_q * tiles_m);
  int64_t rows = std::max<int64_t>(1, t.height * blocks / (2 * device.multiprocessors()));
  int64_t splits = ceil_div(t.height, rows);
  Tensor products = empty(areas, {3, batch, queries, num_classes}),
         totals = empty(areas, {3, batch, queries});
  Tensor partial = empty(areas, {splits, 3, batch, queries, num_classes});
  Tensor partial_totals = empty(areas, {splits, 3, batch, queries});
  Matching a{data<char>(mask_logits),
             type_of(mask_logits),
             static_cast<int>(mask_logits.size(2)),
             static_cast<int>(mask_logits.size(3)),
             static_cast<int>(batch),
             static_cast<int>(rows),
             t,
             data<float>(partial),
             data<float>(partial_totals),
             focal_of(focal_alpha, focal_gamma)};
  size_t shared = ((3 * kQueryTile + kTargetTile) * kPitch + 2 * kPixelTile + 1) * sizeof(float);
  STD_TORCH_CHECK(batch * splits < 65536 && tiles_m < 65536,
                  "segvit: mask_matching_cost: too many images or rows");
  launch(mask_matching_kernel, dim3(tiles_q, tiles_m, static_cast<unsigned>(batch * splits)), 256, shared,
         device.stream, a);
  launch(mask_sum_kernel, ceil_div(products.numel(), 256), 256, 0, device.stream, data<float>(partial),
         data<float>(products), products.numel(), static_cast<int>(splits));
  launch(mask_sum_kernel, ceil_div(totals.numel(), 256), 256, 0, device.stream, data<float>(partial_totals),
         data<float>(totals), totals.numel(), static_cast<int>(splits));
  return {products, totals, areas};
}

}  // namespace segvit::cuda
