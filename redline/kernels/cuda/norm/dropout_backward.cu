// Norm's backward behind dropout (kernels/norm.h): x_grad, the residual's gradient, is dropped
// again where it is made, so that the gradient of forward's x costs its own bytes alone. The sums
// over rows of an input bias's gradient take bias_dropout_add's kernel: in this one they would be a
// third of them for layer, in registers that there are not.
#include "redline/kernels/cuda/dropout.cuh"
#include "redline/kernels/cuda/norm/dropout.h"
#include "redline/kernels/cuda/norm/few_rows.h"
#include "redline/kernels/cuda/norm/row_backward.cuh"

namespace redline::cuda {
namespace {

// The gradient of forward's x, of what x_grad is rounded to.
struct InputGradient {
  Matrix input_grad;
  Dropout dropout;

  template <typename Form, int N>
  __device__ __forceinline__ void store(uint32_t row, Columns<Form::aligned> at,
                                        const float (&x_grad)[1][N]) const {
    const auto rounded = pack<typename Form::X>(x_grad[0]);
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = element(rounded, i);
    dropout.apply<Form::aligned>(row, at.col, values);
    store_mixed<typename Form::T>(input_grad.data, input_grad.is_float32, row * input_grad.stride,
                                  at.col, at.cols, Form::aligned, values);
  }
};

struct DropoutBackward : Backward {
  InputGradient input;

  __device__ __forceinline__ InputGradient behind() const {
    return {input.input_grad, input.dropout.local()};
  }
};

template <typename T, typename X, bool Layer>
struct DropoutForm : Form<T, X, Layer, true> {
  using BackwardArgs = DropoutBackward;
};

}  // namespace

template <typename Host>
bool launch_dropout(const NormBackward& norm, Stream stream) {
  if (!norm.rng_state || norm.input_bias_grad.total || !is_aligned(norm)) return false;
  // Whose sums over rows have an order of their own, as they have without dropout.
  if (has_few_rows(norm.y_grad.dtype, norm.x.sizes[0], norm.x.sizes[1])) return false;
  const DropoutBackward args = {
      arguments(norm, stream),
      {matrix(norm.input_grad),
       dropout(saved_state(norm.rng_state), true, norm.probability, norm.x.sizes[1])}};
  using T = device_type<Host>;
  bool launched = false;
  visit_forms<T>(norm.x.dtype == DType::float32, norm.norm, [&]<typename X, bool Layer>() {
    launched = launch_rows<DropoutForm<T, X, Layer>>(args, stream);
  });
  return launched;
}

template bool launch_dropout<REDLINE_ELEMENT>(const NormBackward&, Stream);

}  // namespace redline::cuda
