#include "redline/layers/weight_gradient.h"

namespace redline::layers {

WeightGradient::WeightGradient(const WeightGradientOptions& options) : options_(options) {
  if (options_.delay_weight_grad) delayed_ = c10::make_intrusive<ops::WeightGradientQueue>();
}

Tensor WeightGradient::product(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return ops::linear(x, weight, given(bias), destination("Linear", weight));
}

ops::WeightGradientOptions WeightGradient::destination(const char* layer, const Tensor& weight) {
  ops::WeightGradientOptions options;
  if (!weight.requires_grad() || !torch::GradMode::is_enabled()) return options;
  if (options_.accumulate_main_grad) {
    TORCH_CHECK(main_grad.defined(), layer, ": main_grad: expected a buffer of ", weight.sizes(),
                ", not none; accumulate_main_grad is on");
    options.main_grad = main_grad;
    options.accumulate = !overwrite;
    overwrite = false;
  }
  if (delayed_) options.delayed = delayed_;
  return options;
}

int64_t WeightGradient::waiting() const { return delayed_ ? delayed_->size() : 0; }

void WeightGradient::backward_dw(Tensor weight) {
  if (!delayed_) return;
  const std::optional<Tensor> gradient = delayed_->pop();
  if (!gradient) return;
  const torch::NoGradGuard no_grad;
  if (weight.grad().defined()) {
    weight.mutable_grad().add_(*gradient);
  } else {
    weight.mutable_grad() = *gradient;
  }
}

}  // namespace redline::layers
