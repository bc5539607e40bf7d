// What the checks of several families say of their operands.
#pragma once

#include "redline/core/tensor_view.h"

namespace redline {

inline void check_floating(const char* op, const char* tensor, const TensorView& view) {
  REDLINE_CHECK(is_floating(view.dtype), op, ": ", tensor, ": expected a floating dtype, not ",
                view.dtype);
}

// x's dtype, or float32 beside a 16-bit x.
inline void check_mixed(const char* op, const char* tensor, const TensorView& view, DType x) {
  const DType wide = accumulation_dtype(x);
  REDLINE_CHECK(view.dtype == x || view.dtype == wide, op, ": ", tensor, ": expected ", x,
                x == wide ? "" : " or float32", ", not ", view.dtype);
}

// [rows, cols] with adjacent columns, of one dtype.
inline void check_matrix(const char* op, const char* tensor, const TensorView& view,
                         const TensorView& like, DType dtype) {
  check_rows(op, tensor, view, like.sizes[0], like.sizes[1]);
  REDLINE_CHECK(view.dtype == dtype, op, ": ", tensor, ": expected ", dtype, ", not ", view.dtype);
}

// A contiguous vector of one dtype.
inline void check_values(const char* op, const char* tensor, const TensorView& view, int64_t count,
                         DType dtype) {
  check_vector(op, tensor, view, count);
  REDLINE_CHECK(view.dtype == dtype, op, ": ", tensor, ": expected ", dtype, ", not ", view.dtype);
}

// An optional contiguous vector beside x.
inline void check_parameter(const char* op, const char* tensor, const TensorView& parameter,
                            int64_t count, DType x) {
  if (!parameter) return;
  check_vector(op, tensor, parameter, count);
  check_mixed(op, tensor, parameter, x);
}

// Of dropout: the share that is dropped, and where the state of its numbers is kept.
inline void check_random(const char* op, double probability, const TensorView& rng_state) {
  REDLINE_CHECK(probability >= 0 && probability <= 1, op, ": probability: expected 0 to 1, not ",
                probability);
  if (rng_state) check_values(op, "rng_state", rng_state, 2, DType::int64);
}

inline void check_row_count(const char* op, const TensorView& row_count) {
  if (!row_count) return;
  REDLINE_CHECK(row_count.numel() == 1 && row_count.dtype == DType::int64, op,
                ": row_count: expected one int64, not ", row_count);
}

}  // namespace redline
