// Norm's forward with each row's largest magnitude, by kernels of its own: those without it have no
// registers for it.
#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/forward.h"
#include "redline/kernels/cuda/norm/zero_rows.cuh"

namespace redline::cuda {

template <typename Host>
void run_amax_forward(const NormForward& norm, Stream stream) {
  const Forward args = arguments(norm);
  run_forms<Host, AmaxForm>(norm, args, stream);
  if (norm.row_count) zero_rows(args, stream);
}

template void run_amax_forward<REDLINE_ELEMENT>(const NormForward&, Stream);

}  // namespace redline::cuda
