// Rows on their way from memory to one thread, through shared memory that no other thread touches:
// the loads of the next rows stay in flight while one is computed, without registers to land in
// (H100, norm backward: with registers, 512 threads a multiprocessor had one row in flight for half
// of the time). A thread may read its pieces again until it asks for the row that takes their slot.
#pragma once

#include "redline/kernels/cuda/device/copy_async.cuh"
#include "redline/kernels/cuda/device/vector.cuh"

namespace redline::cuda {

// `pieces` of 16 bytes per thread of at most Threads; `slots` rows at once: two or three. A slot is
// named by its offset in bytes. Slots are taken in turn: `slots` rows are requested before the
// first is received, then each as soon as the oldest of those received is done with. Pieces lie
// Threads apart whatever the block has: their offsets are constants of the code. Kept: a thread's
// address stays in a register, where the compiler would find it anew for every row; norm's backward
// has none left for it.
template <int Threads, bool Kept = false>
class RowRing {
 public:
  static constexpr int slot_bytes(int pieces) { return Threads * 16 * pieces; }

  // `shared` is the block's: slots * slot_bytes(pieces). A multiple of 128 bytes, as is what a warp
  // copies: from 16 bytes off it each sector of 32 was fetched twice (H100: 0.92 to 0.82 of a
  // copy).
  __device__ __forceinline__ RowRing(char* shared, int pieces, int slots)
      : slot_bytes_(slot_bytes(pieces)), slots_(slots) {
    own_ = static_cast<uint32_t>(__cvta_generic_to_shared(shared + threadIdx.x * 16));
    if constexpr (Kept) asm volatile("" : "+r"(own_));
  }

  __device__ __forceinline__ int after(int slot) const {
    const int next = slot + slot_bytes_;
    return next == slots_ * slot_bytes_ ? 0 : next;
  }

  // Count adjacent pieces from `k` on; Aligned: `from` is a multiple of 16 bytes, and all is there.
  // Otherwise `elements` of them are copied at once, and zeros behind them.
  template <bool Aligned, typename S, int N>
  __device__ __forceinline__ void request(int slot, int k, const S* from, int elements) const {
    constexpr int count = sizeof(Packed<S, N>) / 16;
    if constexpr (Aligned) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        copy_async(piece(slot, k + i), reinterpret_cast<const int4*>(from) + i);
      }
    } else {
      constexpr int size = vector_size<S>;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const Packed<S> packed = load<S, size>(from, i * size, elements, false);
        const int4 whole = *reinterpret_cast<const int4*>(&packed);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(piece(slot, k + i)),
                     "r"(whole.x), "r"(whole.y), "r"(whole.z), "r"(whole.w)
                     : "memory");
      }
    }
  }
  // Of the row that starts at `row`.
  template <typename S, int N = vector_size<S>, bool Aligned>
  __device__ __forceinline__ void request(int slot, int k, const S* row,
                                          const Place<Aligned>& at) const {
    request<Aligned, S, N>(slot, k, row + at.col, at.end - at.col);
  }
  // Ends the request of a row: every thread calls it once per row, with or without pieces.
  __device__ __forceinline__ void commit() const { __pipeline_commit(); }

  // Waits for the next row. All but slots - 2 of those requested after it may be on their way.
  __device__ __forceinline__ void receive() const {
    if (slots_ == 2) {
      __pipeline_wait_prior(0);
    } else {
      __pipeline_wait_prior(1);
    }
  }

  // Pieces from `k` on of the row in a slot.
  template <typename S, int N>
  __device__ __forceinline__ Packed<S, N> read(int slot, int k) const {
    Packed<S, N> packed;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(packed)) / 16; ++i) {
      int4& whole = reinterpret_cast<int4*>(&packed)[i];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(whole.x), "=r"(whole.y), "=r"(whole.z), "=r"(whole.w)
                   : "r"(piece(slot, k + i))
                   : "memory");
    }
    return packed;
  }

 private:
  __device__ __forceinline__ uint32_t piece(int slot, int k) const {
    return own_ + slot + k * (Threads * 16);
  }

  uint32_t own_;  // this thread's, in shared memory
  int slot_bytes_, slots_;
};

}  // namespace redline::cuda
