#include "redline/kernels/cuda/gated_activation/backward.h"

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/launch.h"

namespace redline {
namespace cuda {

int64_t row_parts(DType dtype, int64_t cols) {
  return ceil_div(cols, 32 * (16 / element_bytes(dtype)));
}

}  // namespace cuda

void run(const GatedActivationBackward& args, Stream stream) {
  REDLINE_CHECK(!args.bias_grad.total || !args.row_scale_grad || args.row_parts,
                "gated_activation: row_parts: expected a workspace beside both gradients");
  visit_dtype<float, bfloat16, float16>("gated_activation", args.gate.dtype,
                                        [&]<typename T>() { cuda::run_backward<T>(args, stream); });
}

}  // namespace redline
