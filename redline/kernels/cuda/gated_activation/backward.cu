// gate_grad, linear_grad, row_scale_grad and bias_grad of gated_activation
// (kernels/gated_activation.h). Without sums every thread has one vector of each input; with a
// bias, blocks walk down the rows of a chunk; with a row scale, a warp or a block has a row. Both
// sums at once take two passes. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/device/reduce.cuh"
#include "redline/kernels/cuda/gated_activation/element.cuh"

namespace redline {
namespace cuda {
namespace {

template <typename T, typename Kind>
struct Backward : Common {
  static constexpr int size = vector_size<T>, in_flight = 1;
  static constexpr int sums = 2, rows_in_flight = 2;
  struct Input {
    Packed<T> gate, linear, y_grad;
  };
  struct Gradients {
    float gate[size], linear[size];
    float row_scale;  // this vector's part
    Packed<T> y;
  };
  Matrix y_grad, gate_grad, linear_grad, row_scale_grad, y;

  template <bool Aligned>
  __device__ __forceinline__ Input load(const Place<Aligned>& at) const {
    return {cuda::load(gate.row<const T>(at.row), at), cuda::load(linear.row<const T>(at.row), at),
            cuda::load(y_grad.row<const T>(at.row), at)};
  }
  template <bool Aligned>
  __device__ __forceinline__ Gradients compute(const Place<Aligned>& at, const Input& in) const {
    Gradients out = {};
    if (!counts(at.row)) return out;
    float a[size], b[size], result[size];
    add_bias<T>(at, 0, in.gate, a);
    add_bias<T>(at, extent.cols, in.linear, b);
    const float factor = scale<T>(at.row);
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float g = element(in.y_grad, i), second = Kind::linear(b[i], parameters);
      float value, derivative;
      Kind::derive(a[i], parameters, value, derivative);
      out.gate[i] = g * factor * second * derivative;
      out.linear[i] = Kind::linear_gradient(b[i], g * factor * value, parameters);
      out.row_scale += g * value * second;
      result[i] = value * second * factor;
    }
    out.y = pack<T>(result);
    return out;
  }
  template <bool Aligned>
  __device__ __forceinline__ void store_gradients(const Place<Aligned>& at,
                                                  const Gradients& out) const {
    store(gate_grad.row<T>(at.row), at, pack<T>(out.gate));
    store(linear_grad.row<T>(at.row), at, pack<T>(out.linear));
    if (y.data != nullptr) store(y.row<T>(at.row), at, out.y);
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in) const {
    store_gradients(at, compute(at, in));
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in,
                                      float (&totals)[sums][size]) const {
    const Gradients out = compute(at, in);
    store_gradients(at, out);
#pragma unroll
    for (int i = 0; i < size; ++i) {
      totals[0][i] += out.gate[i];
      totals[1][i] += out.linear[i];
    }
  }
  __device__ __forceinline__ void store_row_scale_grad(int64_t row, float value) const {
    if (row_scale_grad.is_float32) {
      static_cast<float*>(row_scale_grad.data)[row] = value;
    } else {
      static_cast<T*>(row_scale_grad.data)[row] = from_float<T>(value);
    }
  }
};

constexpr int row_block = 256;

// Threads share a row. `with_gradients` is false where the column kernel has stored them.
template <typename Op, int Threads, bool Aligned>
__global__ void __launch_bounds__(row_block) row_kernel(const Op op, bool with_gradients) {
  __shared__ float scratch[32];
  const int thread = threadIdx.x % Threads;
  const int64_t row = int64_t{blockIdx.x} * (row_block / Threads) + threadIdx.x / Threads;
  if (row >= op.extent.rows) return;
  const int cols = op.extent.cols, step = Threads * Op::size;
  float total[1] = {};
  typename Op::Input current, next;
  int col = thread * Op::size;
  if (col < cols) current = op.load(Place<Aligned>{row, col, cols});
  for (; col < cols; col += step) {
    if (col + step < cols) next = op.load(Place<Aligned>{row, col + step, cols});
    const auto out = op.compute(Place<Aligned>{row, col, cols}, current);
    if (with_gradients) op.store_gradients(Place<Aligned>{row, col, cols}, out);
    total[0] += out.row_scale;
    current = next;
  }
  block_sum<Threads>(total, scratch);
  if (thread == 0) op.store_row_scale_grad(row, total[0]);
}

template <typename Op>
void launch_rows(const Op& op, bool with_gradients, bool aligned, Stream stream) {
  const auto launch_shared = [&]<int Threads>() {
    visit_bool(aligned, [&]<bool Aligned>() {
      launch(row_kernel<Op, Threads, Aligned>,
             {.grid = dim3(ceil_div(op.extent.rows, row_block / Threads)),
              .block = dim3(row_block),
              .stream = stream},
             op, with_gradients);
    });
  };
  if (op.extent.vectors <= 128) {
    launch_shared.template operator()<32>();
  } else {
    launch_shared.template operator()<row_block>();
  }
}

}  // namespace
}  // namespace cuda

void run(const GatedActivationBackward& args, Stream stream) {
  using namespace cuda;
  const bool aligned = is_aligned({&args.gate, &args.linear, &args.bias, &args.y_grad,
                                   &args.gate_grad, &args.linear_grad, &args.y});
  visit_kind(args.activation.kind, args.gate.dtype, [&]<typename T, typename Kind>() {
    const Backward<T, Kind> op{common(args, vector_size<T>),       matrix(args.y_grad, false),
                               matrix(args.gate_grad, false),      matrix(args.linear_grad, false),
                               matrix(args.row_scale_grad, false), matrix(args.y, false)};
    const bool with_bias = static_cast<bool>(args.bias_grad.total);
    if (with_bias) launch_columns(op, args.bias_grad, aligned, stream);
    if (args.row_scale_grad) {
      launch_rows(op, !with_bias, aligned, stream);
    } else if (!with_bias) {
      launch_elements(op, aligned, stream);
    }
  });
}

}  // namespace redline
