#pragma once

#include "../isa.h"

namespace segvit {

// How results lie: pixels, or words of 32 of them along the rows or along the columns.
enum class BinaryLayout : int32_t { pixels, rows, columns };

// Rows of the output that are made at a time: a word of every column. Columns of a block, whose bits are one element
// of the tile.
constexpr int kBinaryRows = 32;
constexpr int kBinaryBlock = 16;

// Places of the pixels of one axis, align_corners=False: the cell before, the share of the next one, and the pixels
// first...last that a box covers. Padded to whole blocks with the last pixel's.
struct BinaryAxis {
  const int32_t* cell;
  const float* weight;
  int64_t cells, size, first, last;
};

// One mask and where its results go.
struct BinaryMask {
  const char* logits;
  Type type;
  int64_t row_stride;
  BinaryAxis y, x;
  float threshold;
  BinaryLayout layout;
  char* out;
};

// Memory of one task.
struct BinaryScratch {
  float* cells;        // [grid width, padded]: a row of the grid, less the threshold
  float *upper, *lower;  // [width, padded]: two rows of the grid, upsampled along x
  int32_t* spans;      // [grid height][2]: first cell above the threshold, and the one after the last
  uint16_t* tile;      // [block][32]: bits of 16 columns of a row
};

// Area and box of the rows of one task.
struct BinaryStats {
  int32_t area, left, top, right, bottom;
};

}  // namespace segvit

// Rows y0...y1 of a mask; y0 is a multiple of 32.
SEGVIT_KERNEL(mask_binarize, const BinaryMask& mask, int64_t y0, int64_t y1, const BinaryScratch& scratch,
              BinaryStats& stats)
