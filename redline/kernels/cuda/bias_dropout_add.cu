// y = residual + dropout(x + bias) (kernels/bias_dropout_add.h). Every thread has two vectors with
// all loads in flight and draws their numbers while they come; backward with a bias walks down the
// rows of a chunk. Bound by bytes; of the floor: bench/results.
#include "redline/core/dispatch.h"
#include "redline/kernels/bias_dropout_add.h"
#include "redline/kernels/cuda/columns.cuh"
#include "redline/kernels/cuda/dropout.cuh"

namespace redline {
namespace cuda {
namespace {

// R: what residual and y hold.
template <typename T, typename R>
struct Forward {
  static constexpr int size = vector_size<T>, in_flight = 2;
  struct Input {
    Packed<T> x;
    Packed<R, size> residual;
  };
  Extent extent;
  Dropout dropout;
  Matrix x, bias, residual, y;
  int64_t* rng_state;

  __device__ __forceinline__ Forward local() const {
    Forward result = *this;
    result.dropout = dropout.local();
    return result;
  }

  template <bool Aligned>
  __device__ __forceinline__ Input load(const Place<Aligned>& at) const {
    Input in;
    in.x = cuda::load(x.row<const T>(at.row), at);
    in.residual = cuda::load<R, Aligned, size>(residual.row<const R>(at.row), at);
    return in;
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in) const {
    float values[size];
    dropout.add(in.x, bias.mixed(0), in.residual, at, values);
    store(y.row<R>(at.row), at, pack<R>(values));
    if (rng_state != nullptr && at.row == 0 && at.col == 0) {
      dropout.store_state(rng_state);
    }
  }
};

// Of an empty matrix: no thread has element 0.
template <typename T, typename R>
__global__ void state_kernel(const Forward<T, R> op) {
  op.dropout.store_state(op.rng_state);
}

// R: what y_grad holds.
template <typename T, typename R>
struct Backward {
  static constexpr int size = vector_size<T>, in_flight = 2;
  static constexpr int sums = 1, blocks_per_sm = column_blocks, slots = 3;
  static constexpr int pieces = sizeof(Packed<R, size>) / 16;
  static constexpr bool fits_more = true, sums_rows = false;
  using Input = Packed<R, size>;
  struct Shared {
    PhiloxRounds rounds{PhiloxKey{}};
  };
  Extent extent;
  Dropout dropout;
  Matrix y_grad, x_grad;

  __device__ __forceinline__ Backward local() const {
    Backward result = *this;
    result.dropout = dropout.local();
    return result;
  }

  static __device__ __forceinline__ void widen(const Input& in, float (&values)[size]) {
#pragma unroll
    for (int i = 0; i < size; ++i) values[i] = element(in, i);
  }
  template <bool Aligned>
  __device__ __forceinline__ Input load(const Place<Aligned>& at) const {
    return cuda::load<R, Aligned, size>(y_grad.row<const R>(at.row), at);
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in) const {
    float result[size];
    widen(in, result);
    dropout.apply<Aligned>(at.row, at.col, result);
    store(x_grad.row<T>(at.row), at, pack<T>(result));
  }

  __device__ __forceinline__ Backward walk(int64_t row, int col, int step) const {
    Backward op = *this;
    op.y_grad = y_grad.walk<R>(row, col, step);
    op.x_grad = x_grad.walk<T>(row, col, step);
    return op;
  }
  template <bool Aligned>
  __device__ __forceinline__ Shared shared(const Place<Aligned>&) const {
    Shared result = {PhiloxRounds(dropout.key())};
    result.rounds.keep();
    return result;
  }
  __device__ __forceinline__ float of_row(int64_t) const { return 0.0f; }
  template <typename Ring, bool Aligned>
  __device__ __forceinline__ void request(const Ring& ring, int slot, const Place<Aligned>& at) {
    ring.template request<R, size>(slot, 0, y_grad.row<const R>(0), at);
    y_grad.next<R>();
  }
  template <typename Ring>
  __device__ __forceinline__ Input receive(const Ring& ring, int slot) const {
    return ring.template read<R, size>(slot, 0);
  }
  template <typename Row, bool Aligned>
  __device__ __forceinline__ float run(const Place<Aligned>& at, const Input& in, const Row& row,
                                       float (&totals)[sums][size]) {
    float result[size];
    widen(in, result);
    dropout.apply<Aligned>(row.shared.rounds, row.row, row.col, result);
    store(x_grad.row<T>(0), at, pack<T>(result));
    x_grad.next<T>();
#pragma unroll
    for (int i = 0; i < size; ++i) totals[0][i] += result[i];
    return 0.0f;
  }
};

// Calls visit.operator()<T, R>(): R is T or float32.
template <typename Visit>
void visit_dtypes(DType x, DType wide, Visit visit) {
  visit_dtype<float, bfloat16, float16>("bias_dropout_add", x, [&]<typename Host>() {
    using T = device_type<Host>;
    if constexpr (sizeof(T) == 2) {
      if (wide == DType::float32) return visit.template operator()<T, float>();
    }
    visit.template operator()<T, T>();
  });
}

}  // namespace
}  // namespace cuda

void run(const BiasDropoutAddForward& args, Stream stream) {
  using namespace cuda;
  const bool flat = is_flat(args.x) && !args.bias;
  const bool random = static_cast<bool>(args.rng_state);
  const bool aligned = are_aligned(
      "bias_dropout_add",
      {{"x", &args.x}, {"bias", &args.bias}, {"residual", &args.residual}, {"y", &args.y}});
  visit_dtypes(args.x.dtype, args.residual.dtype, [&]<typename T, typename R>() {
    const Extent size = extent("bias_dropout_add", args.x, vector_size<T>, flat);
    const Forward<T, R> op = {size,
                              dropout(args.philox, random, args.probability, size.cols),
                              matrix(args.x, flat),
                              matrix(args.bias, false),
                              matrix(args.residual, flat),
                              matrix(args.y, flat),
                              args.rng_state.as<int64_t>()};
    launch_elements(op, aligned, stream);
    if (random && size.elements == 0) {
      launch(state_kernel<T, R>, {.grid = dim3(1), .block = dim3(1), .stream = stream}, op);
    }
  });
}

void run(const BiasDropoutAddBackward& args, Stream stream) {
  using namespace cuda;
  const bool flat = is_flat(args.x_grad) && !args.bias_grad.total;
  const bool random = static_cast<bool>(args.rng_state);
  const bool aligned =
      are_aligned("bias_dropout_add", {{"y_grad", &args.y_grad}, {"x_grad", &args.x_grad}});
  visit_dtypes(args.x_grad.dtype, args.y_grad.dtype, [&]<typename T, typename R>() {
    const Extent size = extent("bias_dropout_add", args.x_grad, vector_size<T>, flat);
    const Backward<T, R> op = {
        size, dropout(saved_state(args.rng_state), random, args.probability, size.cols),
        matrix(args.y_grad, flat), matrix(args.x_grad, flat)};
    if (args.bias_grad.total) {
      launch_columns(op, args.bias_grad, aligned, stream);
    } else {
      launch_elements(op, aligned, stream);
    }
  });
}

}  // namespace redline
