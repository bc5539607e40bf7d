// AdamW with its state, for C++: redline.optim.AdamW's arithmetic and bits.
//   redline::AdamW optimizer(model->parameters(), {.learning_rate = 3e-4, .weight_decay = 0.1});
//   ...
//   loss.backward();
//   optimizer.clip_grad_norm(1.0);
//   optimizer.step();
//
// Not a torch::optim::Optimizer: that one drags torch/torch.h into whoever includes this (28 s to
// compile), takes its numbers from the host and saves to archives of torch's own. The state here is
// plain tensors by name, which safetensors saves and Python's optimiser loads.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "redline/ops/adamw.h"

namespace redline {

// Parameters on one device that share options. learning_rate may change between steps.
struct AdamWGroup {
  std::vector<at::Tensor> parameters = {};
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.01;
  bool master = false;                                 // float32 masters of 16-bit parameters
  at::ScalarType state_dtype = at::ScalarType::Float;  // or BFloat16; float64 stays float64
};

// What mixed precision adds to a step: one float32 each, on the parameters' device.
struct AdamWScaling {
  std::optional<at::Tensor> grad_scale = {};  // gradients are divided by it
  std::optional<at::Tensor> found_inf = {};   // where it is not zero, the step changes nothing
};

class AdamW {
 public:
  explicit AdamW(std::vector<AdamWGroup> groups);
  // One group of these parameters with the options of `group`.
  AdamW(std::vector<at::Tensor> parameters, AdamWGroup group);

  // One step of every parameter that has a gradient. Nothing is read back from the device.
  void step(const AdamWScaling& scaling = {});

  // The norm of all gradients, a device scalar; the next step limits it to max_norm on the way, and
  // the gradients keep their values.
  at::Tensor clip_grad_norm(double max_norm);

  // Drops the gradients.
  void zero_grad();

  // step, exp_avg, exp_avg_sq [, master] of a parameter: the tensors themselves, for checkpoints.
  std::map<std::string, at::Tensor> state_of(const at::Tensor& parameter) const;

  // Copies what state_of() gave, here or in Python, into the parameter's state.
  void load_state_of(const at::Tensor& parameter, const std::map<std::string, at::Tensor>& state);

  std::vector<AdamWGroup>& groups() { return groups_; }

 private:
  struct State {
    at::Tensor step, exp_avg, exp_avg_sq, master;
  };

  void step_group(size_t group, bool with_master, const AdamWScaling& scaling);

  std::vector<AdamWGroup> groups_;
  std::vector<std::vector<State>> states_;  // [group][parameter]
  std::vector<at::Tensor> learning_rates_;  // [group], written when the group's changes
  std::vector<double> written_;
  at::Tensor clip_coefficient_;  // of the next step
};

}  // namespace redline
