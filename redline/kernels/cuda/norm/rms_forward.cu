#include "redline/kernels/cuda/norm/dropout.h"
#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/forward.h"

namespace redline {

void run(const NormForward& norm, Stream stream) {
  const bool layer = norm.norm == Norm::layer;
  if (norm.input_bias || norm.rng_state) return cuda::run_dropout(norm, stream);
  if (norm.quantized.amax) {
    return layer ? cuda::run_layer_amax(norm, stream) : cuda::run_rms_amax(norm, stream);
  }
  if (layer) return cuda::run_layer_forward(norm, stream);
  cuda::run_forward<false>(norm, stream);
}

}  // namespace redline
