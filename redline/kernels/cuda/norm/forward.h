// Norm's forward where y holds T: forward.cu and amax_forward.cu are compiled once for each.
#pragma once

#include "redline/core/stream.h"
#include "redline/kernels/norm.h"

namespace redline::cuda {

template <typename T>
void run_forward(const NormForward& norm, Stream stream);

// With a place for the rows' largest magnitudes.
template <typename T>
void run_amax_forward(const NormForward& norm, Stream stream);

}  // namespace redline::cuda
