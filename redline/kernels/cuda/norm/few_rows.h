// Norm's backward of so few rows that launches are most of it.
#pragma once

#include <cstdint>

#include "redline/core/dtype.h"
#include "redline/core/stream.h"
#include "redline/kernels/norm.h"

namespace redline::cuda {

// Whether run_few_rows() takes them: by shape and dtype alone.
bool has_few_rows(DType y_grad, int64_t rows, int64_t cols);
// Without a workspace.
void run_few_rows(const NormBackward& norm, Stream stream);

}  // namespace redline::cuda
