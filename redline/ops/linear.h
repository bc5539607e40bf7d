// y = x W^T + bias, and where the weight's gradient goes. Kept for backward: x where the weight is
// trained, the weight where x has a gradient. The products are gemm's.
#pragma once

#include <deque>

#include "redline/ops/torch.h"

namespace redline::ops {

// Weight gradients to be computed later, first in, first out: TorchScript's
// torch.classes.redline.WeightGradientQueue. An entry keeps x and y_grad.
class WeightGradientQueue : public torch::CustomClassHolder {
 public:
  struct Entry {
    at::Tensor x, y_grad;  // [rows, in], [rows, out]
    at::Tensor main_grad;  // [out, in], or undefined
    bool accumulate = true;
  };

  void push(Entry entry);

  // Computes the oldest entry's gradient into its main_grad, or returns it, [out, in] of x's dtype.
  std::optional<at::Tensor> pop();

  int64_t size() const;
  void clear();

 private:
  std::deque<Entry> entries_;
};

struct WeightGradientOptions {
  // The gradient is added to this buffer [out, in], or written over it, and autograd is given what
  // dummy_grad names: nothing ("none"), or a tensor of the weight's shape, unwritten ("empty") or
  // zero ("zeros"), for those who count on a gradient's arrival.
  std::optional<at::Tensor> main_grad = {};
  bool accumulate = true;
  std::string dummy_grad = "none";
  // Backward puts the product here in place of computing it, and gives the weight no gradient.
  std::optional<c10::intrusive_ptr<WeightGradientQueue>> delayed = {};
};

// [..., out] of x [..., in], weight [out, in] and bias [out], all of one dtype.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias = {},
                  const WeightGradientOptions& options = {});

// buffer + y_grad^T x, or y_grad^T x alone, into buffer [out, in]; y_grad [rows, out] and
// x [rows, in]. A float32 buffer of 16-bit factors is summed in float32, not rounded between.
void linear_weight_grad_into(const at::Tensor& buffer, const at::Tensor& y_grad,
                             const at::Tensor& x, bool accumulate = true);

// --- for nodes that hold a product --------------------------------------------------------------

// What messages call the operands.
struct ProductNames {
  const char* op;
  const char* weight = "weight";
  const char* bias = "bias";
  const char* main_grad = "main_grad";
  const char* dummy_grad = "dummy_grad";
};

// The dtype that the product behind a norm of x has: x's, or that of a 16-bit weight beside a
// float32 x.
at::ScalarType product_dtype(const at::Tensor& x, const at::Tensor& weight);

// weight [out, in] and bias [out] beside x, both of `dtype`; x's last dimension is the caller's to
// compare.
void check_weight(const ProductNames& names, const at::Tensor& x, at::ScalarType dtype,
                  const at::Tensor& weight, const std::optional<at::Tensor>& bias);
void check_weight_gradient(const ProductNames& names, const at::Tensor& weight,
                           const WeightGradientOptions& options);
void check_one_rank(const char* op, const std::optional<std::string>& tp_group,
                    bool sequence_parallel);

// [rows, cols]: the leading dimensions as one.
at::Tensor rows_of(const at::Tensor& tensor);

// These below autograd. x W^T + bias: [..., out] of x [..., in].
at::Tensor product(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias);
// y_grad W: [..., in] of y_grad [..., out].
at::Tensor product_input_grad(const at::Tensor& y_grad, const at::Tensor& weight);
// A weight's gradient, y_grad^T x, in two steps: what autograd is given, then, behind all else of
// the node that may fail for memory (docs/memory.md), the write to where the options say. Nothing
// where y_grad is undefined. The bias's gradient is a sum of its own (docs/gemm.md).
struct WeightGrad {
  at::Tensor y_grad, x;  // [rows, out], [rows, in]
  WeightGradientOptions options;

  at::Tensor given() const;
  void write() const;
  bool is_written() const { return y_grad.defined() && (options.main_grad || options.delayed); }
};
// What autograd is given for a weight of `dtype` whose gradient went into main_grad.
at::Tensor dummy_of(const at::Tensor& main_grad, at::ScalarType dtype, const std::string& kind);

// A node's entries of saved_data for one weight, `name` and what belongs to it: plain values, which
// compiled autograd can hash. main_grad is no saved variable: others write to it before this node's
// backward, as they should.
void save_weight_gradient(torch::autograd::AutogradContext* ctx, const std::string& name,
                          const WeightGradientOptions& options);
WeightGradientOptions saved_weight_gradient(torch::autograd::AutogradContext* ctx,
                                            const std::string& name);

// The stock op's rule under autocast: tensors in its dtype.
at::Tensor cast_for_product(const at::Tensor& tensor, c10::DeviceType device);
// What a norm reads before such a product: x as it is, but where its 16 bits are not autocast's.
at::Tensor narrow_for_product(const at::Tensor& x, c10::DeviceType device);

}  // namespace redline::ops
