// Walks of element-by-element kernels over [rows, cols] views, for the per-instruction-set sources.
#pragma once

#include "redline/kernels/cpu/block.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// Calls body(row, col, count) for each block of the elements [begin, end), counted row after row.
template <typename Body>
REDLINE_INLINE void for_element_blocks(Range elements, int64_t cols, Body body) {
  if (elements.begin >= elements.end) return;
  int64_t row = elements.begin / cols, col = elements.begin % cols;
  for (int64_t left = elements.end - elements.begin; left > 0;) {
    int64_t count = cols - col < block_size ? cols - col : block_size;
    count = count < left ? count : left;
    body(row, col, static_cast<int>(count));
    left -= count;
    col += count;
    if (col == cols) col = 0, ++row;
  }
}

// Vectors of the arithmetic type from and to memory that holds T.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <typename T>
using arithmetic = typename Arithmetic<T>::type;

template <typename T>
REDLINE_INLINE Vector<arithmetic<T>> load_wide(const T* from, int n) {
  prefetch(from);
  if constexpr (sizeof(T) == 2) {
    return load_half(from, n);
  } else {
    return load(from, n);
  }
}
template <typename T>
REDLINE_INLINE void store_narrow(T* to, Vector<arithmetic<T>> v, int n) {
  prefetch(to);
  if constexpr (sizeof(T) == 2) {
    store_half(to, v, n);
  } else {
    store(to, v, n);
  }
}

// The element at (row, col).
template <typename T>
REDLINE_INLINE T* at(const TensorView& view, int64_t row, int64_t col) {
  return view.as<T>() + row * view.strides[0] + col;
}

// Calls visit.operator()<T>() with the storage type; the check has refused all other dtypes.
template <typename Visit>
REDLINE_INLINE void visit_storage(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float64:
      return visit.template operator()<double>();
    case DType::bfloat16:
      return visit.template operator()<bfloat16>();
    case DType::float16:
      return visit.template operator()<float16>();
    default:
      return visit.template operator()<float>();
  }
}

// Elements of an optional vector; null where it is absent.
template <typename Acc>
REDLINE_INLINE const Acc* read_optional(const TensorView& view, int64_t offset, int count,
                                        Block<Acc>& block) {
  return view ? read<Acc>(view.data, view.dtype, offset, count, block) : nullptr;
}

// Where to write elements of row `row` from column `col` on: fill `values`, then finish(count). Of
// an absent view: nowhere but into `block`.
template <typename Acc>
struct RowWriter {
  const TensorView& view;
  int64_t offset;
  Block<Acc>& block;
  Acc* values;

  REDLINE_INLINE RowWriter(const TensorView& view, int64_t row, int64_t col, Block<Acc>& block)
      : view(view),
        offset(row * view.strides[0] + col),
        block(block),
        values(view ? begin_write(view.data, view.dtype, offset, block) : block.values) {}

  REDLINE_INLINE void finish(int count) const {
    finish_write(view.data, view.dtype, offset, count, block);
  }
};

// Rows from the device's row_count on hold nothing.
REDLINE_INLINE int64_t counted_rows(const TensorView& row_count, int64_t rows) {
  if (!row_count) return rows;
  const int64_t count = *row_count.as<const int64_t>();
  return count < rows ? (count > 0 ? count : 0) : rows;
}

REDLINE_INLINE void write_zeros(const TensorView& view, int64_t row) {
  const int64_t bytes = element_bytes(view.dtype);
  memset(static_cast<char*>(view.data) + row * view.strides[0] * bytes, 0,
         static_cast<size_t>(view.sizes[1] * bytes));
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
