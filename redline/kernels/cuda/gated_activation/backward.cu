// gate_grad, linear_grad, row_scale_grad and bias_grad of gated_activation
// (kernels/gated_activation.h). Without sums every thread has one vector of each input; with a
// bias, blocks walk down the rows of a chunk; with a row scale, a warp or a block has a row. With
// both, a block of the walk writes its columns' part of each row's sum, and a last launch adds the
// parts. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/columns.cuh"
#include "redline/kernels/cuda/gated_activation/backward.h"
#include "redline/kernels/cuda/gated_activation/element.cuh"

namespace redline::cuda {
namespace {

template <typename T, typename Kind>
struct Backward : Common {
  static constexpr int size = vector_size<T>, in_flight = 1;
  static constexpr int sums = 2, blocks_per_sm = gated_column_blocks, pieces = 3, slots = 3;
  static constexpr bool fits_more = false, sums_rows = true;
  struct Input {
    Packed<T> gate, linear, y_grad;
  };
  struct Gradients {
    float gate[size], linear[size];
    float row_scale;  // this vector's part
    Packed<T> y;
  };
  struct Shared {
    float gate_bias[size], linear_bias[size];
  };
  Matrix y_grad, gate_grad, linear_grad, row_scale_grad, y;
  bool wants_y;
  float* parts;  // [blocks of 32 vectors, rows], or null

  template <bool Aligned>
  __device__ __forceinline__ Input load(const Place<Aligned>& at) const {
    return {cuda::load(gate.row<const T>(at.row), at), cuda::load(linear.row<const T>(at.row), at),
            cuda::load(y_grad.row<const T>(at.row), at)};
  }
  // Of inputs with their bias; the third is y_grad's. `WantsScale`: row_scale's part too.
  template <bool WantsScale>
  __device__ __forceinline__ Gradients compute(const float (&a)[size], const float (&b)[size],
                                               const Packed<T>& y_grads, float factor) const {
    Gradients out = {};
    float result[size];
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float g = element(y_grads, i), second = Kind::linear(b[i], parameters);
      float value, derivative;
      Kind::derive(a[i], parameters, value, derivative);
      out.gate[i] = g * factor * second * derivative;
      out.linear[i] = Kind::linear_gradient(b[i], g * factor * value, parameters);
      if (WantsScale) out.row_scale += g * value * second;
      result[i] = value * second * factor;
    }
    out.y = pack<T>(result);
    return out;
  }
  // Without a walk; zeros of rows that hold nothing.
  template <bool WantsScale, bool Aligned>
  __device__ __forceinline__ Gradients compute(const Place<Aligned>& at, const Input& in) const {
    if (!counts(at.row)) return {};
    float a[size], b[size];
    add_bias<T>(at, in.gate, in.linear, a, b);
    return compute<WantsScale>(a, b, in.y_grad, scale<T>(at.row));
  }
  template <bool Aligned>
  __device__ __forceinline__ void store_gradients(const Place<Aligned>& at,
                                                  const Gradients& out) const {
    store(gate_grad.row<T>(at.row), at, pack<T>(out.gate));
    store(linear_grad.row<T>(at.row), at, pack<T>(out.linear));
    if (wants_y) store(y.row<T>(at.row), at, out.y);
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in) const {
    store_gradients(at, compute<false>(at, in));
  }

  __device__ __forceinline__ Backward walk(int64_t row, int col, int step) const {
    Backward op = *this;
    op.gate = gate.walk<T>(row, col, step);
    op.linear = linear.walk<T>(row, col, step);
    op.y_grad = y_grad.walk<T>(row, col, step);
    op.gate_grad = gate_grad.walk<T>(row, col, step);
    op.linear_grad = linear_grad.walk<T>(row, col, step);
    op.y = y.walk<T>(row, col, step);
    return op;
  }
  template <bool Aligned>
  __device__ __forceinline__ Shared shared(const Place<Aligned>& at) const {
    Shared result = {};
    if (bias.data != nullptr) {
      load_mixed<T>(bias.mixed(0), at, result.gate_bias);
      load_mixed<T>(bias.mixed(extent.cols), at, result.linear_bias);
    }
    return result;
  }
  __device__ __forceinline__ float of_row(int64_t row) const { return scale<T>(row); }
  template <typename Ring, bool Aligned>
  __device__ __forceinline__ void request(const Ring& ring, int slot, const Place<Aligned>& at) {
    ring.template request<T>(slot, 0, gate.row<const T>(0), at);
    ring.template request<T>(slot, 1, linear.row<const T>(0), at);
    ring.template request<T>(slot, 2, y_grad.row<const T>(0), at);
    gate.next<T>();
    linear.next<T>();
    y_grad.next<T>();
  }
  template <typename Ring>
  __device__ __forceinline__ Input receive(const Ring& ring, int slot) const {
    return {ring.template read<T, size>(slot, 0), ring.template read<T, size>(slot, 1),
            ring.template read<T, size>(slot, 2)};
  }
  template <typename Row, bool Aligned>
  __device__ __forceinline__ float run(const Place<Aligned>& at, const Input& in, const Row& row,
                                       float (&totals)[sums][size]) {
    Gradients out = {};
    if (counts(row.row)) {
      float a[size], b[size];
#pragma unroll
      for (int i = 0; i < size; ++i) {
        a[i] = element(in.gate, i) + row.shared.gate_bias[i];
        b[i] = element(in.linear, i) + row.shared.linear_bias[i];
      }
      out = compute<true>(a, b, in.y_grad, row.of_row);
    }
    store_gradients(at, out);
    gate_grad.next<T>();
    linear_grad.next<T>();
    y.next<T>();
#pragma unroll
    for (int i = 0; i < size; ++i) {
      totals[0][i] += out.gate[i];
      totals[1][i] += out.linear[i];
    }
    return out.row_scale;
  }
  __device__ __forceinline__ bool wants_parts() const { return parts != nullptr; }
  __device__ __forceinline__ void store_part(int64_t row, float sum) const {
    parts[blockIdx.x * extent.rows + row] = sum;
  }
  __device__ __forceinline__ void store_row_scale_grad(int64_t row, float value) const {
    if (row_scale_grad.is_float32) {
      static_cast<float*>(row_scale_grad.data)[row] = value;
    } else {
      static_cast<T*>(row_scale_grad.data)[row] = from_float<T>(value);
    }
  }
};

constexpr int row_block = 256, most_row_threads = 512;

// A block has a row, and each thread one vector of it. 40 registers: 1536 threads a multiprocessor.
template <typename Op, bool Aligned>
__global__ void __launch_bounds__(most_row_threads, 3) whole_row_kernel(const Op op) {
  __shared__ float scratch[most_row_threads / 32];
  const int64_t row = blockIdx.x;
  const Place<Aligned> at = {row, static_cast<int>(threadIdx.x) * Op::size, op.extent.cols};
  float total = 0.0f;
  if (at.col < at.end) {
    const auto out = op.template compute<true>(at, op.load(at));
    op.store_gradients(at, out);
    total = out.row_scale;
  }
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  total = warp_sum<most_row_threads / 32>(threadIdx.x * 32 < blockDim.x ? scratch[threadIdx.x] : 0);
  if (threadIdx.x == 0) op.store_row_scale_grad(row, total);
}

// Threads share a row, and each takes more than one vector of it.
template <typename Op, int Threads, bool Aligned>
__global__ void __launch_bounds__(row_block) row_kernel(const Op op) {
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
    const auto out = op.template compute<true>(Place<Aligned>{row, col, cols}, current);
    op.store_gradients(Place<Aligned>{row, col, cols}, out);
    total[0] += out.row_scale;
    current = next;
  }
  block_sum<Threads>(total, scratch);
  if (thread == 0) op.store_row_scale_grad(row, total[0]);
}

template <typename Op>
void launch_rows(const Op& op, bool aligned, Stream stream) {
  const auto launch_shared = [&]<int Threads>() {
    note_choice("row_scale's gradient: a row is summed by ", Threads, " threads");
    visit_bool(aligned, [&]<bool Aligned>() {
      launch(row_kernel<Op, Threads, Aligned>,
             {.grid = dim3(ceil_div(op.extent.rows, row_block / Threads)),
              .block = dim3(row_block),
              .stream = stream},
             op);
    });
  };
  const int64_t threads = ceil_div(op.extent.vectors, 32) * 32;
  if (threads == 32) {
    launch_shared.template operator()<32>();
  } else if (threads <= most_row_threads) {
    note_choice("row_scale's gradient: a row is summed by a block of ", threads, " threads");
    visit_bool(aligned, [&]<bool Aligned>() {
      launch(whole_row_kernel<Op, Aligned>,
             {.grid = dim3(op.extent.rows), .block = dim3(threads), .stream = stream}, op);
    });
  } else {
    launch_shared.template operator()<row_block>();
  }
}

// Adds a row's parts in order. The walk down the columns wrote them; the sum of its chunks,
// launched between, has waited for it.
template <typename Op>
__global__ void __launch_bounds__(row_block) parts_kernel(const Op op, int count) {
  const int64_t row = int64_t{blockIdx.x} * row_block + threadIdx.x;
  if (row >= op.extent.rows) return;
  float total = 0.0f;
  wait_for_previous_launch();
#pragma unroll 8
  for (int k = 0; k < count; ++k) total += op.parts[k * op.extent.rows + row];
  op.store_row_scale_grad(row, total);
}

template <typename Op>
void launch_parts(const Op& op, Stream stream) {
  launch(parts_kernel<Op>,
         {.grid = dim3(ceil_div(op.extent.rows, row_block)),
          .block = dim3(row_block),
          .overlap_previous = true,
          .stream = stream},
         op, static_cast<int>(ceil_div(op.extent.vectors, 32)));
}

}  // namespace

template <typename Host>
void run_backward(const GatedActivationBackward& args, Stream stream) {
  const bool aligned = are_aligned("gated_activation", {{"gate", &args.gate},
                                                        {"linear", &args.linear},
                                                        {"bias", &args.bias},
                                                        {"y_grad", &args.y_grad},
                                                        {"gate_grad", &args.gate_grad},
                                                        {"linear_grad", &args.linear_grad},
                                                        {"y", &args.y}});
  using T = device_type<Host>;
  visit_kind<T>(args.activation.kind, [&]<typename Kind>() {
    const Backward<T, Kind> op{common(args, vector_size<T>),       matrix(args.y_grad, false),
                               matrix(args.gate_grad, false),      matrix(args.linear_grad, false),
                               matrix(args.row_scale_grad, false), matrix(args.y, false),
                               static_cast<bool>(args.y),          args.row_parts.as<float>()};
    if (args.bias_grad.total) {
      launch_columns(op, args.bias_grad, aligned, stream);
      if (args.row_scale_grad) launch_parts(op, stream);
    } else if (args.row_scale_grad) {
      launch_rows(op, aligned, stream);
    } else {
      launch_elements(op, aligned, stream);
    }
  });
}

template void run_backward<REDLINE_ELEMENT>(const GatedActivationBackward&, Stream);

}  // namespace redline::cuda
