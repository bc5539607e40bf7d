#include "redline/core/dispatch.h"
#include "redline/core/watch.h"
#include "redline/kernels/cuda/norm/dropout.h"

namespace redline::cuda {

void run_dropout(const NormForward& norm, Stream stream) {
  bool launched = false;
  visit_dtype<float, bfloat16, float16>(
      "norm", norm.y.dtype, [&]<typename T>() { launched = launch_dropout<T>(norm, stream); });
  if (launched) return;
  note_choice("two kernels, one after the other: bias_dropout_add's, then the norm's");
  run(input_sum(norm), stream);
  NormForward rest = norm;
  rest.x = norm.sum;
  rest.residual = rest.sum = rest.input_bias = rest.rng_state = {};
  run(rest, stream);
}

}  // namespace redline::cuda
