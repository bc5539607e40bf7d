// Whether CUDA kernels may read rows by 16 bytes, and what stands in the way. Host code without
// CUDA: it is tested where there is no GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "redline/core/tensor_view.h"
#include "redline/core/watch.h"

namespace redline::cuda {

struct NamedView {
  const char* name;
  const TensorView* view;
};

inline constexpr int64_t vector_bytes = 16;

// The axis whose stride is no multiple of 16 bytes; -1 for none.
inline int unaligned_axis(const TensorView& view) {
  const int64_t bytes = element_bytes(view.dtype);
  for (int i = 0; i + 1 < view.rank; ++i) {
    if (view.strides[i] * bytes % vector_bytes != 0) return i;
  }
  return -1;
}

// True when 16-byte accesses are legal at the start of every row: address, row stride and row
// length. An absent view does not count.
inline bool is_aligned(const TensorView& view) {
  return !view || (reinterpret_cast<uintptr_t>(view.data) % vector_bytes == 0 &&
                   view.sizes[view.rank - 1] * element_bytes(view.dtype) % vector_bytes == 0 &&
                   unaligned_axis(view) < 0);
}

// Tells a watcher about the view that is not; `therefore` is what the kernel does about it.
inline void note_unaligned(const char* op, NamedView unaligned, const char* therefore) {
  const TensorView& view = *unaligned.view;
  const int64_t bytes = element_bytes(view.dtype), cols = view.sizes[view.rank - 1];
  const auto past = reinterpret_cast<uintptr_t>(view.data) % vector_bytes;
  const auto note = [&](const char* instead, const auto&... found) {
    note_fallback({op, unaligned.name, instead}, found..., ": ", therefore);
  };
  if (cols * bytes % vector_bytes != 0) {
    note("pad the rows to a multiple of 16 bytes", "rows of ", cols, " ", view.dtype,
         " are no multiple of 16 bytes");
  } else if (past != 0) {
    note("give a tensor with an address of its own, such as a clone", "its address is ", past,
         " bytes past a multiple of 16");
  } else {
    note("give it contiguous, or with strides in multiples of 16 bytes", "a stride of ",
         view.strides[unaligned_axis(view)], " ", view.dtype, " is no multiple of 16 bytes");
  }
}

// For lists of tensors, whose kernels read four elements at once.
inline void note_address(const char* op, const char* tensor, const void* data, DType dtype) {
  const int64_t bytes = 4 * element_bytes(dtype);
  const auto past = reinterpret_cast<uintptr_t>(data) % bytes;
  if (past == 0) return;
  note_fallback({op, tensor, "give a tensor with an address of its own, such as a clone"},
                "an address is ", past, " bytes past a multiple of ", bytes,
                ": one element per access");
}

// Whether all are aligned.
inline bool are_aligned(const char* op, std::initializer_list<NamedView> views,
                        const char* otherwise = "one element per access") {
  const auto* found = std::find_if(views.begin(), views.end(),
                                   [](const NamedView& named) { return !is_aligned(*named.view); });
  if (found == views.end()) return true;
  note_unaligned(op, *found, otherwise);
  return false;
}

}  // namespace redline::cuda
