#pragma once

#include "../isa.h"

namespace segvit {

// Pixels whose σ are held at a time; queries whose products are summed before they join a score (every score
// is the sum of these sums, in order, whichever way it is computed); classes of one 8-bit product.
constexpr int kArgmaxTile = 64, kArgmaxBlock = 64, kArgmaxClasses = 6;

// Class probabilities in 8 bits: p[c][q] ≈ step[c]·k[q], 0 ≤ k ≤ 255 (AVX2: 127), and the score of class c lies in
// [scale·Σk·σ8 + low, ... + width] for σ8 = round(255 σ).
struct SemanticBytes {
  const uint8_t* values;  // [class / 6][query / 4][6][4]; null: none
  const int32_t* bias;    // 128·Σk, as the product takes σ8 − 128
  const float *scale, *low, *width;
};

// One prediction of an image; strides in elements, the last one is 1.
struct SemanticView {
  const char* mask;
  int64_t query_stride, row_stride;
  int32_t height, width;
  double affine[4];
  int32_t top, left, bottom, right, group;
  int32_t queries;       // not pruned
  const int32_t* order;  // of these, by falling class mass
  const float* probs;    // [classes][probs_stride], queries in that order
  int64_t probs_stride;
  SemanticBytes bytes;
};

// The tokens and classes that decide most pixels; no tokens: none.
struct SemanticHead {
  int32_t queries, classes;
  const int32_t* index;  // the classes
  const float* rest;     // what other tokens may add to each
  float outside;         // the largest score of any other class
};

struct SemanticImage {
  const SemanticView* views;
  int64_t count;
  SemanticHead head;
};

struct SemanticArgmax {
  const SemanticImage* images;
  Type type;
  int64_t height, width, classes;
  bool sigmoid, wide;  // labels are int16
  char* labels;
  float* scores;           // null: not asked for; with `best`, probabilities
  int64_t best;            // 0, or how many classes and probabilities of every pixel, as [image][best][pixel]
  int64_t chunk;           // pixels of a row that are worked on at a time, a multiple of the tile
  int64_t turn;            // classes whose scores are held at a time
  int64_t rows_stride;     // cells of a row that a chunk may touch, padded
};

// Memory of one task: what lies in it and how many elements.
struct SemanticScratch {
  float* rows;      // [queries or one block of them][rows_stride], interpolated between two rows of cells
  float* sigma;     // [the same][tile]
  int8_t* bytes;    // [queries / 4][tile][4]
  float* scores;    // [turn][chunk]
  float* upper;     // [class / 6][tile]
  int32_t *taps, *some_taps;        // [chunk] left cell of every pixel, and of the pixels still open
  float *fractions, *some_fractions;  // [chunk] share of the right cell
  float *weights, *some_weights;    // [chunk] share of a view in the mean
  float *groups, *members;          // [chunk] how many cover a pixel
  float* best;                        // [chunk]
  int32_t *labels, *open, *open_labels;  // [chunk]
  int32_t* list;                      // [class, padded]
  float *totals, *best_scores;        // [chunk], [best][chunk]
  int32_t* best_labels;               // [best][chunk]
};

}  // namespace segvit

// The pixels of an image in rows y0...y1 and columns x0...x1, at most a chunk of them.
SEGVIT_KERNEL(semantic_argmax, const SemanticArgmax& args, int64_t image, int64_t y0, int64_t y1, int64_t x0,
              int64_t x1, const SemanticScratch& scratch)
