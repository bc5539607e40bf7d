// The two launches of norm's backward.
#pragma once

#include "redline/core/stream.h"
#include "redline/kernels/norm.h"

namespace redline::cuda {

// x_grad and the partial sums, where y_grad holds T: backward.cu is compiled once for each.
template <typename T>
void launch_backward(const NormBackward& norm, Stream stream);

// The weight's and the bias's gradients, of what the blocks left.
void sum_parameters(const NormBackward& norm, Stream stream);

}  // namespace redline::cuda
