#pragma once

#include "../resize.h"

namespace segvit {

// Pixels of a row that are made at a time; 64-bit words of pixels, if hard, or else pixels, after which products are
// taken.
constexpr int kIouChunk = 512, kIouWords = 64, kIouPixels = 512;

// One set of masks; strides in elements, the last one is 1.
struct IouMasks {
  const char* data;
  Type type;
  bool boolean;  // in place of the type
  int64_t image_stride, mask_stride, row_stride;
  int64_t count, height, width;
  bool resize;
  ResizeAxis y, x;
};

struct MaskIou {
  IouMasks sides[2];
  int64_t height, width;
  bool soft;
  float threshold;
};

// Memory of one task. The sums of a part are those of pairs, of the first masks and of the second.
struct IouScratch {
  float* line;      // [cells of a row, padded], between two rows
  float* values;    // [both counts][kIouPixels], if soft
  uint64_t* bits;   // [both counts][kIouWords], if hard
  double* sums;     // of this part, if soft
  int32_t* counts;  // of the image, to be added to, if hard
};

}  // namespace segvit

// Rows y0...y1 of an image.
SEGVIT_KERNEL(mask_iou, const MaskIou& args, int64_t image, int64_t y0, int64_t y1, const IouScratch& scratch)
