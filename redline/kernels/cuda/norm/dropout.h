// The kernels of a norm behind dropout or an input bias: run() calls them where there is either.
#pragma once

#include "redline/core/stream.h"
#include "redline/kernels/norm.h"

namespace redline::cuda {

void run_dropout(const NormForward& norm, Stream stream);
void run_dropout(const NormBackward& norm, Stream stream);

}  // namespace redline::cuda
