// Rows that outgrow a cluster of blocks, or a block where there are no clusters: x_grad reads the
// row twice, the second time from L2, and the sums over rows read it once more.
#pragma once

#include "redline/kernels/cuda/norm/row_gradient.cuh"

namespace redline::cuda {
namespace {

// One vector of a row: y_grad, xh and the weight.
template <typename Form>
struct LongTerms {
  using T = typename Form::T;
  using X = typename Form::X;
  static constexpr int N = vector_size<T>;
  float y_grad[N], x[N], normalized[N], weight[1][N];

  __device__ __forceinline__ void load(const Backward& args, int64_t row, Columns<Form::aligned> at,
                                       RowStatistics of) {
    Packed<X, N> raw[1];
    Packed<T, N> upstream[1];
    load_vectors(row_at<const X>(args.x, row), at, raw);
    load_vectors(row_at<const T>(args.y_grad, row), at, upstream);
    load_weight<T>(args, at, weight);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y_grad[i] = element(upstream[0], i);  // zero past the row's end
      x[i] = element(raw[0], i);
      normalized[i] = (x[i] - of.mean) * of.inverse_std;
    }
  }
};

template <typename Form, int Threads>
__global__ void __launch_bounds__(Threads) long_x_grad_kernel(const Backward args) {
  using T = typename Form::T;
  using X = typename Form::X;
  constexpr bool Layer = Form::layer;
  constexpr int N = vector_size<T>, step = Threads * N;
  __shared__ float scratch[64];
  const int64_t row = blockIdx.x;
  const int first = static_cast<int>(threadIdx.x) * N;
  const auto at = [&](int col) { return Columns<Form::aligned>{col, step, args.cols}; };
  if (row >= counted_rows(args)) {
    for (int col = first; col < args.cols; col += step) {
      store_zeros<Form::aligned, T>(args.x_grad, row, col, args);
    }
    return;
  }
  const RowStatistics statistics = statistics_of<Layer>(args, row);
  LongTerms<Form> terms;
  float sums[Layer ? 2 : 1] = {};
  for (int col = first; col < args.cols; col += step) {
    terms.load(args, row, at(col), statistics);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float g = terms.weight[0][i] * terms.y_grad[i];
      sums[0] += g * terms.normalized[i];
      if constexpr (Layer) sums[1] += g;
    }
  }
  block_sum<Threads>(sums, scratch);
  const RowGradient gradient = row_gradient<Layer>(statistics, sums, args.inverse_cols);
  for (int col = first; col < args.cols; col += step) {
    terms.load(args, row, at(col), statistics);
    Packed<X, N> sum_grad[1] = {};
    if (args.sum_grad.data != nullptr) {
      load_vectors(row_at<const X>(args.sum_grad, row), at(col), sum_grad);
    }
    float out[1][N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[0][i] = gradient.value(terms.weight[0][i], terms.y_grad[i], terms.x[i]);
      if (args.sum_grad.data != nullptr) out[0][i] += element(sum_grad[0], i);
    }
    store_vectors(row_at<X>(args.x_grad, row), at(col), out);
    if (args.y.data == nullptr) continue;
    float bias[1][N] = {};
    if constexpr (Layer) load_bias<T>(args, at(col), bias);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float normalized = terms.normalized[i], w = terms.weight[0][i];
      out[0][i] = Layer ? fmaf(normalized, w, bias[0][i]) : normalized * w;
    }
    store_vectors(row_at<T>(args.y, row), at(col), out);
  }
}

// A thread owns N columns of one chunk: the rows chunk, chunk + chunks, ...
template <typename Form, int Threads>
__global__ void __launch_bounds__(Threads) long_partial_kernel(const Backward args) {
  constexpr int N = vector_size<typename Form::T>;
  const int col = static_cast<int>(blockIdx.x * Threads + threadIdx.x) * N;
  if (col >= args.cols) return;
  const int64_t counted = counted_rows(args);
  float weight_sums[N] = {}, bias_sums[N] = {};
  LongTerms<Form> terms;
  for (int64_t row = blockIdx.y; row < counted; row += args.chunks) {
    terms.load(args, row, {col, 0, args.cols}, statistics_of<Form::layer>(args, row));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      weight_sums[i] += terms.y_grad[i] * terms.normalized[i];
      bias_sums[i] += terms.y_grad[i];
    }
  }
  const int64_t offset = int64_t{blockIdx.y} * args.cols + col;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (col + i >= args.cols) break;
    if (args.weight_partial != nullptr) args.weight_partial[offset + i] = weight_sums[i];
    if (args.bias_partial != nullptr) args.bias_partial[offset + i] = bias_sums[i];
  }
}

template <typename Form>
void launch_long_backward(const Backward& args, Stream stream) {
  note_walk(args.cols);
  launch(long_x_grad_kernel<Form, 1024>,
         {.grid = dim3(args.rows), .block = dim3(1024), .stream = stream}, args);
  if (args.weight_partial == nullptr && args.bias_partial == nullptr) return;
  const int64_t vectors = ceil_div(args.cols, vector_size<typename Form::T>);
  launch(long_partial_kernel<Form, 128>,
         {.grid = dim3(ceil_div(vectors, 128), args.chunks), .block = dim3(128), .stream = stream},
         args);
}

}  // namespace
}  // namespace redline::cuda
