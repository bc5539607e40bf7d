// scores_grad = scale p (g - sum g p) (kernels/softmax.h). The threads of a row hold gradient and
// probabilities in registers as they lie in memory: read once, written once; keys that causal and
// window exclude are written and never read. Rows that outgrow a
// block are read again from L2; a sink's gradient takes a second launch. Bound by bytes.
#include "redline/kernels/cuda/softmax/rows.cuh"

namespace redline {
namespace cuda {
namespace {

struct BackwardArgs : Shape {
  const void* gradients;
  const void* probabilities;
  const float* sink_probability;
  void* scores_grad;
  float* sink_rows;
  int64_t gradients_stride, probabilities_stride, stride;
};

template <typename T>
__device__ __forceinline__ float dot(const Packed<T>& g, const Packed<T>& p) {
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) result += element(g, i) * element(p, i);
  return result;
}

template <typename T>
__device__ __forceinline__ Packed<T> scores_gradient(const Packed<T>& g, const Packed<T>& p,
                                                     float scale, float dot) {
  float x[vector_size<T>];
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) {
    x[i] = scale * element(p, i) * (element(g, i) - dot);
  }
  return pack<T>(x);
}

template <typename T, int Lanes, int V, bool Aligned>
__global__ void __launch_bounds__(RowThreads<Lanes>::most_threads,
                                  (!Aligned      ? 384
                                   : Lanes == 32 ? 640
                                                 : 768) /
                                      RowThreads<Lanes>::most_threads)
    backward_kernel(const BackwardArgs args) {
  constexpr int N = vector_size<T>;
  __shared__ float slots[32];
  const RowThreads<Lanes> own(slots);
  const int64_t row = min(own.row, args.rows - 1);  // all lanes take part in the sums
  const T* gradients = static_cast<const T*>(args.gradients) + row * args.gradients_stride;
  const T* from = static_cast<const T*>(args.probabilities) + row * args.probabilities_stride;
  T* out = static_cast<T*>(args.scores_grad) + row * args.stride;
  const Columns<Aligned> at = {own.thread * N, own.threads * N, args.cols};
  const Keys keys = keys_of(args, args.place(row).query);
  Packed<T> g[V] = {}, p[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Place<Aligned> place = {0, at.col + v * at.step, at.cols};
    if (!keys.touch(place.col, N)) continue;
    g[v] = load(gradients, place);
    p[v] = load(from, place);
  }
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += dot(g[v], p[v]);
  forget_wide(g);
  forget_wide(p);
  sum = own.group.sum(sum, slots);
  if (own.row >= args.rows) return;
  if (args.sink_probability != nullptr && own.thread == 0) {
    args.sink_rows[row] = -sum * args.sink_probability[row];
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if (col >= at.cols) continue;
    store(out, Place<Aligned>{0, col, at.cols},
          keys.touch(col, N) ? scores_gradient(g[v], p[v], args.scale, sum) : Packed<T>{});
  }
}

template <typename T, bool Aligned>
__global__ void __launch_bounds__(512) long_backward_kernel(const BackwardArgs args) {
  constexpr int N = vector_size<T>;
  __shared__ float slots[32];
  const RowThreads<0> own(slots);
  if (own.row >= args.rows) return;
  const T* gradients = static_cast<const T*>(args.gradients) + own.row * args.gradients_stride;
  const T* from = static_cast<const T*>(args.probabilities) + own.row * args.probabilities_stride;
  T* out = static_cast<T*>(args.scores_grad) + own.row * args.stride;
  const Columns<Aligned> at = {own.thread * N, own.threads * N, args.cols};
  const Keys keys = keys_of(args, args.place(own.row).query);
  float sum = 0.0f;
  for (int col = at.col; col < keys.end; col += at.step) {
    const Place<Aligned> place = {0, col, at.cols};
    if (!keys.touch(col, N)) continue;
    sum += dot(load(gradients, place), load(from, place));
  }
  sum = own.group.sum(sum, slots);
  if (args.sink_probability != nullptr && own.thread == 0) {
    args.sink_rows[own.row] = -sum * args.sink_probability[own.row];
  }
  for (int col = at.col; col < at.cols; col += at.step) {
    const Place<Aligned> place = {0, col, at.cols};
    Packed<T> result = {};
    if (keys.touch(col, N)) {
      const Packed<T> g = load(gradients, place), p = load(from, place);
      result = scores_gradient(g, p, args.scale, sum);
    }
    store(out, place, result);
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

}  // namespace
}  // namespace cuda

void run(const SoftmaxBackward& args, Stream stream) {
  using namespace cuda;
  const bool aligned = are_aligned("softmax", {{"probabilities", &args.probabilities},
                                               {"probabilities_grad", &args.probabilities_grad},
                                               {"scores_grad", &args.scores_grad}});
  const BackwardArgs device = {shape_of(args, args.probabilities),
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
    if (device.rows == 0) return;
    visit_bool(aligned, [&]<bool Aligned>() {
      const bool held = visit_sharing(ceil_div(device.cols, vector_size<T>), device.rows,
                                      [&]<int Lanes, int V>(int64_t blocks, int threads) {
                                        launch(backward_kernel<T, Lanes, V, Aligned>,
                                               config_of(blocks, threads, stream), device);
                                      });
      if (held) return;
      launch(long_backward_kernel<T, Aligned>, config_of(device.rows, 512, stream), device);
    });
  });
  if (!args.sink_probability) return;
  note_choice("a head's gradient of the sink, in the order of its rows");
  launch(sum_sink_kernel,
         {.grid = dim3(device.heads), .block = dim3(sink_threads), .stream = stream},
         args.sink_rows.as<const float>(), args.sink_grad.as<float>(), device.rows, device.heads,
         device.queries);
}

}  // namespace redline
