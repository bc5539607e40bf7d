#include "redline/core/dispatch.h"
#include "redline/core/watch.h"
#include "redline/kernels/cuda/norm/backward.h"
#include "redline/kernels/cuda/norm/dropout.h"

namespace redline::cuda {

void run_dropout(const NormBackward& norm, Stream stream) {
  bool launched = false;
  visit_dtype<float, bfloat16, float16>(
      "norm", norm.y_grad.dtype, [&]<typename T>() { launched = launch_dropout<T>(norm, stream); });
  if (launched) {
    sum_parameters(norm, stream);
    return;
  }
  note_choice("two kernels, one after the other: the norm's, then bias_dropout_add's");
  NormBackward rest = norm;
  rest.rng_state = rest.input_grad = {};
  rest.input_bias_grad = {};
  run(rest, stream);
  BiasDropoutAddBackward input = input_gradient(norm);
  // Without dropout it is x_grad, which is written once more as it is.
  if (!input.x_grad) input.x_grad = norm.x_grad;
  run(input, stream);
}

}  // namespace redline::cuda
