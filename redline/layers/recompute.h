// A region whose backward computes again what forward did not keep.
#pragma once

#include <functional>

#include "redline/layers/module.h"

namespace redline::layers {

using torch::autograd::variable_list;

// `run` of some tensors. It may run long after its layer's last use: `owner` lives as long.
struct Region {
  std::function<variable_list(const variable_list&)> run;
  std::vector<Tensor> parameters = {};  // what it reads beside its inputs, and has gradients
  std::shared_ptr<void> owner = {};
  bool random = false;  // draws numbers: the second run draws the first's
};

// region.run(inputs), of which the inputs alone are kept. Nothing is special where no gradient is
// asked for. The second run is under forward's autocast.
variable_list recompute(const Region& region, const variable_list& inputs);

}  // namespace redline::layers
