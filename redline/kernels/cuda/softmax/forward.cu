// p = e^(scale s - m) / Z over the keys that are left (kernels/softmax.h). A warp or a block per
// row: one read for maximum and sum, a second, out of L1 or L2, for the output; keys that causal
// and window exclude are written and never read. Bound by bytes.
#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/reduce.cuh"
#include "redline/kernels/cuda/device/vector.cuh"
#include "redline/kernels/cuda/launch.h"
#include "redline/kernels/softmax.h"

namespace redline {
namespace cuda {
namespace {

struct Shape {
  int64_t rows, heads, queries;
  int cols;
  float scale;
  bool aligned;
};

struct ForwardArgs : Shape {
  const void* scores;
  const bool* mask;
  const float* sink;
  void* probabilities;
  float* sink_probability;
  int64_t scores_stride, stride, mask_batch, mask_head, mask_query, mask_key, window;
  bool causal;
};

struct BackwardArgs : Shape {
  const void* gradients;
  const void* probabilities;
  const float* sink_probability;
  void* scores_grad;
  float* sink_rows;
  int64_t gradients_stride, probabilities_stride, stride;
};

constexpr int64_t grid_rows = int64_t{1} << 30;

__device__ __forceinline__ int64_t block_row() {
  return int64_t{blockIdx.y} * grid_rows + blockIdx.x;
}

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// What one row may see.
struct Row {
  const bool* mask;  // its first key's, or null
  int64_t mask_key;
  int begin, end;

  __device__ __forceinline__ bool sees(int col) const {
    return col >= begin && col < end && (mask == nullptr || !mask[col * mask_key]);
  }
};

__device__ __forceinline__ Row row_of(const ForwardArgs& args, int64_t row) {
  const int64_t query = row % args.queries, head = row / args.queries;
  const Range keys = allowed_keys(query, args.queries, args.cols, args.causal, args.window);
  const bool* mask = args.mask;
  if (mask != nullptr) {
    mask += head / args.heads * args.mask_batch + head % args.heads * args.mask_head +
            query * args.mask_query;
  }
  return {mask, args.mask_key, static_cast<int>(keys.begin), static_cast<int>(keys.end)};
}

// Scaled scores [col, col + N) of a row, -inf where it may not look.
template <typename T>
__device__ __forceinline__ void load_scores(const ForwardArgs& args, const T* scores,
                                            const Row& row, int col, float (&x)[vector_size<T>]) {
  constexpr int N = vector_size<T>;
  if (row.mask == nullptr && col >= row.begin && col + N <= row.end) {  // it sees all of them
    const Packed<T> packed = load(scores, col, args.cols, args.aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(packed.values[i]) * args.scale;
    return;
  }
  const bool any = col < row.end && col + N > row.begin;
  const Packed<T> packed = any ? load(scores, col, args.cols, args.aligned) : Packed<T>{};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool seen = any && row.sees(col + i);
    x[i] = seen ? to_float(packed.values[i]) * args.scale : negative_infinity();
  }
}

// The largest value of the block, in every thread.
template <int Threads>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  if constexpr (Threads > 32) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_max(lane < Threads / 32 ? scratch[lane] : negative_infinity());
  }
  return value;
}

template <typename T, int Threads>
__global__ void __launch_bounds__(Threads) forward_kernel(const ForwardArgs args) {
  constexpr int N = vector_size<T>, step = Threads * N;
  __shared__ float max_scratch[32], sum_scratch[32];
  const int64_t row_index = block_row();
  if (row_index >= args.rows) return;
  const Row row = row_of(args, row_index);
  const T* scores = static_cast<const T*>(args.scores) + row_index * args.scores_stride;
  T* out = static_cast<T*>(args.probabilities) + row_index * args.stride;
  const int first = static_cast<int>(threadIdx.x) * N;
  float x[N], maximum = negative_infinity(), total[1] = {};
  for (int col = first; col < row.end; col += step) {
    load_scores(args, scores, row, col, x);
    float larger = maximum;
#pragma unroll
    for (int i = 0; i < N; ++i) larger = fmaxf(larger, x[i]);
    if (larger > maximum) {
      total[0] *= __expf(maximum - larger);
      maximum = larger;
    }
    const float origin = maximum == negative_infinity() ? 0.0f : maximum;
#pragma unroll
    for (int i = 0; i < N; ++i) total[0] += __expf(x[i] - origin);
  }
  const float sink =
      args.sink == nullptr ? negative_infinity() : args.sink[row_index / args.queries % args.heads];
  const float top = fmaxf(block_max<Threads>(maximum, max_scratch), sink);
  const float origin = top == negative_infinity() ? 0.0f : top;
  total[0] *= __expf(maximum - origin);
  block_sum<Threads>(total, sum_scratch);
  const float sum = total[0] + __expf(sink - origin);
  const float inverse_sum = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (args.sink != nullptr && threadIdx.x == 0) {
    args.sink_probability[row_index] = __expf(sink - origin) * inverse_sum;
  }
  for (int col = first; col < args.cols; col += step) {
    load_scores(args, scores, row, col, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __expf(x[i] - origin) * inverse_sum;
    store(out, col, args.cols, args.aligned, pack<T>(x));
  }
}

template <typename T, int Threads>
__global__ void __launch_bounds__(Threads) backward_kernel(const BackwardArgs args) {
  constexpr int N = vector_size<T>, step = Threads * N;
  __shared__ float scratch[32];
  const int64_t row = block_row();
  if (row >= args.rows) return;
  const T* gradients = static_cast<const T*>(args.gradients) + row * args.gradients_stride;
  const T* probabilities =
      static_cast<const T*>(args.probabilities) + row * args.probabilities_stride;
  T* out = static_cast<T*>(args.scores_grad) + row * args.stride;
  const int first = static_cast<int>(threadIdx.x) * N;
  float dot[1] = {};
  for (int col = first; col < args.cols; col += step) {
    const Packed<T> g = load(gradients, col, args.cols, args.aligned);
    const Packed<T> p = load(probabilities, col, args.cols, args.aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) dot[0] += to_float(g.values[i]) * to_float(p.values[i]);
  }
  block_sum<Threads>(dot, scratch);
  if (args.sink_probability != nullptr && threadIdx.x == 0) {
    args.sink_rows[row] = -dot[0] * args.sink_probability[row];
  }
  for (int col = first; col < args.cols; col += step) {
    const Packed<T> g = load(gradients, col, args.cols, args.aligned);
    const Packed<T> p = load(probabilities, col, args.cols, args.aligned);
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = args.scale * to_float(p.values[i]) * (to_float(g.values[i]) - dot[0]);
    }
    store(out, col, args.cols, args.aligned, pack<T>(x));
  }
}

// A block per head: thread t adds the head's rows t, t + threads, ...
constexpr int sink_threads = 256;

__global__ void __launch_bounds__(sink_threads)
    sum_sink_kernel(const float* sink_rows, float* sink_grad, int64_t rows, int64_t heads,
                    int64_t queries) {
  __shared__ float scratch[32];
  const int64_t head = blockIdx.x, count = rows / heads;
  float total[1] = {};
  for (int64_t i = threadIdx.x; i < count; i += sink_threads) {
    total[0] += sink_rows[(i / queries * heads + head) * queries + i % queries];
  }
  block_sum<sink_threads>(total, scratch);
  if (threadIdx.x == 0) sink_grad[head] = total[0];
}

Shape shape_of(const SoftmaxRows& rows, const TensorView& matrix, bool aligned) {
  // A column index may pass the row's end by one block's step.
  REDLINE_CHECK(matrix.sizes[1] < INT32_MAX - 65536,
                "softmax: scores: expected rows below 2^31 - 65536 keys");
  return {.rows = matrix.sizes[0],
          .heads = rows.heads,
          .queries = rows.queries,
          .cols = static_cast<int>(matrix.sizes[1]),
          .scale = static_cast<float>(rows.scale),
          .aligned = aligned};
}

// Threads of a row, by its vectors alone.
template <typename Visit>
void visit_threads(int64_t vectors, Visit visit) {
  if (vectors <= 4 * 32) {
    visit.template operator()<32>();
  } else if (vectors <= 4 * 128) {
    visit.template operator()<128>();
  } else {
    visit.template operator()<512>();
  }
}

LaunchConfig config_of(int64_t rows, int threads, Stream stream) {
  return {.grid = dim3(std::min(rows, grid_rows), ceil_div(rows, grid_rows)),
          .block = dim3(threads),
          .stream = stream};
}

}  // namespace
}  // namespace cuda

void run(const SoftmaxForward& args, Stream stream) {
  using namespace cuda;
  const bool aligned = is_aligned({&args.scores, &args.probabilities});
  const ForwardArgs device = {shape_of(args.shape, args.scores, aligned),
                              args.scores.data,
                              args.mask.as<const bool>(),
                              args.sink.as<const float>(),
                              args.probabilities.data,
                              args.sink_probability.as<float>(),
                              args.scores.strides[0],
                              args.probabilities.strides[0],
                              args.mask.strides[0],
                              args.mask.strides[1],
                              args.mask.strides[2],
                              args.mask.strides[3],
                              args.window,
                              args.causal};
  visit_dtype<float, bfloat16, float16>("softmax", args.scores.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_threads(ceil_div(device.cols, vector_size<T>), [&]<int threads>() {
      launch(forward_kernel<T, threads>, config_of(device.rows, threads, stream), device);
    });
  });
}

void run(const SoftmaxBackward& args, Stream stream) {
  using namespace cuda;
  const bool aligned =
      is_aligned({&args.probabilities, &args.probabilities_grad, &args.scores_grad});
  const BackwardArgs device = {shape_of(args.shape, args.probabilities, aligned),
                               args.probabilities_grad.data,
                               args.probabilities.data,
                               args.sink_probability.as<const float>(),
                               args.scores_grad.data,
                               args.sink_rows.as<float>(),
                               args.probabilities_grad.strides[0],
                               args.probabilities.strides[0],
                               args.scores_grad.strides[0]};
  visit_dtype<float, bfloat16, float16>("softmax", args.probabilities.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_threads(ceil_div(device.cols, vector_size<T>), [&]<int threads>() {
      launch(backward_kernel<T, threads>, config_of(device.rows, threads, stream), device);
    });
  });
  if (!args.sink_probability) return;
  launch(sum_sink_kernel,
         {.grid = dim3(device.heads), .block = dim3(sink_threads), .stream = stream},
         args.sink_rows.as<const float>(), args.sink_grad.as<float>(), device.rows, device.heads,
         device.queries);
}

}  // namespace redline
