#include "adamw.h"

#include "redline/ops/adamw.h"
#include "redline/ops/gradient_norm.h"

AdamW::AdamW(std::vector<torch::Tensor> parameters, double learning_rate, double weight_decay)
    : parameters_(std::move(parameters)), weight_decay_(weight_decay) {
  const auto device = parameters_.at(0).device();
  learning_rate_ = torch::full({}, learning_rate, torch::dtype(torch::kFloat64).device(device));
  step_ = torch::zeros({}, torch::dtype(torch::kFloat32).device(device));
  for (const torch::Tensor& parameter : parameters_) {
    exp_avgs_.push_back(torch::zeros_like(parameter));
    exp_avg_sqs_.push_back(torch::zeros_like(parameter));
  }
}

void AdamW::step(double max_norm) {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> gradients;
  for (const torch::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
  const torch::Tensor norm = redline::ops::gradient_norm(gradients);
  redline::ops::adamw_step({.parameters = parameters_,
                            .gradients = gradients,
                            .exp_avgs = exp_avgs_,
                            .exp_avg_sqs = exp_avg_sqs_,
                            .masters = {}},
                           {.learning_rate = learning_rate_,
                            .step = step_,
                            .clip_coefficient = redline::ops::clip_coefficient(norm, max_norm)},
                           {.weight_decay = weight_decay_});
}

std::map<std::string, torch::Tensor> AdamW::state_of(const torch::Tensor& parameter) const {
  for (size_t i = 0; i < parameters_.size(); ++i)
    if (parameters_[i].is_same(parameter))
      return {{"step", step_}, {"exp_avg", exp_avgs_[i]}, {"exp_avg_sq", exp_avg_sqs_[i]}};
  return {};
}
