// Philox 4x32-10 by vectors of counters (core/philox.h), for the per-instruction-set sources.
#pragma once

#include "redline/core/philox.h"
#include "redline/kernels/cpu/block.h"
#include "redline/kernels/cpu/vector_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace redline::cpu::REDLINE_ISA {
namespace {

// One 32-bit word of a counter per 64-bit lane; the upper halves hold anything.
using UInt64s __attribute__((vector_size(vector_bytes))) = uint64_t;

// Lower half of each lane times `factor`, 64 bits.
REDLINE_INLINE UInt64s multiply_words(UInt64s words, uint32_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<UInt64s>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(words), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<UInt64s>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(words), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
  return reinterpret_cast<UInt64s>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(words), _mm_set1_epi64x(factor)));
#else
  return (words & 0xffffffffu) * factor;
#endif
}

constexpr int counters_at_once = lanes<double>;

constexpr int per_counter = 8;

// The numbers of the counters [first, first + counters_at_once), in order, into `to`.
REDLINE_INLINE void draw(int64_t seed, int64_t offset, uint64_t first, uint16_t* to) {
  UInt64s index;
  for (int i = 0; i < counters_at_once; ++i) index[i] = static_cast<uint64_t>(i);
  index += first;
  const uint64_t step = static_cast<uint64_t>(offset) / 4;
  UInt64s c0 = UInt64s{} + step, c1 = UInt64s{} + (step >> 32), c2 = index, c3 = index >> 32;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < philox::rounds; ++round) {
    const UInt64s p0 = multiply_words(c0, philox::multiplier_0);
    const UInt64s p1 = multiply_words(c2, philox::multiplier_1);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c1 = p1;
    c3 = p0;
    k0 += philox::weyl_0;
    k1 += philox::weyl_1;
  }
  const UInt64s low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
  uint64_t numbers[2 * counters_at_once];  // counter by counter: low, high, low, high ...
  for (int64_t i = 0; i < counters_at_once; ++i) {
    numbers[2 * i] = low[i];
    numbers[2 * i + 1] = high[i];
  }
  memcpy(to, numbers, sizeof(numbers));
}

// What dropout multiplies each of `count` elements from `element` on by: `scale`, or 0 where the
// element is dropped.
template <typename Acc>
struct DropoutBlock {
  alignas(64) uint16_t numbers[block_size + per_counter * (counters_at_once + 1)];
  Block<Acc> factors;

  const Acc* fill(const PhiloxState& state, int64_t element, int count, double probability) {
    const int skip = static_cast<int>(element % per_counter);
    for (int i = 0; i < skip + count; i += per_counter * counters_at_once) {
      const uint64_t first = static_cast<uint64_t>(element + i - skip) / per_counter;
      draw(state.seed, state.offset, first, numbers + i);
    }
    const uint32_t threshold = philox::drop_threshold(probability);
    const Acc scale = static_cast<Acc>(philox::keep_scale(probability));
    const uint16_t* from = numbers + skip;
    for (int i = 0; i < count; ++i) factors.values[i] = from[i] < threshold ? 0 : scale;
    return factors.values;
  }
};

// Exactly zero where the element is dropped, whatever it holds.
template <typename Acc>
REDLINE_INLINE Vector<Acc> drop(Vector<Acc> v, Vector<Acc> factor) {
  return select(factor == 0, Vector<Acc>{}, v * factor);
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
