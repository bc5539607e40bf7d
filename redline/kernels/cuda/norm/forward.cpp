#include "redline/kernels/cuda/norm/forward.h"

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/norm/dropout.h"

namespace redline {

void run(const NormForward& norm, Stream stream) {
  if (norm.input_bias || norm.rng_state) return cuda::run_dropout(norm, stream);
  visit_dtype<float, bfloat16, float16>("norm", norm.y.dtype, [&]<typename T>() {
    norm.quantized.amax ? cuda::run_amax_forward<T>(norm, stream)
                        : cuda::run_forward<T>(norm, stream);
  });
}

}  // namespace redline
