#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/forward.h"

namespace redline::cuda {

void run_rms_amax(const NormForward& norm, Stream stream) {
  run_forward<false, AmaxForm>(norm, stream);
}

}  // namespace redline::cuda
