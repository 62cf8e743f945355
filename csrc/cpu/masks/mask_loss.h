#pragma once

#include "../isa.h"

namespace segvit {

// The most rows of a strip.
constexpr int64_t kMaskRows = 32;
// Columns that MaskMatching::occurs knows together.
constexpr int64_t kMaskPiece = 64;

// Labels (integers), then masks.
enum class Target : int32_t { u8, i8, i16, i32, i64, boolean, f32, f16, bf16, f64 };

// Labels (batch, height, width) or masks (batch, count, height, width) with unit last stride; strides in
// elements.
struct MaskTargets {
  const char* data;
  Target type;
  int64_t image_stride, mask_stride, row_stride;
  int64_t height, width, count;  // count: how many classes or masks
};

// Linear interpolation along one axis: out[i] = (1 - weight[i]) in[cell[i]] + weight[i] in[cell[i] + 1].
struct MaskAxis {
  int64_t source;  // of the input; the weight of the element behind its end is 0
  const int32_t* cell;
  const float* weight;
};

// The adjoint: in[c] gets the sum of out[first[c] + j] taps[begin[c] + j], j < begin[c + 1] - begin[c], a
// multiple of 16 that may pass the end of the output by up to 15.
struct MaskAdjoint {
  const int32_t *first, *begin;
  const float* taps;
};

// Logits (batch, queries, rows.source, columns.source) with unit last stride, and their upsampling.
struct MaskEntry {
  const char* logits;
  Type type;
  int64_t image_stride, query_stride, row_stride;
  MaskAxis rows, columns;  // tables of columns go on to a multiple of 16
};

struct MaskPair {
  int32_t query, target;
};

// Everything about one call; pairs are the active ones, those of image b being first_pair[b]...first_pair[b +
// 1].
struct MaskLoss {
  MaskTargets targets;
  const MaskEntry* entries;
  int64_t num_entries, strip_rows, num_pairs;
  int64_t grid_width;  // of the widest entry
  const MaskPair* pairs;
  const int64_t* first_pair;
  float alpha, alpha_outside, gamma;  // alpha_outside: 1 - alpha, rounded once
  bool mask_ignored;
};

struct MaskLossFwd {
  MaskLoss loss;
  double* sums;  // (strips, entries, pairs, 4)
};

// What a strip adds to the gradient of a pair: rows first_cell[strip]... of its grid, kept in
// grads[(pair * rows + first_row[strip]) * columns.source]...
struct MaskGradient {
  MaskAdjoint adjoint;
  float* grads;
  const int64_t *first_cell, *first_row;  // one more than there are strips for the latter
  int64_t rows;
  char* out;  // (batch, queries, rows.source, columns.source), of the logits' type
};

struct MaskLossBwd {
  MaskLoss loss;
  const float* grad_sums;  // (entries, batch, queries, 4)
  int64_t batch, queries;
  const MaskGradient* gradients;
  const int64_t* pair_of;  // (batch, queries): index of the pair, -1 where it is not active
};

struct MaskMatching {
  MaskTargets targets;
  MaskEntry entry;
  int64_t batch, queries;
  float alpha, alpha_outside, gamma;  // alpha_outside: 1 - alpha, rounded once
  // Pieces of the image: pixels, columns a multiple of 16; chunk_targets: the most that a register of them
  // has.
  int64_t chunk_rows, chunk_columns, chunk_targets;
  // Of every mask (batch, count), row and kMaskPiece columns, whether there are pixels; null: there may be.
  const char* occurs;
  float *products, *totals;  // (3, batch, queries, count) and (3, batch, queries)
};

}  // namespace segvit

// Rows begin...end: adds how many pixels each class has to counts[class], and others to counts[-1].
SEGVIT_KERNEL(mask_loss_count, const MaskTargets& targets, int64_t image, int64_t begin, int64_t end,
              int32_t* counts, float* scratch)
// Sum of a mask. `scratch`, here and above: the image's width, rounded up to 16.
SEGVIT_KERNEL(mask_loss_area, const MaskTargets& targets, int64_t image, int64_t mask, float* area,
              float* scratch)
// One strip of rows of an image, all pairs and entries.
SEGVIT_KERNEL(mask_loss_fwd, const MaskLossFwd& args, int64_t image, int64_t strip, float* scratch)
SEGVIT_KERNEL(mask_loss_bwd, const MaskLossBwd& args, int64_t image, int64_t strip, float* scratch)
// Adds the strips of queries begin...end of the batch laid end to end, or writes zeros.
SEGVIT_KERNEL(mask_loss_bwd_sum, const MaskLossBwd& args, int64_t entry, int64_t begin, int64_t end,
              int64_t strips, float* scratch)
SEGVIT_KERNEL(mask_matching, const MaskMatching& args, int64_t image, int64_t begin, int64_t end,
              char* scratch)
