// What is normalised of a row that outgrows registers, held in the shared memory of a cluster's
// blocks: more of it is on its way at once, and no thread waits for its own to land.
#pragma once

#include "redline/kernels/cuda/device/copy_async.cuh"
#include "redline/kernels/cuda/norm/row_input.cuh"

namespace redline::cuda {
namespace {

// As RowInput. A thread touches its own part alone: vector v of it lies at [v][thread], first of x,
// then of the sum where a residual joins it.
template <typename T, typename Held, int V>
struct SharedRowInput {
  static constexpr int N = vector_size<T>, vectors = V;
  static constexpr int unroll = 4;  // vectors read at once: registers
  Packed<Held, N>* held;
  int threads;

  static int bytes(int threads) { return V * threads * static_cast<int>(sizeof(Packed<Held, N>)); }
  __device__ __forceinline__ void place(int4* memory) {
    threads = static_cast<int>(blockDim.x);
    held = reinterpret_cast<Packed<Held, N>*>(memory) + threadIdx.x;
  }

  __device__ __forceinline__ Packed<Held, N> vector(int v) const { return held[v * threads]; }
  __device__ __forceinline__ void forget() { asm volatile("" ::: "memory"); }

  __device__ __forceinline__ void load(const Forward& args, int64_t row, Columns<true> at) {
    if (args.residual.data == nullptr) {
      request(row_at<const Held>(args.x, row), at);
    } else {
      request(row_at<const T>(args.x, row), at);
    }
    __pipeline_commit();
  }
  __device__ __forceinline__ void load(const Forward& args, int64_t row, Columns<false> at) {
#pragma unroll 1
    for (int v = 0; v < V; ++v) {
      RowInput<T, Held, 1> one;
      one.load(args, row, at.from(v));
      held[v * threads] = one.held[0];
    }
  }
  // Waits for it; the rounded x + residual takes its place.
  __device__ __forceinline__ void receive(const Forward& args, int64_t row, Columns<true> at) {
    if (args.residual.data == nullptr) return wait_for_copies(0);
    constexpr int group = 4;  // vectors of the residual in registers
    for (int first = 0; first < V; first += group) {
      Packed<Held, N> added[group];
      load_vectors(row_at<const Held>(args.residual, row), at.from(first), added);
      wait_for_copies(0);
      float sum[group][N];
#pragma unroll
      for (int g = 0; g < group; ++g) {
        const int place = (first + g) * threads;
        const auto x = *reinterpret_cast<const Packed<T, N>*>(held + place);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[g][i] = element(x, i) + element(added[g], i);
        held[place] = pack<Held>(sum[g]);
      }
      store_vectors(row_at<Held>(args.sum, row), at.from(first), sum);
    }
  }
  __device__ __forceinline__ void receive(const Forward&, int64_t, Columns<false>) {}

 private:
  // Zeros past the row's end.
  template <typename S>
  __device__ __forceinline__ void request(const S* row, Columns<true> at) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int col = at.col + v * at.step;
      auto* to = reinterpret_cast<Packed<S, N>*>(held + v * threads);
      if (col >= at.cols) {
        *to = {};
        continue;
      }
#pragma unroll
      for (int k = 0; k < static_cast<int>(sizeof(*to)) / 16; ++k) {
        copy_async(reinterpret_cast<int4*>(to) + k, reinterpret_cast<const int4*>(row + col) + k);
      }
    }
  }
};

}  // namespace
}  // namespace redline::cuda
