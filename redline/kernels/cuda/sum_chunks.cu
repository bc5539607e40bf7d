#include <utility>

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/convert.cuh"
#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/launch.h"
#include "redline/kernels/cuda/sum_chunks.h"

namespace redline::cuda {
namespace {

template <typename T>
struct ChunkSum {
  const float* partial;
  T* sums;
};

// 32 columns by 32 threads: thread y adds chunks y, y + 32, ..., whose loads are in flight
// together; then the 32 sums are added in order. Launched while the first phase ends: it waits for
// that.
template <typename T, typename U>
__global__ void __launch_bounds__(1024)
    sum_chunks_kernel(ChunkSum<T> first, ChunkSum<U> second, int64_t chunks, int64_t cols) {
  __shared__ float scratch[32][33];
  const int64_t col = int64_t{blockIdx.x} * 32 + threadIdx.x;
  const float* partial = blockIdx.y == 0 ? first.partial : second.partial;
  float total = 0.0f;
  allow_next_launch();
  wait_for_previous_launch();
  if (col < cols) {
#pragma unroll 8
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
  if (blockIdx.y == 0) {
    first.sums[col] = from_float<T>(total);
  } else {
    second.sums[col] = from_float<U>(total);
  }
}

}  // namespace

void sum_chunks(ColumnSums first, ColumnSums second, Stream stream) {
  if (!first.total) std::swap(first, second);
  if (!first.total) return;
  const int64_t chunks = first.partial.sizes[0], cols = first.partial.sizes[1];
  const bool both = static_cast<bool>(second.total);
  note_choice("partial sums of ", chunks, " chunks of rows, added in index order");
  if (!both) second = first;
  visit_dtype<float, bfloat16, float16>("sum_chunks", first.total.dtype, [&]<typename T>() {
    visit_dtype<float, bfloat16, float16>("sum_chunks", second.total.dtype, [&]<typename U>() {
      launch(sum_chunks_kernel<device_type<T>, device_type<U>>,
             {.grid = dim3(ceil_div(cols, 32), both ? 2 : 1),
              .block = dim3(32, 32),
              .overlap_previous = true,
              .stream = stream},
             ChunkSum<device_type<T>>{first.partial.as<const float>(),
                                      first.total.as<device_type<T>>()},
             ChunkSum<device_type<U>>{second.partial.as<const float>(),
                                      second.total.as<device_type<U>>()},
             chunks, cols);
    });
  });
}

}  // namespace redline::cuda
