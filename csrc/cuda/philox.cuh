// Dropout bits, the same as in segvit_kernels/ops/_philox.py.
#pragma once

#include "common.cuh"

namespace segvit::cuda {

// Which of eight neighbouring keys are kept, one bit each: Philox4x32-10, 16 of its bits a key.
SEGVIT_DEVICE uint32_t keep_bits(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t threshold) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint32_t words[4] = {c0, c1, c2, c3}, bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    bits |= static_cast<uint32_t>((words[i / 2] >> i % 2 * 16 & 0xffff) >= threshold) << i;
  return bits;
}

}  // namespace segvit::cuda
