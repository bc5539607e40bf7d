// Philox 4x32-10, laid out as core/philox.h says: the CPU draws the same numbers.
#pragma once

#include <cstdint>

namespace redline::cuda {

struct PhiloxKey {
  uint64_t seed, offset;
};

// The keys of the rounds, and the counter's half that all elements of a call share.
struct PhiloxRounds {
  static constexpr int count = 10;
  uint32_t step[2], keys[count][2];

  explicit __device__ __forceinline__ PhiloxRounds(PhiloxKey key) {
    const uint64_t first = key.offset / 4;
    step[0] = static_cast<uint32_t>(first);
    step[1] = static_cast<uint32_t>(first >> 32);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      keys[i][0] = static_cast<uint32_t>(key.seed) + i * 0x9E3779B9u;
      keys[i][1] = static_cast<uint32_t>(key.seed >> 32) + i * 0xBB67AE85u;
    }
  }
  // In registers from here on: the compiler would rather add again for every vector.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+r"(keys[i][0]), "+r"(keys[i][1]));
  }
};

// Written as a product of 64 bits it brings an addition of zero with it (nvcc 13.0).
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// The words of a counter: the 16-bit numbers of elements 8 * counter ... 8 * counter + 7.
__device__ __forceinline__ void philox(const PhiloxRounds& rounds, uint64_t counter,
                                       uint32_t (&words)[4]) {
  uint32_t c0 = rounds.step[0], c1 = rounds.step[1];
  uint32_t c2 = static_cast<uint32_t>(counter), c3 = static_cast<uint32_t>(counter >> 32);
#pragma unroll
  for (int round = 0; round < PhiloxRounds::count; ++round) {
    const uint64_t p0 = wide_product(0xD2511F53u, c0), p1 = wide_product(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ rounds.keys[round][0];
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ rounds.keys[round][1];
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The numbers of elements [element, element + N), two a word, the lower half first; N is 4 or 8.
// Rows of odd length start inside a counter: a second one is drawn where the numbers reach into it,
// and all are moved up in steps, so that all indices are constants. Aligned: `element` is a
// multiple of N, known to the compiler.
template <bool Aligned, int N>
__device__ __forceinline__ void draw(const PhiloxRounds& rounds, uint64_t element,
                                     uint32_t (&numbers)[N / 2]) {
  static_assert(N == 4 || N == 8);
  const int skip = static_cast<int>(element % 8);
  uint32_t drawn[8] = {}, four[4];
  philox(rounds, element / 8, four);
#pragma unroll
  for (int i = 0; i < 4; ++i) drawn[i] = four[i];
  if constexpr (!Aligned) {
    if (skip + N > 8) {
      philox(rounds, element / 8 + 1, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) drawn[4 + i] = four[i];
    }
    if (skip & 2) {
#pragma unroll
      for (int i = 0; i < 7; ++i) drawn[i] = drawn[i + 1];
    }
    if (skip & 1) {
#pragma unroll
      for (int i = 0; i < 7; ++i) drawn[i] = __funnelshift_r(drawn[i], drawn[i + 1], 16);
    }
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    numbers[i] = drawn[i];
    if (!Aligned || N == 4) numbers[i] = skip & 4 ? drawn[i + 2] : drawn[i];
  }
}

}  // namespace redline::cuda
