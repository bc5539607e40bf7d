// Dropout of the vectors of a [rows, cols] matrix (core/philox.h).
#pragma once

#include "redline/core/philox.h"
#include "redline/core/tensor_view.h"
#include "redline/kernels/cuda/device/philox.cuh"
#include "redline/kernels/cuda/device/vector.cuh"

namespace redline::cuda {
namespace {

// What a kernel knows of the random numbers.
struct Dropout {
  PhiloxState state;
  bool random;
  uint32_t threshold;
  float scale;
  int64_t cols;  // of the matrix that the elements are counted in

  // With the key read: for every vector of a column it took a third of the column kernel's time.
  __device__ __forceinline__ Dropout local() const {
    const PhiloxKey found = key();
    Dropout result = *this;
    result.state = {.seed = static_cast<int64_t>(found.seed),
                    .offset = static_cast<int64_t>(found.offset)};
    return result;
  }
  __device__ __forceinline__ PhiloxKey key() const {
    uint64_t seed = state.seed, offset = state.offset;
    if (state.seed_pointer != nullptr) seed = *state.seed_pointer;
    if (state.offset_pointer != nullptr) offset += *state.offset_pointer;
    return {seed, offset};
  }
  __device__ __forceinline__ void store_state(int64_t* rng_state) const {
    const PhiloxKey found = key();
    rng_state[0] = static_cast<int64_t>(found.seed);
    rng_state[1] = static_cast<int64_t>(found.offset);
  }
  // Exactly zero where the element is dropped, whatever it holds. The product is rounded by itself,
  // not with what a kernel adds to it: the same bits in all of them.
  template <bool Aligned, int N>
  __device__ __forceinline__ void apply(int64_t row, int col, float (&values)[N]) const {
    apply<Aligned>(PhiloxRunning(key()), row, col, values);
  }
  template <bool Aligned, typename Rounds, int N>
  __device__ __forceinline__ void apply(const Rounds& rounds, int64_t row, int col,
                                        float (&values)[N]) const {
    if (!random) return;
    uint32_t numbers[N / 2];
    draw<Aligned, N>(rounds, static_cast<uint64_t>(row * cols + col), numbers);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t number = i % 2 ? numbers[i / 2] >> 16 : numbers[i / 2] & 0xffffu;
      values[i] = number < threshold ? 0.0f : __fmul_rn(values[i], scale);
    }
  }
  // residual + dropout(x + bias) of one vector, before it is rounded: forward's formula, in all
  // kernels that have it.
  template <typename T, typename R, int N, bool Aligned>
  __device__ __forceinline__ void add(const Packed<T, N>& x, const MixedRow& bias,
                                      const Packed<R, N>& residual, const Place<Aligned>& at,
                                      float (&sum)[N]) const {
    add_mixed<T>(bias, at, x, sum);
    apply<Aligned>(at.row, at.col, sum);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += element(residual, i);
  }
};

inline Dropout dropout(const PhiloxState& state, bool random, double probability, int64_t cols) {
  return {state, random, philox::drop_threshold(probability),
          static_cast<float>(philox::keep_scale(probability)), cols};
}

// As forward left it on the device; with an absent one nothing is drawn.
inline PhiloxState saved_state(const TensorView& rng_state) {
  if (!rng_state) return {};
  const int64_t* state = rng_state.as<const int64_t>();
  return {.seed_pointer = state, .offset_pointer = state + 1};
}

}  // namespace
}  // namespace redline::cuda
