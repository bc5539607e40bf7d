#include "redline/kernels/cuda/norm/dropout.h"
#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/layer_forward.h"

namespace redline {

void run(const NormForward& norm, Stream stream) {
  if (norm.input_bias || norm.rng_state) return cuda::run_dropout(norm, stream);
  if (norm.norm == Norm::layer) return cuda::run_layer_forward(norm, stream);
  cuda::run_forward<false>(norm, stream);
}

}  // namespace redline
