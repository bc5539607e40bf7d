// What is normalised of a row, held by the threads that share it.
#pragma once

#include "redline/kernels/cuda/norm/row.cuh"

namespace redline::cuda {
namespace {

// Where a row that is held comes from: from memory as it lies, or as the sum with the residual.
struct Loaded {
  template <typename In, typename Args, typename At>
  __device__ __forceinline__ void fill(In& in, const Args& args, int64_t row, At at) const {
    in.load(args, row, at);
  }
};

struct Forward : Common {
  Matrix residual, sum, bias, y;
  float epsilon, inverse_cols;
  bool statistics_given;
  float* amax;  // or null

  __device__ __forceinline__ Loaded source() const { return {}; }
};

// What is normalised, as it lies in memory: half the registers of its float32, and so twice the
// threads that a multiprocessor has loads in flight for. Held: what residual and sum hold; float32
// without alignment, whatever they hold.
template <typename T, typename Held, int V>
struct RowInput {
  static constexpr int N = vector_size<T>, vectors = V;
  static constexpr int unroll = V;  // registers have no index
  Packed<Held, N> held[V];

  __device__ __forceinline__ Packed<Held, N> vector(int v) const { return held[v]; }
  // See forget_wide().
  __device__ __forceinline__ void forget() { forget_wide(held); }

  // x, or the rounded x + residual, which is stored on the way.
  __device__ __forceinline__ void load(const Forward& args, int64_t row, Columns<true> at) {
    if (args.residual.data == nullptr) return reload(args, row, at);
    Packed<T, N> x[V];
    load_vectors(row_at<const T>(args.x, row), at, x);
    load_vectors(row_at<const Held>(args.residual, row), at, held);
    float sum[V][N];
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[v][i] = element(x[v], i) + element(held[v], i);
      held[v] = pack<Held>(sum[v]);
    }
    store_vectors(row_at<Held>(args.sum, row), at, sum);
  }
  __device__ __forceinline__ void load(const Forward& args, int64_t row, Columns<false> at) {
    float values[V][N];
    take_vectors<T>(row_of(args.x, row), at, values,
                    [](float& value, float loaded) { value = loaded; });
    if (args.residual.data != nullptr) {
      take_vectors<T>(row_of(args.residual, row), at, values,
                      [](float& value, float loaded) { value += loaded; });
#pragma unroll
      for (int v = 0; v < V; ++v) {
        store_mixed<T>(args.sum.data, args.sum.is_float32, row * args.sum.stride,
                       at.col + v * at.step, at.cols, false, values[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) held[v] = pack<Held>(values[v]);
  }

  // Once more from L2: the sum when there is a residual.
  template <bool Aligned>
  __device__ __forceinline__ void reload(const Forward& args, int64_t row, Columns<Aligned> at) {
    const Matrix& from = args.residual.data != nullptr ? args.sum : args.x;
    if constexpr (Aligned) {
      load_vectors(row_at<const Held>(from, row), at, held);
    } else {
      float values[V][N];
      take_vectors<T>(row_of(from, row), at, values,
                      [](float& value, float loaded) { value = loaded; });
#pragma unroll
      for (int v = 0; v < V; ++v) held[v] = pack<Held>(values[v]);
    }
  }
};

}  // namespace
}  // namespace redline::cuda
