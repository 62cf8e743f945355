#pragma once

#include "isa.h"

namespace segvit {

// Where the places of an axis lie among cells: the cell before each and the share of the next one. Sixteen more
// entries than places, copies of the last.
struct ResizeAxis {
  const int32_t* cells;
  const float* shares;
};

}  // namespace segvit
