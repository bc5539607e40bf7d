// Philox 4x32-10, laid out as core/philox.h says: the CPU draws the same numbers.
#pragma once

#include <cstdint>

namespace redline::cuda {

struct PhiloxKey {
  uint64_t seed, offset;
};

// The four numbers of elements 4 * counter ... 4 * counter + 3.
__device__ __forceinline__ void philox(PhiloxKey key, uint64_t counter, uint32_t (&numbers)[4]) {
  const uint64_t step = key.offset / 4;
  uint32_t c0 = static_cast<uint32_t>(step), c1 = static_cast<uint32_t>(step >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter), c3 = static_cast<uint32_t>(counter >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  numbers[0] = c0;
  numbers[1] = c1;
  numbers[2] = c2;
  numbers[3] = c3;
}

// The numbers of elements [element, element + N). Rows of odd length start inside a counter: one
// more is drawn and the numbers are moved up, in two steps so that all indices are constants.
// Aligned: `element` is a multiple of four, known to the compiler.
template <bool Aligned, int N>
__device__ __forceinline__ void draw(PhiloxKey key, uint64_t element, uint32_t (&numbers)[N]) {
  static_assert(N % 4 == 0);
  const uint64_t first = element / 4;
  const int skip = Aligned ? 0 : static_cast<int>(element % 4);
  uint32_t drawn[N + 4];
#pragma unroll
  for (int k = 0; k <= N / 4; ++k) {
    uint32_t four[4] = {};
    if (k < N / 4 || skip != 0) philox(key, first + k, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) drawn[4 * k + i] = four[i];
  }
  if (skip & 1) {
#pragma unroll
    for (int i = 0; i < N + 3; ++i) drawn[i] = drawn[i + 1];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) numbers[i] = skip & 2 ? drawn[i + 2] : drawn[i];
}

}  // namespace redline::cuda
