// Sum of squares over a list of tensors (kernels/gradient_norm.h). A block sums one chunk of one
// tensor in float64, eight accesses in flight per thread; one block then adds the chunks. The order
// is a function of the shapes alone. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/tensor_batch.cuh"
#include "redline/kernels/gradient_norm.h"

namespace redline {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int vectors = 8;  // accesses in flight per thread
constexpr int step_elements = threads * vectors * 4;
constexpr int finish_threads = 1024;
static_assert(gradient_chunk % step_elements == 0);

using Batch = TensorBatch<GradientTensor, 1024>;
static_assert(sizeof(Batch) + 64 <= 32764, "kernel parameters");

// The sum over the Threads of a block, in thread 0: a butterfly in each warp, then the warps in
// index order.
template <int Threads>
__device__ double block_sum(double value) {
  __shared__ double sums[Threads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x != 0) return 0.0;
  double total = 0.0;
  for (int warp = 0; warp < Threads / 32; ++warp) total += sums[warp];
  return total;
}

// The chunk of a block: its tensor and its elements.
struct Chunk {
  const GradientTensor& tensor;
  int64_t begin, end;
};

__device__ __forceinline__ Chunk chunk_of_block(const Batch& batch) {
  const int index = batch.find(blockIdx.x);
  const GradientTensor& tensor = batch.tensors[index];
  const int64_t begin =
      int64_t{static_cast<int>(blockIdx.x) - batch.first_chunk[index]} * gradient_chunk;
  return {tensor, begin, min(begin + gradient_chunk, tensor.count)};
}

// Calls visit(values) for four of the thread's elements of one step at a time, in order. Stores:
// what visit leaves in them is stored.
template <int Bytes, bool Whole, bool Stores, typename Visit>
__device__ __forceinline__ void for_step(const GradientTensor& tensor, int64_t base, Visit visit) {
  const int64_t first = base + threadIdx.x * 4, count = tensor.count;
  Raw<Bytes> raw[vectors];
#pragma unroll
  for (int k = 0; k < vectors; ++k) {
    raw[k] = load_raw<Bytes, Whole>(tensor.data, first + k * threads * 4, count);
  }
#pragma unroll
  for (int k = 0; k < vectors; ++k) {
    float values[4];
    to_floats(raw[k], tensor.dtype, values);
    visit(values);
    if constexpr (Stores) {
      store_raw<Bytes, Whole>(tensor.data, first + k * threads * 4, count,
                              from_floats<Bytes>(tensor.dtype, values));
    }
  }
}

template <int Bytes, bool Stores, typename Visit>
__device__ __forceinline__ void for_chunk(const Chunk& chunk, Visit visit) {
  const bool aligned = is_aligned4(chunk.tensor.data, chunk.tensor.dtype);
  for (int64_t base = chunk.begin; base < chunk.end; base += step_elements) {
    if (aligned && base + step_elements <= chunk.end) {
      for_step<Bytes, true, Stores>(chunk.tensor, base, visit);
    } else {
      for_step<Bytes, false, Stores>(chunk.tensor, base, visit);
    }
  }
}

template <bool Stores, typename Visit>
__device__ __forceinline__ void for_elements(const Batch& batch, Visit visit) {
  const Chunk chunk = chunk_of_block(batch);
  if (chunk.tensor.dtype == DType::float32) {
    for_chunk<4, Stores>(chunk, visit);
  } else {
    for_chunk<2, Stores>(chunk, visit);
  }
}

__global__ void __launch_bounds__(threads)
    sum_squares_kernel(const __grid_constant__ Batch batch, double* partial) {
  double total = 0.0;
  for_elements<false>(batch, [&](float(&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total += static_cast<double>(values[i]) * values[i];
  });
  total = block_sum<threads>(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// Thread t adds chunks t, t + 1024, ...; then the threads' sums are added.
__global__ void __launch_bounds__(finish_threads)
    finish_kernel(const double* partial, int64_t chunks, float* norm) {
  double total = 0.0;
#pragma unroll 4
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += finish_threads) {
    total += partial[chunk];
  }
  total = block_sum<finish_threads>(total);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(total));
}

__global__ void coefficient_kernel(const float* norm, double max_norm, float* coefficient) {
  const double ratio = max_norm / (*norm + 1e-6);
  *coefficient = ratio > 1.0 ? 1.0f : static_cast<float>(ratio);  // NaN stays
}

__global__ void __launch_bounds__(threads)
    scale_kernel(const __grid_constant__ Batch batch, const float* coefficient) {
  const float factor = *coefficient;
  if (factor == 1.0f) return;
  for_elements<true>(batch, [&](float(&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] *= factor;
  });
}

void check_built(const char* op, const GradientList& list) {
  for (int64_t i = 0; i < list.tensor_count; ++i) {
    REDLINE_CHECK(list.tensors[i].dtype != DType::float64, op,
                  ": gradients: no kernel for float64");
    note_address(op, "gradients", list.tensors[i].data, list.tensors[i].dtype);
  }
}

LaunchConfig config(const Batch& batch, Stream stream) {
  return {.grid = dim3(batch.first_chunk[batch.size]), .block = dim3(threads), .stream = stream};
}

}  // namespace
}  // namespace cuda

void run(const GradientNorm& args, Stream stream) {
  using namespace cuda;
  const GradientList& list = args.gradients;
  check_built("gradient_norm", list);
  note_choice("lists of tensors in chunks of ", gradient_chunk, " elements, a block each");
  auto* const partial = args.partial.as<double>();
  for_batches<Batch>(
      list.tensors, list.tensor_count, gradient_chunk, [&](const Batch& batch, BatchStart start) {
        launch(sum_squares_kernel, config(batch, stream), batch, partial + start.chunk);
      });
  note_choice("the chunks' sums of squares, in one fixed order");
  launch(finish_kernel, {.grid = dim3(1), .block = dim3(finish_threads), .stream = stream}, partial,
         args.partial.sizes[0], args.norm.as<float>());
}

void run(const ClipCoefficient& args, Stream stream) {
  REDLINE_CHECK(args.norm.dtype == DType::float32, "clip_coefficient: norm: no kernel for ",
                args.norm.dtype);
  note_choice("one value");
  cuda::launch(cuda::coefficient_kernel, {.grid = dim3(1), .block = dim3(1), .stream = stream},
               args.norm.as<const float>(), args.max_norm, args.coefficient.as<float>());
}

void run(const ScaleGradients& args, Stream stream) {
  using namespace cuda;
  const GradientList& list = args.gradients;
  check_built("scale_gradients", list);
  note_choice("lists of tensors in chunks of ", gradient_chunk, " elements, a block each");
  for_batches<Batch>(
      list.tensors, list.tensor_count, gradient_chunk, [&](const Batch& batch, BatchStart) {
        launch(scale_kernel, config(batch, stream), batch, args.coefficient.as<const float>());
      });
}

}  // namespace redline
