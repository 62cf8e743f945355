// Kernels of the binary masks; the launcher and what it hands over stand in mask_binarize.cpp.
//
// Between two rows of the grid, a *band*, logits are linear in y: both rows are upsampled along x and a register of
// columns then goes down the band with two products a pixel row. Where both rows are below the threshold, or both above
// it, nothing is computed: cells tell for a band, upsampled pixels for a register. 32 rows are made as bits; pixels,
// words and statistics come from those bits, so that all layouts agree.
#include "mask_binarize.h"

#include "../simd.h"

namespace segvit::SEGVIT_ISA {

namespace {

constexpr float kHuge = 1e30f;   // stands for infinity: infinite logits times weights of 0 are not numbers
constexpr float kSafe = 1e-30f;  // above it a product with a share is not 0

constexpr int kRows = kBinaryRows, kBlock = kBinaryBlock;

// One bit a column for 16 columns, lowest first, where both registers' worth of values are above `least`.
SEGVIT_INLINE uint32_t above(const Vec* v, float least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v[0], _mm512_set1_ps(least), _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kBlock / kWidth; ++i) bits |= bits_of(v[i] > least) << (i * kWidth);
  return bits;
#endif
}

constexpr int kVecs = kBlock / kWidth;

template <class T>
SEGVIT_INLINE void read_cells(const T* row, int64_t n, float threshold, float* out) {
  auto cell = [&](Vec v) {
    // A logit that is not a number counts as the lowest.
    return vmin(vmax(v, splat(-kHuge)), splat(kHuge)) - threshold;
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, cell(load(row + i)));
  if (i < n) store_some(out + i, n - i, cell(load_some(row + i, n - i)));
  // What registers read beyond the end is a number.
  for (int64_t last = n; last < n + kBlock; ++last) out[last] = out[n - 1];
}

// Row r of the grid, less the threshold.
void fetch(const BinaryMask& mask, int64_t r, float* out) {
  const char* row = mask.logits + r * mask.row_stride * size_of(mask.type);
  if (mask.type == Type::f32)
    read_cells(reinterpret_cast<const float*>(row), mask.x.cells, mask.threshold, out);
  else if (mask.type == Type::f16)
    read_cells(reinterpret_cast<const f16*>(row), mask.x.cells, mask.threshold, out);
  else
    read_cells(reinterpret_cast<const bf16*>(row), mask.x.cells, mask.threshold, out);
}

// First cell above 0 and the one after the last.
void find_span(const float* cells, int64_t n, int32_t* span) {
  int64_t first = 0, last = n;
  while (first < n && !(cells[first] > 0)) ++first;
  while (last > first && !(cells[last - 1] > 0)) --last;
  span[0] = static_cast<int32_t>(first), span[1] = static_cast<int32_t>(last);
}

struct Blocks {
  int64_t first, last;
};

// Blocks of the columns that cells first...last have a share in, inside the box.
Blocks blocks_of(const BinaryAxis& x, int64_t first, int64_t last) {
  if (first >= last) return {0, 0};
  auto reach = [&](int64_t cell) {  // the first column at this cell or after it
    int64_t low = x.first, high = x.last;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (x.cell[middle] < cell) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  int64_t begin = reach(first - 1), end = reach(last);
  return begin < end ? Blocks{begin / kBlock, (end + kBlock - 1) / kBlock} : Blocks{0, 0};
}

// Upsamples cells along x for some blocks of columns.
void stretch(const float* cells, const BinaryAxis& x, Blocks blocks, float* out) {
  for (int64_t i = blocks.first * kBlock; i < blocks.last * kBlock; i += kWidth) {
    int32_t base = x.cell[i];
    Vec weight = load(x.weight + i), left, right;
    if (x.cell[i + kWidth - 1] + 1 - base < kWidth) {
      IVec index = load_ints(x.cell + i) - base;
      Vec table = load(cells + base);
      left = permute(table, index), right = permute(table, index + 1);
    } else {
      for (int j = 0; j < kWidth; ++j) left[j] = cells[x.cell[i + j]], right[j] = cells[x.cell[i + j] + 1];
    }
    store(out + i, left * (1 - weight) + right * weight);
  }
}

// Bits of rows y...end, all in one band, of some blocks.
void fill_band(const BinaryMask& mask, const float* upper, const float* lower, Blocks blocks, int64_t y, int64_t end,
               uint16_t* tile) {
  const float* weight = mask.y.weight;
  int64_t row = y % kRows;
  for (int64_t b = blocks.first; b < blocks.last; ++b) {
    Vec a[kVecs], c[kVecs];
    for (int i = 0; i < kVecs; ++i) a[i] = load(upper + b * kBlock + i * kWidth);
    for (int i = 0; i < kVecs; ++i) c[i] = load(lower + b * kBlock + i * kWidth);
    if (!(above(a, 0) | above(c, 0))) continue;
    uint16_t* bits = tile + b * kRows + row;
    if ((above(a, kSafe) & above(c, kSafe)) == 0xffff) {
      for (int64_t i = 0; i < end - y; ++i) bits[i] = 0xffff;
      continue;
    }
    for (int64_t i = 0; i < end - y; ++i) {
      float share = weight[y + i];
      Vec v[kVecs];
      for (int k = 0; k < kVecs; ++k) v[k] = a[k] * (1 - share) + c[k] * share;
      bits[i] = static_cast<uint16_t>(above(v, 0));
    }
  }
}

// 16 pixels of a row as bytes; `n` of them exist.
SEGVIT_INLINE void put_pixels(char* out, uint32_t bits, int64_t n) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  constexpr Bytes kBit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint64_t low = (bits & 0xff) * 0x0101010101010101ull, high = (bits >> 8 & 0xff) * 0x0101010101010101ull;
  uint64_t halves[2] = {low, high};
  Bytes v;
  __builtin_memcpy(&v, halves, 16);
  v = (Bytes)((v & kBit) != 0) & 1;
  __builtin_memcpy(out, &v, n < 16 ? n : 16);
}

// 32 rows of 16 columns to a word of 32 rows for every column.
SEGVIT_INLINE void transpose(const uint16_t* tile, uint32_t* words) {
#if defined(__AVX512BW__)
  __m512i rows = _mm512_loadu_si512(tile);
  for (int c = kBlock - 1; c >= 0; --c) {
    words[c] = _mm512_movepi16_mask(rows);
    rows = _mm512_add_epi16(rows, rows);
  }
#elif defined(__AVX2__)
  __m256i one = _mm256_loadu_si256((const __m256i*)tile), two = _mm256_loadu_si256((const __m256i*)(tile + 16));
  __m256i byte = _mm256_set1_epi16(255);
  // Packing takes 8 of `one` and of `two` in turns; the permutation puts rows into order again.
  __m256i low = _mm256_permute4x64_epi64(
      _mm256_packus_epi16(_mm256_and_si256(one, byte), _mm256_and_si256(two, byte)), 0xd8);
  __m256i high = _mm256_permute4x64_epi64(
      _mm256_packus_epi16(_mm256_srli_epi16(one, 8), _mm256_srli_epi16(two, 8)), 0xd8);
  for (int c = 7; c >= 0; --c) {
    words[c] = static_cast<uint32_t>(_mm256_movemask_epi8(low));
    words[c + 8] = static_cast<uint32_t>(_mm256_movemask_epi8(high));
    low = _mm256_add_epi8(low, low), high = _mm256_add_epi8(high, high);
  }
#else
  for (int c = 0; c < kBlock; ++c) words[c] = 0;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kBlock; ++c) words[c] |= (tile[r] >> c & 1u) << r;
#endif
}

// A group of rows from its bits; those outside `blocks` are 0.
void put(const BinaryMask& mask, const uint16_t* tile, Blocks blocks, int64_t y0, int64_t y1) {
  int64_t width = mask.x.size, rows = y1 - y0;
  if (mask.layout == BinaryLayout::pixels) {
    __builtin_memset(mask.out + y0 * width, 0, rows * width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = blocks.first; b < blocks.last; ++b)
        if (uint32_t bits = tile[b * kRows + r])
          put_pixels(mask.out + (y0 + r) * width + b * kBlock, bits, width - b * kBlock);
  } else if (mask.layout == BinaryLayout::rows) {
    int64_t words = (width + 31) / 32;
    __builtin_memset(mask.out + y0 * words * 4, 0, rows * words * 4);
    for (int64_t r = 0; r < rows; ++r) {
      uint16_t* out = reinterpret_cast<uint16_t*>(mask.out) + (y0 + r) * words * 2;
      for (int64_t b = blocks.first; b < blocks.last; ++b) out[b] = tile[b * kRows + r];
    }
  } else {
    int64_t words = (mask.y.size + 31) / 32;
    uint32_t* out = reinterpret_cast<uint32_t*>(mask.out) + y0 / 32;
    for (int64_t x = 0; x < blocks.first * kBlock && x < width; ++x) out[x * words] = 0;
    for (int64_t b = blocks.first; b < blocks.last; ++b) {
      uint32_t column[kBlock];
      transpose(tile + b * kRows, column);
      for (int64_t c = 0; c < min_of<int64_t>(kBlock, width - b * kBlock); ++c)
        out[(b * kBlock + c) * words] = column[c];
    }
    for (int64_t x = blocks.last * kBlock; x < width; ++x) out[x * words] = 0;
  }
}

void count(const uint16_t* tile, Blocks blocks, int64_t y0, BinaryStats& stats) {
  uint16_t rows[kRows] = {};
  for (int64_t b = blocks.first; b < blocks.last; ++b) {
    const uint16_t* bits = tile + b * kRows;
    uint32_t any = 0;
    for (int r = 0; r < kRows; ++r) rows[r] |= bits[r], any |= bits[r];
    if (!any) continue;
    for (int r = 0; r < kRows; r += 4) {
      uint64_t four;
      __builtin_memcpy(&four, bits + r, 8);
      stats.area += __builtin_popcountll(four);
    }
    stats.left = min_of<int32_t>(stats.left, b * kBlock + __builtin_ctz(any));
    stats.right = max_of<int32_t>(stats.right, b * kBlock + 32 - __builtin_clz(any));
  }
  for (int r = 0; r < kRows; ++r)
    if (rows[r]) {
      stats.top = min_of<int32_t>(stats.top, y0 + r);
      stats.bottom = max_of<int32_t>(stats.bottom, y0 + r + 1);
    }
}

}  // namespace

void mask_binarize(const BinaryMask& mask, int64_t y0, int64_t y1, const BinaryScratch& s, BinaryStats& stats) {
  const BinaryAxis &y = mask.y, &x = mask.x;
  int64_t blocks = (x.size + kBlock - 1) / kBlock;
  int64_t first = max_of(y0, y.first), last = min_of(y1, y.last);
  auto below = [&](int64_t cell) { return min_of<int64_t>(cell + 1, y.cells - 1); };
  // Where the rows of the grid are above the threshold.
  if (first < last)
    for (int64_t r = y.cell[first]; r <= below(y.cell[last - 1]); ++r) {
      fetch(mask, r, s.cells);
      find_span(s.cells, x.cells, s.spans + 2 * r);
    }
  int64_t held[2] = {-1, -1};
  Blocks held_blocks[2];
  float* rows[2] = {s.upper, s.lower};
  for (int64_t top = y0; top < y1; top += kRows) {
    int64_t bottom = min_of(top + kRows, y1);
    Blocks used{blocks, 0};
    __builtin_memset(s.tile, 0, blocks * kRows * sizeof(uint16_t));
    for (int64_t begin = max_of(top, first); begin < min_of(bottom, last);) {
      int64_t cell = y.cell[begin], end = begin + 1;
      while (end < min_of(bottom, last) && y.cell[end] == cell) ++end;
      const int32_t *a = s.spans + 2 * cell, *b = s.spans + 2 * below(cell);
      // An empty span lies past the last cell.
      Blocks here = blocks_of(x, min_of(a[0], b[0]), max_of(a[0] < a[1] ? a[1] : 0, b[0] < b[1] ? b[1] : 0));
      if (here.first < here.last) {
        // A row that is held may serve for the band below it.
        if (held[1] == cell && held[0] != cell) {
          float* kept = rows[0];
          rows[0] = rows[1], rows[1] = kept;
          held[0] = held[1], held_blocks[0] = held_blocks[1], held[1] = -1;
        }
        int64_t needed[2] = {cell, below(cell)};
        for (int i = 0; i < 2; ++i) {
          if (held[i] == needed[i] && held_blocks[i].first <= here.first && here.last <= held_blocks[i].last)
            continue;
          fetch(mask, needed[i], s.cells);
          stretch(s.cells, x, here, rows[i]);
          held[i] = needed[i], held_blocks[i] = here;
        }
        fill_band(mask, rows[0], rows[1], here, begin, end, s.tile);
        used = {min_of(used.first, here.first), max_of(used.last, here.last)};
      }
      begin = end;
    }
    if (used.first >= used.last) used = {0, 0};
    // Columns of a block that lie outside the box.
    auto cut = [&](int64_t block, uint32_t keep) {
      if (block >= used.first && block < used.last)
        for (int r = 0; r < kRows; ++r) s.tile[block * kRows + r] &= keep;
    };
    cut(x.first / kBlock, 0xffffu << (x.first % kBlock));
    if (x.last % kBlock) cut(x.last / kBlock, (1u << (x.last % kBlock)) - 1);
    put(mask, s.tile, used, top, bottom);
    count(s.tile, used, top, stats);
  }
}

}  // namespace segvit::SEGVIT_ISA
