// AdamW with clipping over redline::ops: the state and the arithmetic of redline.optim.AdamW.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "redline/layers/module.h"

class AdamW {
 public:
  AdamW(std::vector<torch::Tensor> parameters, double learning_rate, double weight_decay = 0.1);

  // One step, the gradients clipped to max_norm: nothing is read back, and no gradient rewritten.
  void step(double max_norm);

  // step, exp_avg and exp_avg_sq of a parameter: the tensors themselves, for a checkpoint.
  std::map<std::string, torch::Tensor> state_of(const torch::Tensor& parameter) const;

 private:
  std::vector<torch::Tensor> parameters_, exp_avgs_, exp_avg_sqs_;
  torch::Tensor learning_rate_, step_;  // scalars on the parameters' device
  double weight_decay_;
};
