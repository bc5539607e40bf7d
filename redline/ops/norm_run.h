// What norm's inner ops do below the dispatcher: allocate, check and run.
#pragma once

#include "redline/ops/norm_inner.h"

namespace redline::ops {

NormOutputs run_norm_forward(const at::Tensor& x, const NormInputs& in);
NormGradients run_norm_backward(const at::Tensor& y_grad, const at::Tensor& x,
                                const NormBackwardInputs& in);

// in: the statistics and the parameters that forward had.
at::Tensor run_norm_rebuild(const at::Tensor& x, const NormBackwardInputs& in,
                            at::ScalarType dtype);

}  // namespace redline::ops
