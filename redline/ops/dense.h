// Lists of tensors that elementwise kernels walk as flat memory.
#pragma once

#include <vector>

#include "redline/ops/view.h"

namespace redline::ops {

// Addresses of tensors whose elements lie side by side in the order of `like`. A tensor that does
// not is worked on as a copy; write_back() returns those that were written.
class DenseTensors {
 public:
  explicit DenseTensors(const char* op) : op_(op) {}

  // `list`: the name of the op's argument.
  const void* read(const char* list, const at::Tensor& tensor, const at::Tensor& like) {
    if (fits(tensor, like)) return tensor.const_data_ptr();
    return copy_of(list, tensor, like).const_data_ptr();
  }

  void* write(const char* list, const at::Tensor& tensor, const at::Tensor& like) {
    if (fits(tensor, like)) return tensor.data_ptr();
    const at::Tensor copy = copy_of(list, tensor, like);
    written_.emplace_back(tensor, copy);
    return copy.data_ptr();
  }

  void write_back() const {
    for (const auto& [tensor, copy] : written_) tensor.copy_(copy);
  }

 private:
  static bool fits(const at::Tensor& tensor, const at::Tensor& like) {
    if (tensor.is_contiguous() && like.is_contiguous()) return true;
    return tensor.is_non_overlapping_and_dense() && tensor.strides() == like.strides();
  }

  // empty_like keeps a dense layout and makes any other contiguous: the same for one `like`.
  at::Tensor copy_of(const char* list, const at::Tensor& tensor, const at::Tensor& like) {
    note_copy(op_, list, tensor);
    at::Tensor copy = at::empty_like(like, tensor.options());
    copy.copy_(tensor);
    copies_.push_back(copy);
    return copy;
  }

  const char* op_;
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
};

// What autograd asks of an op that writes its arguments.
inline void bump_versions(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace redline::ops
