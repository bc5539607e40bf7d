// Views of temporaries below the dispatcher, which takes 0.2 us for each op and has three for a
// transpose.
#pragma once

#include <ATen/ops/as_strided_native.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "redline/ops/torch.h"

namespace redline::ops {

inline constexpr c10::DispatchKeySet plain_keys(
    {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU,
     c10::DispatchKey::AutogradCUDA, c10::DispatchKey::ADInplaceOrView,
     c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

inline bool holds_only(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys | allowed) == allowed;
}

// Whether the tensor is memory of a CPU or a GPU, no subclass and no other kind.
inline bool is_plain(const at::Tensor& tensor) { return holds_only(tensor.key_set(), plain_keys); }

// Whether nobody but autograd and autocast looks at the thread's ops: no mode, no tracing.
inline bool is_unobserved() {
  constexpr auto allowed = plain_keys.add(c10::DispatchKey::BackendSelect);
  return holds_only(c10::impl::tls_local_dispatch_key_set().included_, allowed);
}

// Whether a view of the tensor is nobody's business: below autograd, too.
inline bool is_private(const at::Tensor& tensor) {
  const bool below = c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::ADInplaceOrView);
  return below && is_plain(tensor) && is_unobserved();
}

// tensor.transpose(a, b).
inline at::Tensor swapped_directly(const at::Tensor& tensor, int64_t a, int64_t b) {
  c10::DimVector sizes(tensor.sizes()), strides(tensor.strides());
  std::swap(sizes[a], sizes[b]);
  std::swap(strides[a], strides[b]);
  return at::native::as_strided_tensorimpl(tensor, sizes, strides);
}

// A contiguous tensor with other sizes.
inline at::Tensor resized_directly(const at::Tensor& tensor, at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());  // of a DimVector g++ 12 says it may be uninitialised
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  return at::native::as_strided_tensorimpl(tensor, sizes, strides);
}

}  // namespace redline::ops
