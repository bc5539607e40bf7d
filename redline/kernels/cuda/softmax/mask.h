// Whether a softmax's kernels may read the mask beside a vector of scores as one vector, and what
// stands in the way. Host code without CUDA: it is tested where there is no GPU.
#pragma once

#include <cstdint>

#include "redline/core/tensor_view.h"
#include "redline/core/watch.h"

namespace redline::cuda {

// The mask's leading axis whose stride is no multiple of `count` bytes; -1 for none.
inline int unaligned_mask_axis(const TensorView& mask, int count) {
  for (int i = 0; i < 3; ++i) {
    if (mask.strides[i] % count != 0) return i;
  }
  return -1;
}

// True when every `count` adjacent bytes of a row of whole vectors may be read at once. An absent
// mask is no hindrance. Otherwise a watcher is told why.
inline bool is_read_by_vectors(const TensorView& mask, int count) {
  if (!mask) return true;
  const auto past = reinterpret_cast<uintptr_t>(mask.data) % count;
  const int axis = unaligned_mask_axis(mask, count);
  const auto note = [](const char* instead, const auto&... found) {
    note_fallback({"softmax", "mask", instead}, found..., ": one element per access");
  };
  if (mask.strides[3] == 0) {
    note("give one with the scores' keys", "its one key stands for all");
  } else if (mask.strides[3] != 1) {
    note("give it contiguous", "its keys are ", mask.strides[3], " bytes apart");
  } else if (past != 0) {
    note("give a tensor with an address of its own, such as a clone", "its address is ", past,
         " bytes past a multiple of ", count);
  } else if (axis >= 0) {
    note("give it contiguous", "a stride of ", mask.strides[axis], " bytes is no multiple of ",
         count);
  } else {
    return true;
  }
  return false;
}

}  // namespace redline::cuda
