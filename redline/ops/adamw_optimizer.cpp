#include "redline/ops/adamw_optimizer.h"

#include <utility>

#include "redline/ops/gradient_norm.h"
#include "redline/ops/run.h"

namespace redline {
namespace {

using at::Tensor;

bool wants_master(const AdamWGroup& group, const Tensor& parameter) {
  return group.master && parameter.element_size() == 2;
}

AdamWGroup with_parameters(AdamWGroup group, std::vector<Tensor> parameters) {
  group.parameters = std::move(parameters);
  return group;
}

}  // namespace

AdamW::AdamW(std::vector<Tensor> parameters, AdamWGroup group)
    : AdamW(std::vector{with_parameters(std::move(group), std::move(parameters))}) {}

AdamW::AdamW(std::vector<AdamWGroup> groups) : groups_(std::move(groups)) {
  const at::NoGradGuard no_grad;
  for (const AdamWGroup& group : groups_) {
    TORCH_CHECK(!group.parameters.empty(), "AdamW: parameters: expected one or more, not none");
    std::vector<State>& states = states_.emplace_back();
    for (const Tensor& parameter : group.parameters) {
      const bool wide = parameter.scalar_type() == at::kDouble;
      const auto dtype = wide ? at::kDouble : group.state_dtype;
      states.push_back({.step = at::zeros({}, parameter.options().dtype(at::kFloat)),
                        .exp_avg = at::zeros_like(parameter, dtype),
                        .exp_avg_sq = at::zeros_like(parameter, dtype),
                        .master = {}});
      if (wants_master(group, parameter)) {
        states.back().master = parameter.detach().to(at::kFloat);
      }
    }
    const auto options = group.parameters[0].options().dtype(at::kDouble);
    learning_rates_.push_back(at::full({}, group.learning_rate, options));
    written_.push_back(group.learning_rate);
  }
}

void AdamW::step(const AdamWScaling& scaling) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (std::exchange(written_[i], groups_[i].learning_rate) != groups_[i].learning_rate) {
      learning_rates_[i].fill_(groups_[i].learning_rate);
    }
    step_group(i, false, scaling);
    step_group(i, true, scaling);
  }
  clip_coefficient_ = at::Tensor();
}

void AdamW::step_group(size_t group, bool with_master, const AdamWScaling& scaling) {
  const AdamWGroup& options = groups_[group];
  std::vector<Tensor> parameters, gradients, exp_avgs, exp_avg_sqs, masters, steps;
  for (size_t i = 0; i < options.parameters.size(); ++i) {
    const Tensor& parameter = options.parameters[i];
    const State& state = states_[group][i];
    if (!parameter.grad().defined() || state.master.defined() != with_master) continue;
    parameters.push_back(parameter);
    gradients.push_back(parameter.grad());
    exp_avgs.push_back(state.exp_avg);
    exp_avg_sqs.push_back(state.exp_avg_sq);
    steps.push_back(state.step);
    if (with_master) masters.push_back(state.master);
  }
  if (parameters.empty()) return;
  ops::adamw_step({.parameters = parameters,
                   .gradients = gradients,
                   .exp_avgs = exp_avgs,
                   .exp_avg_sqs = exp_avg_sqs,
                   .masters = masters,
                   .steps = steps},
                  {.learning_rate = learning_rates_[group],
                   .clip_coefficient = ops::optional(clip_coefficient_),
                   .grad_scale = scaling.grad_scale,
                   .found_inf = scaling.found_inf},
                  {.beta1 = options.beta1,
                   .beta2 = options.beta2,
                   .epsilon = options.epsilon,
                   .weight_decay = options.weight_decay});
}

Tensor AdamW::clip_grad_norm(double max_norm) {
  const at::NoGradGuard no_grad;
  std::vector<Tensor> gradients;
  for (const AdamWGroup& group : groups_) {
    for (const Tensor& parameter : group.parameters) {
      if (parameter.grad().defined()) gradients.push_back(parameter.grad());
    }
  }
  if (gradients.empty()) return at::zeros({});
  const Tensor norm = ops::gradient_norm(gradients);
  clip_coefficient_ = ops::clip_coefficient(norm, max_norm);
  return norm;
}

void AdamW::zero_grad() {
  for (AdamWGroup& group : groups_) {
    for (Tensor& parameter : group.parameters) parameter.mutable_grad() = at::Tensor();
  }
}

std::map<std::string, Tensor> AdamW::state_of(const Tensor& parameter) const {
  for (size_t group = 0; group < groups_.size(); ++group) {
    for (size_t i = 0; i < states_[group].size(); ++i) {
      if (!groups_[group].parameters[i].is_same(parameter)) continue;
      const State& state = states_[group][i];
      std::map<std::string, Tensor> named = {
          {"step", state.step}, {"exp_avg", state.exp_avg}, {"exp_avg_sq", state.exp_avg_sq}};
      if (state.master.defined()) named["master"] = state.master;
      return named;
    }
  }
  TORCH_CHECK(false, "AdamW: parameter: expected one of the optimizer's");
}

void AdamW::load_state_of(const Tensor& parameter, const std::map<std::string, Tensor>& state) {
  const at::NoGradGuard no_grad;
  std::map<std::string, Tensor> own = state_of(parameter);
  for (const auto& [name, tensor] : own) {
    const auto found = state.find(name);
    TORCH_CHECK(found != state.end(), "AdamW: state: expected ", name, " beside the others");
    TORCH_CHECK(found->second.sizes() == tensor.sizes(), "AdamW: state: ", name, ": expected ",
                tensor.sizes(), ", not ", found->second.sizes());
  }
  for (auto& [name, tensor] : own) tensor.copy_(state.at(name));
}

}  // namespace redline
