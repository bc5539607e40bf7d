// Sums over rows, such as a bias's gradient, in an order that the shape fixes: the rows fall into
// chunks, chunk k holding the rows [k, k + 1) * ceil(rows / chunks); each chunk is added row by row
// into its row of `partial`, and the chunks are added in index order.
#pragma once

#include <algorithm>

#include "redline/core/tensor_view.h"

namespace redline {

struct ColumnSums {
  TensorView partial;  // [chunks, cols] accumulation dtype, workspace; present with total
  TensorView total;    // [cols], out, optional
};

inline Range chunk_rows(int64_t rows, int64_t chunks, int64_t chunk) {
  const int64_t count = (rows + chunks - 1) / chunks;
  const int64_t begin = std::min(rows, chunk * count);
  return {begin, std::min(rows, begin + count)};
}

inline void check_column_sums(const char* op, const char* tensor, const ColumnSums& sums,
                              int64_t cols, DType accumulation) {
  if (!sums.total) return;
  check_vector(op, tensor, sums.total, cols);
  REDLINE_CHECK(
      sums.partial.rank == 2 && sums.partial.sizes[1] == cols && sums.partial.dtype == accumulation,
      op, ": ", tensor, ": expected partial sums [chunks, ", cols, "] ", accumulation, ", not ",
      sums.partial);
}

// How many chunks the rows fall into: a function of the shape alone.
namespace cpu {
// 64 keep the partial sums small beside x and the last, serial sum short: at 4096 rows of normal
// data the error is 0.72 of that of 16 chunks; 32 and 128 leave more.
inline int64_t column_chunks(int64_t rows, int64_t) {
  return std::clamp<int64_t>(rows / 64, 1, 64);
}
}  // namespace cpu
namespace cuda {
// Blocks that a multiprocessor runs at once: four where they sum one tensor's columns and read two
// (H100, activation 8192 x 4096: 0.90 of a copy, with three 0.87), two where they sum two tensors'
// and read three (gated_activation 8192 x 4096: 0.90, with three 0.89).
inline constexpr int64_t column_blocks = 3, activation_column_blocks = 4, gated_column_blocks = 2;

// Chunks of 256 columns for so many blocks on each of the 132 multiprocessors of an H100, which all
// run at once, or for a whole number of times as many where that leaves 64 rows or more for each;
// 32 rows at least, and no more than 4096 where once is not: the chunks are a grid's second
// dimension, 65535 at most. Constants, not questions to the device: the order of the sum must not
// change from one GPU to the next. (H100, of a copy: activation 8192 x 4096 with 33, 66, 132 chunks
// 0.91, 0.92, 0.93; dropout 16384 x 4096 with 48, 96, 256 chunks 0.87, 0.90, 0.92.)
inline int64_t column_chunks(int64_t rows, int64_t cols, int64_t blocks) {
  const int64_t once = std::max<int64_t>(1, 132 * blocks * 256 / std::max<int64_t>(256, cols));
  const int64_t most = std::max<int64_t>(1, 4096 / once);
  const int64_t times = std::clamp<int64_t>(rows / (64 * once), 1, most);
  return std::clamp<int64_t>(rows / 32, 1, times * once);
}
}  // namespace cuda

}  // namespace redline
