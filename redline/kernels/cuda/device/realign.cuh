// Over budget: parameters: scalars in registers; a struct of them would name nothing more.
// 16-byte loads from rows that start anywhere: a vocabulary of an odd number of classes puts every
// row at another offset. Two aligned loads, the second of which another thread has just brought
// into L1, are shifted into place; the elements of a thread are those of the aligned path.
#pragma once

#include "redline/kernels/cuda/device/vector.cuh"

namespace redline::cuda {

// How many bytes the address lies behind a multiple of 16.
__device__ __forceinline__ int misalignment(const void* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15);
}

// The 16 bytes that start `shift` bytes into the 32 of {low, high}.
__device__ __forceinline__ uint4 shift_bytes(uint4 low, uint4 high, int shift) {
  uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  }
  const int bits = (shift & 3) * 8;
  return {__funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
          __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits)};
}

// Elements [col, col + N) of a row of `cols`, `outside` beyond it (col may be negative); `shift` is
// the misalignment of row + col. No byte outside the row is read.
template <typename T>
__device__ __forceinline__ Packed<T> load_realigned(const T* row, int col, int cols, int shift,
                                                    T outside) {
  constexpr int N = vector_size<T>;
  Packed<T> result;
  if (shift == 0 && col >= 0 && col + N <= cols) {
    result = *reinterpret_cast<const Packed<T>*>(row + col);
  } else if (shift != 0 && col >= N && col + 2 * N <= cols) {
    const char* from = reinterpret_cast<const char*>(row + col) - shift;
    const uint4 low = *reinterpret_cast<const uint4*>(from);
    const uint4 high = *reinterpret_cast<const uint4*>(from + 16);
    *reinterpret_cast<uint4*>(&result) = shift_bytes(low, high, shift);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool inside = col + i >= 0 && col + i < cols;
      result.values[i] = inside ? row[col + i] : outside;
    }
  }
  return result;
}

// Vectors of a row of `cols` at col, col + step, ...; `shift` is the misalignment of each.
struct RowVectors {
  int col, step, cols, shift;
};

// Count of them; loads come before the first shift, so that all of them are in flight together.
// Aligned: shift is 0 and the row holds whole vectors, known to the compiler.
template <bool Aligned, typename T, int Count>
__device__ __forceinline__ void load_realigned(const T* row, RowVectors at,
                                               Packed<T> (&result)[Count], T outside) {
  constexpr int N = vector_size<T>;
  const int last = at.col + (Count - 1) * at.step;
  if constexpr (Aligned) {
#pragma unroll
    for (int v = 0; v < Count; ++v) {
      const int col = at.col + v * at.step;
      if (col < at.cols) {
        result[v] = *reinterpret_cast<const Packed<T>*>(row + col);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) result[v].values[i] = outside;
      }
    }
  } else if (at.shift == 0 && at.col >= 0 && last + N <= at.cols) {
#pragma unroll
    for (int v = 0; v < Count; ++v) {
      result[v] = *reinterpret_cast<const Packed<T>*>(row + at.col + v * at.step);
    }
  } else if (at.shift != 0 && at.col >= N && last + 2 * N <= at.cols) {
    const char* from = reinterpret_cast<const char*>(row + at.col) - at.shift;
    uint4 low[Count], high[Count];
#pragma unroll
    for (int v = 0; v < Count; ++v) {
      const char* address = from + int64_t{v} * at.step * static_cast<int>(sizeof(T));
      low[v] = *reinterpret_cast<const uint4*>(address);
      high[v] = *reinterpret_cast<const uint4*>(address + 16);
    }
#pragma unroll
    for (int v = 0; v < Count; ++v) {
      *reinterpret_cast<uint4*>(&result[v]) = shift_bytes(low[v], high[v], at.shift);
    }
  } else {
#pragma unroll
    for (int v = 0; v < Count; ++v) {
      result[v] = load_realigned(row, at.col + v * at.step, at.cols, at.shift, outside);
    }
  }
}

}  // namespace redline::cuda
