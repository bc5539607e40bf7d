// Rows on their way from memory to one thread, through shared memory that no other thread touches:
// the loads of two rows stay in flight while a third is computed, without registers to land in
// (H100, norm backward: with registers, 512 threads a multiprocessor had one row in flight for half
// of the time).
#pragma once

#include <cuda_pipeline.h>

#include "redline/kernels/cuda/device/vector.cuh"

namespace redline::cuda {

// V vectors of two inputs, which hold X and T, as they lie in memory.
template <typename X, typename T, int V>
struct RowPair {
  static constexpr int N = vector_size<T>;
  Packed<X, N> x[V];
  Packed<T, N> y[V];
};

// Threads: of the block. request() and receive() come in turn, each once per row; up to `slots - 1`
// requests may be open. A thread that has no row left still calls request(), with null rows.
template <typename X, typename T, int V, int Threads>
struct RowRing {
  static constexpr int N = vector_size<T>, slots = 3;
  static constexpr int x_pieces = sizeof(Packed<X, N>) / 16, pieces = V * (x_pieces + 1);
  static constexpr int shared_bytes = slots * pieces * Threads * 16;
  int4* memory;  // [slots][pieces][Threads]
  int requested = 0, received = 0;

  __device__ __forceinline__ explicit RowRing(void* shared)
      : memory(static_cast<int4*>(shared) + threadIdx.x) {}

  __device__ __forceinline__ void request(const X* x, const T* y, Columns<true> at) {
    int4* to = memory + requested * pieces * Threads;
    requested = requested + 1 == slots ? 0 : requested + 1;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int col = at.col + v * at.step;
      if (x != nullptr && col < at.cols) {
#pragma unroll
        for (int k = 0; k < x_pieces; ++k) {
          __pipeline_memcpy_async(to + (v * (x_pieces + 1) + k) * Threads,
                                  reinterpret_cast<const int4*>(x + col) + k, 16);
        }
        __pipeline_memcpy_async(to + (v * (x_pieces + 1) + x_pieces) * Threads, y + col, 16);
      }
    }
    __pipeline_commit();
  }

  // Zeros past the row's end.
  __device__ __forceinline__ void receive(RowPair<X, T, V>& out, Columns<true> at) {
    __pipeline_wait_prior(slots - 2);
    const int4* from = memory + received * pieces * Threads;
    received = received + 1 == slots ? 0 : received + 1;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.x[v] = {};
      out.y[v] = {};
      if (at.col + v * at.step >= at.cols) continue;
#pragma unroll
      for (int k = 0; k < x_pieces; ++k) {
        reinterpret_cast<int4*>(&out.x[v])[k] = from[(v * (x_pieces + 1) + k) * Threads];
      }
      reinterpret_cast<int4&>(out.y[v]) = from[(v * (x_pieces + 1) + x_pieces) * Threads];
    }
  }
};

}  // namespace redline::cuda
