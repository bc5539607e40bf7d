// gated_activation's backward of one element type: backward.cu is compiled once for each.
#pragma once

#include "redline/core/stream.h"
#include "redline/kernels/gated_activation.h"

namespace redline::cuda {

template <typename T>
void run_backward(const GatedActivationBackward& args, Stream stream);

}  // namespace redline::cuda
