#pragma once

#include "../resize.h"

namespace segvit {

// Pixels of a row that are worked on at a time; cells over which one largest value is kept.
constexpr int kPanopticTile = 64, kPanopticCells = 16;

// The queries of an image that take part, by rising index.
struct PanopticQueries {
  const int32_t* index;
  const float* scores;
  int64_t count;
};

struct PanopticArgmax {
  const char* masks;
  Type type;
  int64_t image_stride, query_stride, row_stride;  // in elements; the last one is 1
  int64_t grid_height, grid_width;                 // of the masks
  int64_t cells_height, cells_width;               // of what is interpolated to the output
  bool resize;                                     // the latter are interpolated from the masks
  ResizeAxis cells_y, cells_x;                   // among cells of the masks, if so
  int64_t height, width;
  ResizeAxis y, x;
  bool first, last, weighted;  // σ before or after the last interpolation; score · mask is compared
  float threshold;
  const PanopticQueries* images;
  int64_t all_queries;
  int16_t* queries;  // (B, height, width)
  uint8_t* inside;   // the same
  int32_t* areas;    // (B, 3, all_queries), to be added to
  int64_t chunk;     // pixels of a row in one task, a multiple of the tile
  int64_t stride;    // cells of a row that a chunk may touch, padded
};

// Memory of one task: what lies in it and how many elements.
struct PanopticScratch {
  float* rows[2];   // [queries][stride], cells of an even and of an odd row
  float* most[2];   // [queries][stride / 16], their largest
  float* between;   // [cells of a row of masks, padded], between two of its rows
  float *bounds, *products;  // [queries, padded]: the most that a mask, and its product with the score, can be
  float* scores;    // [queries, padded]
  int32_t* counts;  // [3][queries]
};

}  // namespace segvit

// The pixels of an image in rows y0...y1 and columns x0...x1, at most a chunk of them.
SEGVIT_KERNEL(panoptic_argmax, const PanopticArgmax& args, int64_t image, int64_t y0, int64_t y1, int64_t x0,
              int64_t x1, const PanopticScratch& scratch)
