// A pixel between the four cells of a mask around it.
#pragma once

#include "common.cuh"

namespace segvit::cuda {

constexpr float kHuge = 1e30f;

// A place between two cells of an axis.
struct Place {
  int before, after;
  float way;
};

// In float32, as F.interpolate finds it.
SEGVIT_DEVICE Place place_of(int i, float step, int cells) {
  float place = (static_cast<float>(i) + 0.5f) * step - 0.5f;
  place = fminf(fmaxf(place, 0.0f), static_cast<float>(cells - 1));
  int before = static_cast<int>(place);
  return {before, min(before + 1, cells - 1), place - static_cast<float>(before)};
}

// The four cells of a pixel, as offsets, and its way between them.
struct Taps {
  int upper_left, upper_right, lower_left, lower_right;
  float down, right;
};

SEGVIT_DEVICE Taps taps_of(Place row, Place column, int row_stride) {
  int upper = row.before * row_stride, lower = row.after * row_stride;
  return {upper + column.before,
          upper + column.after,
          lower + column.before,
          lower + column.after,
          row.way,
          column.way};
}

// Weights of zero must stay zero beside an infinite logit.
template <class T>
SEGVIT_DEVICE float interpolate(const T* mask, const Taps& taps, float largest) {
  auto cell = [=](int offset) { return fminf(fmaxf(to_float(mask[offset]), -largest), largest); };
  float above = cell(taps.upper_left), below = cell(taps.lower_left);
  above += taps.right * (cell(taps.upper_right) - above);
  below += taps.right * (cell(taps.lower_right) - below);
  return above + taps.down * (below - above);
}

SEGVIT_DEVICE float sigmoid(float x) { return fast_rcp(1 + fast_exp2(x * -kLog2e)); }

}  // namespace segvit::cuda
