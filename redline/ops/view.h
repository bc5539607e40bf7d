// From torch's tensors to views: the only bridge.
#pragma once

#include "redline/core/tensor_view.h"
#include "redline/core/watch.h"
#include "redline/ops/torch.h"

namespace redline::ops {

inline DType dtype_from(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::float64;
    case at::kFloat:
      return DType::float32;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kFloat8_e4m3fn:
      return DType::float8_e4m3;
    case at::kFloat8_e5m2:
      return DType::float8_e5m2;
    case at::kLong:
      return DType::int64;
    case at::kInt:
      return DType::int32;
    case at::kBool:
      return DType::boolean;
    default:
      TORCH_CHECK(false, "redline: no kernel for dtype ", type);
  }
}

// The tensor with its own sizes and strides; rank <= TensorView::max_rank.
inline TensorView view(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  TORCH_CHECK(tensor.dim() <= TensorView::max_rank, "redline: expected a rank of at most ",
              TensorView::max_rank, ", not ", tensor.dim());
  TensorView result;
  result.data = tensor.data_ptr();
  result.dtype = dtype_from(tensor.scalar_type());
  result.rank = static_cast<int>(tensor.dim());
  result.present = true;
  for (int i = 0; i < result.rank; ++i) {
    result.sizes[i] = tensor.size(i);
    result.strides[i] = tensor.stride(i);
  }
  return result;
}

inline TensorView view(const std::optional<at::Tensor>& tensor) {
  return tensor ? view(*tensor) : TensorView{};
}

// The distance of neighbouring rows, where the leading axes fold into one and the columns are
// adjacent; nothing otherwise.
inline std::optional<int64_t> row_stride(const at::Tensor& tensor) {
  const int64_t axes = tensor.dim(), cols = tensor.size(-1);
  if (tensor.is_contiguous()) return cols;
  if (cols > 1 && tensor.stride(-1) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0;  // the stride that the axis must have to fold into the ones behind it
  for (int64_t i = axes - 2; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (stride && tensor.stride(i) != next) return std::nullopt;
    if (!stride) stride = tensor.stride(i);
    next = tensor.stride(i) * tensor.size(i);
  }
  if (!stride) return cols;
  return *stride >= cols ? stride : std::nullopt;  // overlapping rows are copied
}

// [rows, cols] with cols the last axis. The tensor must come from with_rows().
inline TensorView view_rows(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  TensorView result;
  result.data = tensor.data_ptr();
  result.dtype = dtype_from(tensor.scalar_type());
  result.rank = 2;
  result.present = true;
  result.sizes[1] = tensor.size(-1);
  result.sizes[0] = 1;
  for (int64_t i = 0; i < tensor.dim() - 1; ++i) result.sizes[0] *= tensor.size(i);
  result.strides[1] = 1;
  result.strides[0] = row_stride(tensor).value_or(result.sizes[1]);
  return result;
}

inline TensorView view_rows(const std::optional<at::Tensor>& tensor) {
  return tensor ? view_rows(*tensor) : TensorView{};
}

// A contiguous tensor as a vector of all its elements, without the dispatch that view() costs; or
// as one row of them.
inline TensorView view_vector(const at::Tensor& tensor) {
  TensorView result;
  result.data = tensor.data_ptr();
  result.dtype = dtype_from(tensor.scalar_type());
  result.rank = 1;
  result.present = true;
  result.sizes[0] = tensor.numel();
  result.strides[0] = 1;
  return result;
}

inline TensorView view_flat(const at::Tensor& tensor) {
  TensorView result = view_vector(tensor);
  result.rank = 2;
  result.sizes[1] = result.strides[0] = result.sizes[0];
  result.sizes[0] = result.strides[1] = 1;
  return result;
}

inline TensorView view_vector(const std::optional<at::Tensor>& tensor) {
  return tensor ? view_vector(*tensor) : TensorView{};
}

// Tells a watcher of a copy that another layout would spare.
inline void note_copy(const char* op, const char* name, const at::Tensor& tensor) {
  if (watcher() == nullptr) return;
  note_fallback({op, name, "give it contiguous"},
                c10::str("sizes ", tensor.sizes(), " with strides ", tensor.strides(),
                         " are copied to lie side by side"));
}

inline at::Tensor contiguous(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  note_copy(op, name, tensor);
  return tensor.contiguous();
}

inline std::optional<at::Tensor> contiguous(const char* op, const char* name,
                                            const std::optional<at::Tensor>& tensor) {
  if (!tensor || !tensor->defined()) return std::nullopt;
  return contiguous(op, name, *tensor);
}

// The tensor itself where view_rows() can describe it, otherwise a contiguous copy. Symbolic sizes
// are never asked for: call it in run().
inline at::Tensor with_rows(const char* op, const char* name, const at::Tensor& tensor) {
  if (!tensor.defined() || row_stride(tensor)) return tensor;
  return contiguous(op, name, tensor);
}

inline std::optional<at::Tensor> with_rows(const char* op, const char* name,
                                           const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(with_rows(op, name, *tensor)) : std::nullopt;
}

// [tokens] int64 of a loss's classes.
inline at::Tensor flat_targets(const char* op, const at::Tensor& targets) {
  if (targets.scalar_type() != at::kLong) {
    note_fallback({op, "targets", "give int64"}, "int32 is copied to int64");
  }
  return contiguous(op, "targets", targets.to(at::kLong)).reshape({-1});
}

}  // namespace redline::ops
