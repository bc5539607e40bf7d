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
    if (rng_state != nullptr && row == 0 && at.col == 0) {
      dropout.store_state(rng_state);
    }
    Packed<T, N> x[V];
    load_vectors(row_at<const T>(args.x, row), at, x);
    load_vectors(row_at<const Held>(args.residual, row), at, in.held);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int col = at.col + v * at.step;
      if (col >= at.cols) break;
      const Place<true> place = {row, col, at.cols};
      float sum[N];
      dropout.add(x[v], row_of(input_bias, 0), in.held[v], place, sum);
      in.held[v] = pack<Held>(sum);
      store(row_at<Held>(args.sum, row), place, in.held[v]);
    }
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

}  // namespace

template <typename Host>
bool launch_dropout(const NormForward& norm, Stream stream) {
  if (norm.x.sizes[0] == 0 || !is_aligned(norm)) return false;
  const bool random = static_cast<bool>(norm.rng_state);
  const DropoutForward args = {
      arguments(norm),
      {matrix(norm.input_bias), dropout(norm.philox, random, norm.probability, norm.x.sizes[1]),
       norm.rng_state.as<int64_t>()}};
  using T = device_type<Host>;
  bool launched = false;
  visit_forms<T>(norm.residual.dtype == DType::float32, norm.norm, [&]<typename X, bool Layer>() {
    launched = launch_held<DropoutForm<T, X, Layer>>(args, stream);
  });
  return launched;
}

template bool launch_dropout<REDLINE_ELEMENT>(const NormForward&, Stream);

}  // namespace redline::cuda
