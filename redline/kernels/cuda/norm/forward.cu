// Norm's forward (kernels/norm.h) of x as it lies in memory, or of its sum with a residual.
#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/forward.h"
#include "redline/kernels/cuda/norm/zero_rows.cuh"

namespace redline::cuda {

template <typename Host>
void run_forward(const NormForward& norm, Stream stream) {
  const Forward args = arguments(norm);
  run_forms<Host, Form>(norm, args, stream);
  if (norm.row_count) zero_rows(args, stream);
}

template void run_forward<REDLINE_ELEMENT>(const NormForward&, Stream);

}  // namespace redline::cuda
