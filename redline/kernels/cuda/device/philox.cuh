// Philox 4x32-10, laid out as core/philox.h says: the CPU draws the same numbers.
#pragma once

#include <cstdint>

namespace redline::cuda {

struct PhiloxKey {
  uint64_t seed, offset;
};

// Where philox() finds the counter's half that all elements of a call share, and each round's key:
// one after the other,
struct PhiloxRunning {
  uint32_t step[2], next[2];

  explicit __device__ __forceinline__ PhiloxRunning(PhiloxKey key)
      : step{static_cast<uint32_t>(key.offset / 4), static_cast<uint32_t>(key.offset / 4 >> 32)},
        next{static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)} {}

  __device__ __forceinline__ void take(int, uint32_t (&key)[2]) {
    key[0] = next[0];
    key[1] = next[1];
    next[0] += 0x9E3779B9u;
    next[1] += 0xBB67AE85u;
  }
};

// or all in registers: where there are 20 to spare, a vector takes 20 additions less.
struct PhiloxRounds {
  static constexpr int count = 10;
  uint32_t step[2], keys[count][2];

  explicit __device__ __forceinline__ PhiloxRounds(PhiloxKey key) {
    PhiloxRunning running(key);
    step[0] = running.step[0];
    step[1] = running.step[1];
#pragma unroll
    for (int i = 0; i < count; ++i) running.take(i, keys[i]);
  }
  __device__ __forceinline__ void take(int round, uint32_t (&key)[2]) const {
    key[0] = keys[round][0];
    key[1] = keys[round][1];
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
template <typename Rounds>
__device__ __forceinline__ void philox(Rounds rounds, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t c0 = rounds.step[0], c1 = rounds.step[1];
  uint32_t c2 = static_cast<uint32_t>(counter), c3 = static_cast<uint32_t>(counter >> 32);
#pragma unroll
  for (int round = 0; round < PhiloxRounds::count; ++round) {
    const uint64_t p0 = wide_product(0xD2511F53u, c0), p1 = wide_product(0xCD9E8D57u, c2);
    uint32_t key[2];
    rounds.take(round, key);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key[0];
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key[1];
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
template <bool Aligned, int N, typename Rounds>
__device__ __forceinline__ void draw(const Rounds& rounds, uint64_t element,
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
