// Second phase of a sum over rows: [chunks, cols] partial sums to [cols], in index order.
#pragma once

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/convert.cuh"
#include "redline/kernels/cuda/launch.h"

namespace redline::cuda {
namespace {

// 32 columns by 32 threads: thread y adds chunks y, y + 32, ...; then the 32 sums are added in
// order. Bound by the latency of its loads: four are in flight.
template <typename T>
__global__ void __launch_bounds__(1024)
    sum_chunks_kernel(const float* partial, T* sums, int64_t chunks, int64_t cols) {
  __shared__ float scratch[32][33];
  const int64_t col = int64_t{blockIdx.x} * 32 + threadIdx.x;
  float total = 0.0f;
  if (col < cols) {
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += 32) {
      total += partial[chunk * cols + col];
    }
  }
  scratch[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  total = 0.0f;
#pragma unroll
  for (int y = 0; y < 32; ++y) total += scratch[y][threadIdx.x];
  sums[col] = from_float<T>(total);
}

// partial: [chunks, cols] float32, contiguous; sums: [cols], rounded once.
inline void sum_chunks(const TensorView& partial, const TensorView& sums, Stream stream) {
  const int64_t cols = partial.sizes[1];
  visit_dtype<float, bfloat16, float16>("sum_chunks", sums.dtype, [&]<typename T>() {
    launch(sum_chunks_kernel<device_type<T>>,
           {.grid = dim3(ceil_div(cols, 32)), .block = dim3(32, 32), .stream = stream},
           partial.as<const float>(), sums.as<device_type<T>>(), partial.sizes[0], cols);
  });
}

}  // namespace
}  // namespace redline::cuda
