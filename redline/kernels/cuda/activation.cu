// y = f(x + bias) (kernels/activation.h). A thread has one 16-byte vector of each input: with two,
// gelu's backward ran at 0.91 of a copy and with one at 0.99 (H200), forward with a bias at 0.94
// and 0.97; backward with a bias walks down the rows of a chunk and keeps the bias's
// gradient in registers. Bound by bytes; of the floor: bench/results.
#include "redline/core/dispatch.h"
#include "redline/kernels/activation.h"
#include "redline/kernels/cuda/columns.cuh"
#include "redline/kernels/cuda/device/nonlinearity.cuh"

namespace redline {
namespace cuda {
namespace {

// What both directions know.
struct Common {
  Extent extent;
  Matrix x, bias;
};

template <typename T, typename Function>
struct Forward : Common {
  static constexpr int size = vector_size<T>, in_flight = 1;
  using Input = Packed<T>;
  Matrix y;

  template <bool Aligned>
  __device__ __forceinline__ Input load(const Place<Aligned>& at) const {
    return cuda::load(x.row<const T>(at.row), at);
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in) const {
    float values[size];
    add_mixed<T>(bias.mixed(0), at, in, values);
#pragma unroll
    for (int i = 0; i < size; ++i) values[i] = Function::value(values[i]);
    store(y.row<T>(at.row), at, pack<T>(values));
  }
};

template <typename T, typename Function>
struct Backward : Common {
  static constexpr int size = vector_size<T>, in_flight = 1;
  static constexpr int sums = 1, blocks_per_sm = activation_column_blocks, pieces = 2, slots = 2;
  static constexpr bool fits_more = false, sums_rows = false;
  struct Input {
    Packed<T> x, y_grad;
  };
  struct Shared {
    float bias[size];
  };
  Matrix y_grad, x_grad, y;
  bool wants_y;

  template <bool Aligned>
  __device__ __forceinline__ Input load(const Place<Aligned>& at) const {
    return {cuda::load(x.row<const T>(at.row), at), cuda::load(y_grad.row<const T>(at.row), at)};
  }
  // Of x with its bias; y has forward's bits.
  template <bool Aligned>
  __device__ __forceinline__ void gradient(const Place<Aligned>& at, const Input& in,
                                           float (&values)[size], float (&result)[size]) const {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      float value, derivative;
      Function::derive(values[i], value, derivative);
      result[i] = element(in.y_grad, i) * derivative;
    }
    store(x_grad.row<T>(at.row), at, pack<T>(result));
    if (!wants_y) return;
#pragma unroll
    for (int i = 0; i < size; ++i) values[i] = Function::value(values[i]);
    store(y.row<T>(at.row), at, pack<T>(values));
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in) const {
    float values[size], result[size];
    add_mixed<T>(bias.mixed(0), at, in.x, values);
    gradient(at, in, values, result);
  }

  __device__ __forceinline__ Backward walk(int64_t row, int col, int step) const {
    Backward op = *this;
    op.x = x.walk<T>(row, col, step);
    op.y_grad = y_grad.walk<T>(row, col, step);
    op.x_grad = x_grad.walk<T>(row, col, step);
    op.y = y.walk<T>(row, col, step);
    return op;
  }
  template <bool Aligned>
  __device__ __forceinline__ Shared shared(const Place<Aligned>& at) const {
    Shared result = {};
    if (bias.data != nullptr) load_mixed<T>(bias.mixed(0), at, result.bias);
    return result;
  }
  __device__ __forceinline__ float of_row(int64_t) const { return 0.0f; }
  template <typename Ring, bool Aligned>
  __device__ __forceinline__ void request(const Ring& ring, int slot, const Place<Aligned>& at) {
    ring.template request<T>(slot, 0, x.row<const T>(0), at);
    ring.template request<T>(slot, 1, y_grad.row<const T>(0), at);
    x.next<T>();
    y_grad.next<T>();
  }
  template <typename Ring>
  __device__ __forceinline__ Input receive(const Ring& ring, int slot) const {
    return {ring.template read<T, size>(slot, 0), ring.template read<T, size>(slot, 1)};
  }
  template <typename Row, bool Aligned>
  __device__ __forceinline__ float run(const Place<Aligned>& at, const Input& in, const Row& row,
                                       float (&totals)[sums][size]) {
    float values[size], result[size];
#pragma unroll
    for (int i = 0; i < size; ++i) values[i] = element(in.x, i) + row.shared.bias[i];
    gradient(at, in, values, result);
    x_grad.next<T>();
    y.next<T>();
#pragma unroll
    for (int i = 0; i < size; ++i) totals[0][i] += result[i];
    return 0.0f;
  }
};

// Calls visit.operator()<T, Function>().
template <typename Visit>
void visit_kind(Activation kind, DType dtype, Visit visit) {
  visit_dtype<float, bfloat16, float16>("activation", dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    constexpr bool fast = sizeof(T) == 2;
    switch (kind) {
      case Activation::gelu:
        return visit.template operator()<T, Gelu<fast>>();
      case Activation::gelu_erf:
        return visit.template operator()<T, GeluErf<fast>>();
      case Activation::quick_gelu:
        return visit.template operator()<T, QuickGelu<fast>>();
      case Activation::silu:
        return visit.template operator()<T, Silu<fast>>();
      case Activation::relu:
        return visit.template operator()<T, Relu>();
      case Activation::squared_relu:
        return visit.template operator()<T, SquaredRelu>();
    }
  });
}

}  // namespace
}  // namespace cuda

void run(const ActivationForward& args, Stream stream) {
  using namespace cuda;
  const bool flat = is_flat(args.x) && !args.bias;
  const bool aligned =
      are_aligned("activation", {{"x", &args.x}, {"bias", &args.bias}, {"y", &args.y}});
  visit_kind(args.kind, args.x.dtype, [&]<typename T, typename Function>() {
    const Common common = {extent("activation", args.x, vector_size<T>, flat), matrix(args.x, flat),
                           matrix(args.bias, false)};
    launch_elements(Forward<T, Function>{common, matrix(args.y, flat)}, aligned, stream);
  });
}

void run(const ActivationBackward& args, Stream stream) {
  using namespace cuda;
  const bool flat = is_flat(args.x) && !args.bias;
  const bool aligned = are_aligned("activation", {{"x", &args.x},
                                                  {"bias", &args.bias},
                                                  {"y_grad", &args.y_grad},
                                                  {"x_grad", &args.x_grad},
                                                  {"y", &args.y}});
  visit_kind(args.kind, args.x.dtype, [&]<typename T, typename Function>() {
    const Common common = {extent("activation", args.x, vector_size<T>, flat), matrix(args.x, flat),
                           matrix(args.bias, false)};
    const Backward<T, Function> op{common, matrix(args.y_grad, flat), matrix(args.x_grad, flat),
                                   matrix(args.y, flat), static_cast<bool>(args.y)};
    if (args.bias_grad.total) {
      launch_columns(op, args.bias_grad, aligned, stream);
    } else {
      launch_elements(op, aligned, stream);
    }
  });
}

}  // namespace redline
