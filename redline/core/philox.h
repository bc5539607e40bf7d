// The state of the counter-based random numbers of one call: Philox 4x32-10 (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011), laid out as cuRAND does:
//   key = seed, counter = {offset / 4, element / 8}, two 64-bit halves.
// An element's number is 16 bits: of word element / 2 % 4 the lower half where it is even, the
// upper half where it is odd. 32 bits took twice the multiplications, which bounded the kernel
// (H200: 0.66 of a copy). The same state gives the same numbers on every device.
#pragma once

#include <cstdint>

namespace redline {

// Element i is dropped where its number is below drop_threshold(probability).
struct PhiloxState {
  int64_t seed = 0;
  int64_t offset = 0;
  // Where set, on the device that runs the kernel: seed is *seed_pointer, and *offset_pointer is
  // added to offset. A graph replays with what they hold then.
  const int64_t* seed_pointer = nullptr;
  const int64_t* offset_pointer = nullptr;
};

namespace philox {

inline constexpr uint32_t multiplier_0 = 0xD2511F53u, multiplier_1 = 0xCD9E8D57u;
inline constexpr uint32_t weyl_0 = 0x9E3779B9u, weyl_1 = 0xBB67AE85u;
inline constexpr int rounds = 10;
// What one call takes of a generator's offsets: every element draws within one counter.
inline constexpr int64_t offset_step = 4;

// Of 2^16: elements are dropped with the nearest multiple of 2^-16 to the probability.
constexpr uint32_t drop_threshold(double probability) {
  const double nearest = probability * 65536.0 + 0.5;
  return static_cast<uint32_t>(nearest);
}

// What a kept element is multiplied by.
constexpr double keep_scale(double probability) {
  return probability < 1 ? 1 / (1 - probability) : 0;
}

}  // namespace philox
}  // namespace redline
