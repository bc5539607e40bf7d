// Where the gradient of a product's weight goes: to autograd, into main_grad, or later.
#pragma once

#include "redline/layers/module.h"
#include "redline/ops/linear.h"

namespace redline::layers {

struct WeightGradientOptions {
  bool accumulate_main_grad = false;  // into main_grad, and not into weight.grad()
  bool delay_weight_grad = false;     // backward leaves the product to backward_dw()
};

class WeightGradient {
 public:
  WeightGradient() = default;
  explicit WeightGradient(const WeightGradientOptions& options);

  // x W^T + bias; bias may be undefined.
  Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias);

  // An op's options that send the gradient of `weight` where this one's say, for one call. Asks for
  // main_grad where it is accumulated; `layer` is what the message begins with.
  ops::WeightGradientOptions destination(const char* layer, const Tensor& weight);

  // The oldest weight gradient that backward left, into main_grad or weight.grad(); nothing where
  // they are not delayed.
  void backward_dw(Tensor weight);
  int64_t waiting() const;  // how many of them

  Tensor main_grad;        // [out, in], float32 or the weight's dtype: the caller's buffer
  bool overwrite = false;  // the backward of the next product writes over main_grad

 private:
  WeightGradientOptions options_;
  c10::intrusive_ptr<ops::WeightGradientQueue> delayed_;
};

}  // namespace redline::layers
