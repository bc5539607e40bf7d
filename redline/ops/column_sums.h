// Allocation of column sums (kernels/column_sums.h) and the last step of the backward ops that
// have them.
#pragma once

#include "redline/kernels/column_sums.h"
#include "redline/ops/run.h"

namespace redline::ops {

inline int64_t column_chunks(const at::Tensor& like, int64_t rows, int64_t cols,
                             int64_t cuda_blocks) {
  if constexpr (with_cuda) {
    if (like.is_cuda()) return cuda::column_chunks(rows, cols, cuda_blocks);
  }
  return cpu::column_chunks(rows, cols);
}

// The workspace for a sum of the rows of a matrix into `total`, of one or more sums per column;
// undefined where no sum is wanted. `cuda_blocks`: of the kernel, on a multiprocessor.
inline at::Tensor column_partial(const at::Tensor& total, bool wanted, const TensorView& matrix,
                                 int64_t cuda_blocks = cuda::column_blocks) {
  if (!wanted) return {};
  const int64_t chunks = column_chunks(total, matrix.sizes[0], matrix.sizes[1], cuda_blocks);
  return at::empty({chunks, total.numel()}, total.options().dtype(accumulation_type(total)));
}

inline ColumnSums column_sums(const at::Tensor& partial, const at::Tensor& total) {
  if (!partial.defined()) return {};
  return {.partial = view(partial), .total = view(total)};
}

// Runs a backward kernel with column sums on the CPU: its chunks, then the sums' columns.
template <typename Args>
void run_chunks(const Args& args, const ColumnSums& sums) {
  parallel_ranges(sums.partial.sizes[0], 1, unit_of_chunks,
                  [&](Range chunks) { run(args, chunks); });
  parallel_ranges(sums.partial.sizes[1], 4096, unit_of_sums,
                  [&](Range cols) { finish(args, cols); });
}

}  // namespace redline::ops
