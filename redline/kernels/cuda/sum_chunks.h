// Second phase of a sum over rows: [chunks, cols] partial sums to [cols], in index order.
#pragma once

#include "redline/core/stream.h"
#include "redline/kernels/column_sums.h"

namespace redline::cuda {

// `total`: [cols], rounded once, of `partial`: [chunks, cols] float32, contiguous; absent ones are
// left out. The launch before it on the stream is the one that writes `partial`.
void sum_chunks(ColumnSums first, ColumnSums second, Stream stream);

}  // namespace redline::cuda
