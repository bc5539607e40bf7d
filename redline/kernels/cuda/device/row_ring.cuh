// Rows on their way from memory to one thread, through shared memory that no other thread touches:
// the loads of the next rows stay in flight while one is computed, without registers to land in
// (H100, norm backward: with registers, 512 threads a multiprocessor had one row in flight for half
// of the time). A thread may read its pieces again until it asks for the row that takes their slot.
#pragma once

#include <cuda_pipeline.h>

#include "redline/kernels/cuda/device/vector.cuh"

namespace redline::cuda {

// `pieces` of 16 bytes per thread and row, `threads` per row, `slots` rows at once: two or three.
// Rows are requested in turn: `slots` of them before the first is received, then each as soon as
// the oldest of those received is done with.
class RowRing {
 public:
  // `shared` is the group's own part: slots * pieces * threads * 16 bytes.
  __device__ __forceinline__ RowRing(int4* shared, int pieces, int threads, int thread, int slots)
      : memory_(shared + thread), pieces_(pieces), threads_(threads), slots_(slots) {}

  // Where piece `k` of the row that is requested next goes.
  __device__ __forceinline__ int4* target(int k) const { return at(requested_) + k * threads_; }
  // Count adjacent pieces from `k` on; Aligned: `from` is a multiple of 16 bytes, and all is there.
  // Otherwise `elements` of them are copied at once, and zeros behind them.
  template <bool Aligned, typename S, int N>
  __device__ __forceinline__ void request(int k, const S* from, int elements) const {
    constexpr int count = sizeof(Packed<S, N>) / 16;
    if constexpr (Aligned) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        __pipeline_memcpy_async(target(k + i), reinterpret_cast<const int4*>(from) + i, 16);
      }
    } else {
      constexpr int size = vector_size<S>;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const Packed<S> packed = load<S, size>(from, i * size, elements, false);
        *target(k + i) = *reinterpret_cast<const int4*>(&packed);
      }
    }
  }
  // Ends the request of a row: every thread calls it once per row, with or without pieces.
  __device__ __forceinline__ void commit() {
    __pipeline_commit();
    requested_ = requested_ + 1 == slots_ ? 0 : requested_ + 1;
  }

  // Waits for the next row. All but slots - 2 of those requested after it may be on their way.
  __device__ __forceinline__ void receive() {
    if (slots_ == 2) {
      __pipeline_wait_prior(0);
    } else {
      __pipeline_wait_prior(1);
    }
    last_ = next_;
    next_ = next_ + 1 == slots_ ? 0 : next_ + 1;
  }
  // The slot of the row that was received last.
  __device__ __forceinline__ int last() const { return last_; }

  // Pieces from `k` on of the row in a slot.
  template <typename S, int N>
  __device__ __forceinline__ Packed<S, N> read(int slot, int k) const {
    Packed<S, N> packed;
    const int4* row = at(slot);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(packed)) / 16; ++i) {
      reinterpret_cast<int4*>(&packed)[i] = row[(k + i) * threads_];
    }
    return packed;
  }

 private:
  __device__ __forceinline__ int4* at(int slot) const {
    return memory_ + slot * pieces_ * threads_;
  }

  int4* memory_;  // [slots][pieces][threads]
  int pieces_, threads_, slots_;
  int requested_ = 0, last_ = 0, next_ = 0;
};

}  // namespace redline::cuda
