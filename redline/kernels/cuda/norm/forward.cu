// Norm's forward (kernels/norm.h) of x as it lies in memory, or of its sum with a residual.
#include "redline/kernels/cuda/norm/forward.h"
#include "redline/kernels/cuda/norm/run_forms.cuh"

namespace redline::cuda {

template <typename Host>
void run_forward(const NormForward& norm, Stream stream) {
  run_forms<Host, Form>(norm, stream);
}

template void run_forward<REDLINE_ELEMENT>(const NormForward&, Stream);

}  // namespace redline::cuda
