// Column sums of the per-instruction-set sources (kernels/column_sums.h).
#pragma once

#include "redline/kernels/column_sums.h"
#include "redline/kernels/cpu/block.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// The zeroed row of the partial sums that `chunk` adds into; null where no sum is asked for.
template <typename Acc>
Acc* begin_chunk(const ColumnSums& sums, int64_t chunk) {
  if (!sums.total) return nullptr;
  Acc* row = sums.partial.as<Acc>() + chunk * sums.partial.strides[0];
  memset(row, 0, static_cast<size_t>(sums.partial.sizes[1]) * sizeof(Acc));
  return row;
}

template <typename Acc>
REDLINE_INLINE void add_to(Acc* sums, Vector<Acc> v, int n) {
  store(sums, load(sums, n) + v, n);
}

// Adds the chunks of the range's columns in index order and rounds once.
template <typename Acc>
void finish_columns(const ColumnSums& sums, Range cols) {
  Block<Acc> total, out_block;
  for (int64_t col = cols.begin; col < cols.end; col += block_size) {
    const int count = static_cast<int>(cols.end - col < block_size ? cols.end - col : block_size);
    memset(total.values, 0, sizeof(total.values));
    for (int64_t chunk = 0; chunk < sums.partial.sizes[0]; ++chunk) {
      const Acc* from = sums.partial.as<const Acc>() + chunk * sums.partial.strides[0] + col;
      for_vectors<Acc>(count,
                       [&](int i, int n) { add_to(total.values + i, load(from + i, n), n); });
    }
    Acc* out = begin_write(sums.total.data, sums.total.dtype, col, out_block);
    memcpy(out, total.values, static_cast<size_t>(count) * sizeof(Acc));
    finish_write(sums.total.data, sums.total.dtype, col, count, out_block);
  }
}

REDLINE_INLINE void finish_columns(const ColumnSums& sums, Range cols) {
  if (!sums.total) return;
  if (sums.partial.dtype == DType::float64) {
    finish_columns<double>(sums, cols);
  } else {
    finish_columns<float>(sums, cols);
  }
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
