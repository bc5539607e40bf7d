// Allocation of column sums (kernels/column_sums.h) and the last step of the backward ops that
// have them.
#pragma once

#include "redline/kernels/column_sums.h"
#include "redline/ops/run.h"

namespace redline::ops {

inline int64_t column_chunks(const at::Tensor& like, int64_t rows, int64_t cols) {
  if constexpr (with_cuda) {
    if (like.is_cuda()) return cuda::column_chunks(rows, cols);
  }
  return cpu::column_chunks(rows, cols);
}

// The workspace for a sum of `rows` rows into `total`; undefined where no sum is wanted.
inline at::Tensor column_partial(const at::Tensor& total, bool wanted, int64_t rows) {
  if (!wanted) return {};
  const int64_t cols = total.numel();
  return at::empty({column_chunks(total, rows, cols), cols},
                   total.options().dtype(accumulation_type(total)));
}

inline ColumnSums column_sums(const at::Tensor& partial, const at::Tensor& total) {
  if (!partial.defined()) return {};
  return {.partial = view(partial), .total = view(total)};
}

// Runs a backward kernel with column sums on the CPU: its chunks, then the sums' columns.
template <typename Args>
void run_chunks(const Args& args, const ColumnSums& sums) {
  parallel_ranges(sums.partial.sizes[0], 1, [&](Range chunks) { run(args, chunks); });
  parallel_ranges(sums.partial.sizes[1], 4096, [&](Range cols) { finish(args, cols); });
}

}  // namespace redline::ops
