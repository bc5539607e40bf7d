// Norm's forward with each row's largest magnitude, by kernels of its own: those without it have no
// registers for it.
#include "redline/kernels/cuda/norm/forward.h"
#include "redline/kernels/cuda/norm/run_forms.cuh"

namespace redline::cuda {

template <typename Host>
void run_amax_forward(const NormForward& norm, Stream stream) {
  run_forms<Host, AmaxForm>(norm, stream);
}

template void run_amax_forward<REDLINE_ELEMENT>(const NormForward&, Stream);

}  // namespace redline::cuda
