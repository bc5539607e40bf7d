// The kernels of a norm behind dropout or an input bias: run() calls them where there is either.
#pragma once

#include "redline/core/stream.h"
#include "redline/kernels/norm.h"

namespace redline::cuda {

void run_dropout(const NormForward& norm, Stream stream);
void run_dropout(const NormBackward& norm, Stream stream);

// By one kernel, where y, or in backward y_grad, holds T: dropout_forward.cu and
// dropout_backward.cu are compiled once for each. False, and nothing launched, where it does not
// fit.
template <typename T>
bool launch_dropout(const NormForward& norm, Stream stream);
template <typename T>
bool launch_dropout(const NormBackward& norm, Stream stream);

}  // namespace redline::cuda
