// Norm's forwards that have files of their own, for the time that they compile: run() calls them.
#pragma once

#include "redline/kernels/norm.h"

namespace redline::cuda {

void run_layer_forward(const NormForward& norm, Stream stream);

// With a place for the rows' largest magnitudes.
void run_rms_amax(const NormForward& norm, Stream stream);
void run_layer_amax(const NormForward& norm, Stream stream);

}  // namespace redline::cuda
