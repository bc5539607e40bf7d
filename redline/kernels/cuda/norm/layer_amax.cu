#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/forward.h"

namespace redline::cuda {

void run_layer_amax(const NormForward& norm, Stream stream) {
  run_forward<true, AmaxForm>(norm, stream);
}

}  // namespace redline::cuda
