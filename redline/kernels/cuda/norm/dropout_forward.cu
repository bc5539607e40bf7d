// residual + dropout(x + input_bias) and its norm (kernels/norm.h), by the rows of the ordinary
// forward: the sum is made where it would have been loaded, and every number is drawn once.
#include "redline/kernels/cuda/dropout.cuh"
#include "redline/kernels/cuda/norm/dropout.h"
#include "redline/kernels/cuda/norm/forward.cuh"

namespace redline::cuda {
namespace {

// The sum of dropped x and the residual, rounded and stored, in place of the row in memory.
struct DroppedSum {
  Matrix input_bias;
  Dropout dropout;
  int64_t* rng_state;

  template <typename T, typename Held, int V>
  __device__ __forceinline__ void fill(RowInput<T, Held, V>& in, const Forward& args, int64_t row,
                                       Columns<true> at) const {
    constexpr int N = vector_size<T>;
    if (rng_state != nullptr && row == 0 && at.col == 0) store_state();
    Packed<T, N> x[V];
    load_vectors(row_at<const T>(args.x, row), at, x);
    load_vectors(row_at<const Held>(args.residual, row), at, in.held);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int col = at.col + v * at.step;
      if (col >= at.cols) break;
      float sum[N], added[N] = {};
      if (input_bias.data != nullptr) {
        load_mixed<T>(input_bias.data, input_bias.is_float32, 0, col, at.cols, true, added);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = element(x[v], i) + added[i];
      dropout.apply(Place<true>{row, col, at.cols}, sum);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += element(in.held[v], i);
      in.held[v] = pack<Held>(sum);
      store(row_at<Held>(args.sum, row), Place<true>{row, col, at.cols}, in.held[v]);
    }
  }

 private:
  __device__ __forceinline__ void store_state() const {
    const PhiloxKey key = dropout.key();
    rng_state[0] = static_cast<int64_t>(key.seed);
    rng_state[1] = static_cast<int64_t>(key.offset);
  }
};

struct DropoutForward : Forward {
  DroppedSum sum_of;

  __device__ __forceinline__ DroppedSum source() const { return sum_of; }
};

template <typename T, typename X, bool Layer>
struct DropoutForm : Form<T, X, Layer, true> {
  using ForwardArgs = DropoutForward;
};

// False, and nothing launched, where the kernel does not fit.
bool launch_dropout(const NormForward& norm, Stream stream) {
  if (norm.x.sizes[0] == 0 || !is_aligned(norm)) return false;
  const bool random = static_cast<bool>(norm.rng_state);
  const DropoutForward args = {
      arguments(norm),
      {matrix(norm.input_bias), dropout(norm.philox, random, norm.probability, norm.x.sizes[1]),
       norm.rng_state.as<int64_t>()}};
  bool launched = false;
  visit_dtype<float, bfloat16, float16>("norm", norm.y.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_bool(norm.norm == Norm::layer, [&]<bool Layer>() {
      if constexpr (sizeof(T) == 2) {
        if (norm.residual.dtype == DType::float32) {
          launched = launch_held<DropoutForm<T, float, Layer>>(args, stream);
          return;
        }
      }
      launched = launch_held<DropoutForm<T, T, Layer>>(args, stream);
    });
  });
  return launched;
}

}  // namespace

void run_dropout(const NormForward& norm, Stream stream) {
  if (launch_dropout(norm, stream)) return;
  note_choice("two kernels, one after the other: bias_dropout_add's, then the norm's");
  run(input_sum(norm), stream);
  NormForward rest = norm;
  rest.x = norm.sum;
  rest.residual = rest.sum = rest.input_bias = rest.rng_state = {};
  run(rest, stream);
}

}  // namespace redline::cuda
