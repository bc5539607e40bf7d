// A tensor as kernels see it: an address, a dtype, sizes and strides. Owns nothing.
#pragma once

#include <cstdint>
#include <string>

#include "redline/core/check.h"
#include "redline/core/dtype.h"

namespace redline {

// Sizes and strides count elements. A view with no address stands for an absent tensor, or for an
// empty one; `present` tells them apart.
struct TensorView {
  static constexpr int max_rank = 5;

  void* data = nullptr;
  DType dtype = DType::float32;
  int rank = 0;
  bool present = false;
  int64_t sizes[max_rank] = {};  // plain arrays: per-instruction-set objects hold no weak functions
  int64_t strides[max_rank] = {};

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= sizes[i];
    return count;
  }
  int64_t bytes() const { return numel() * element_bytes(dtype); }

  explicit operator bool() const { return present; }
};

inline std::string to_text(const TensorView& view) {
  std::string text = "[";
  for (int i = 0; i < view.rank; ++i) {
    text += (i ? ", " : "") + std::to_string(view.sizes[i]);
  }
  return text + "] " + name(view.dtype);
}

// Half-open range: what one call of a CPU kernel works on. An op's run(args, Range) is its CPU
// kernel, single-threaded, and run(args, Stream) its CUDA kernel.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
};

// True when the view is [rows, cols] whose columns lie side by side.
inline bool is_rows(const TensorView& view) {
  return view.rank == 2 && (view.strides[1] == 1 || view.sizes[1] <= 1 || view.sizes[0] == 0);
}

// Requires [rows, cols] with adjacent columns, of any of the floating dtypes.
inline void check_rows(const char* op, const char* tensor, const TensorView& view, int64_t rows,
                       int64_t cols) {
  REDLINE_CHECK(view.present && view.rank == 2 && view.sizes[0] == rows && view.sizes[1] == cols,
                op, ": ", tensor, ": expected [", rows, ", ", cols, "], not ", view);
  REDLINE_CHECK(is_rows(view), op, ": ", tensor, ": expected adjacent columns, not a stride of ",
                view.strides[1]);
}

// Requires a contiguous vector of `count` elements.
inline void check_vector(const char* op, const char* tensor, const TensorView& view,
                         int64_t count) {
  REDLINE_CHECK(view.present && view.rank == 1 && view.sizes[0] == count, op, ": ", tensor,
                ": expected [", count, "], not ", view);
  REDLINE_CHECK(view.strides[0] == 1 || count <= 1, op, ": ", tensor,
                ": expected contiguous, not a stride of ", view.strides[0]);
}

}  // namespace redline
