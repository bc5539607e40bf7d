// What norm's forward gives the rows from the device's row count on: zeros, by a kernel of its own,
// since most calls have no such rows and its code would stand in their way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "redline/kernels/cuda/norm/row_input.cuh"

namespace redline::cuda {
namespace {

// By 16 bytes where that is legal, otherwise by elements of two.
__device__ __forceinline__ void zero_bytes(void* data, int64_t bytes) {
  if ((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(bytes)) % 16 == 0) {
    for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) static_cast<int4*>(data)[i] = {};
  } else {
    for (int64_t i = threadIdx.x; i < bytes / 2; i += blockDim.x) static_cast<short*>(data)[i] = 0;
  }
}

__device__ __forceinline__ void zero_row(const Matrix& of, int64_t row, int cols) {
  if (of.data == nullptr) return;
  const int bytes = of.is_float32 ? 4 : 2;
  zero_bytes(static_cast<char*>(of.data) + row * of.stride * bytes, int64_t{cols} * bytes);
}

__global__ void zero_rows_kernel(const Forward args) {
  for (int64_t row = counted_rows(args) + blockIdx.x; row < args.rows; row += gridDim.x) {
    zero_row(args.y, row, args.cols);
    zero_row(args.sum, row, args.cols);
    if (threadIdx.x != 0 || args.statistics_given) continue;
    args.inverse_std[row] = 0.0f;
    if (args.mean != nullptr) args.mean[row] = 0.0f;
    if (args.amax != nullptr) args.amax[row] = 0.0f;
  }
}

inline void zero_rows(const Forward& args, Stream stream) {
  const int64_t blocks = std::min<int64_t>(args.rows, 8 * stream.sm_count);
  launch(zero_rows_kernel, {.grid = dim3(blocks), .block = dim3(256), .stream = stream}, args);
}

}  // namespace
}  // namespace redline::cuda
