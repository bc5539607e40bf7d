#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/forward.h"

namespace redline::cuda {

void run_layer_forward(const NormForward& norm, Stream stream) { run_forward<true>(norm, stream); }

}  // namespace redline::cuda
