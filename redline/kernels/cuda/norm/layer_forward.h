// LayerNorm's forward, in a file of its own: with RMSNorm's it compiles twice as long.
#pragma once

#include "redline/kernels/norm.h"

namespace redline::cuda {

void run_layer_forward(const NormForward& norm, Stream stream);

}  // namespace redline::cuda
