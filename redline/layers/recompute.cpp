#include "redline/layers/recompute.h"

#include <ATen/autocast_mode.h>

#include <mutex>

#include "redline/ops/strict.h"

namespace redline::layers {
namespace {

using torch::autograd::AutogradContext;

// The state of a device's random numbers.
Tensor random_state(const torch::Device& device) {
  at::Generator generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void set_random_state(const torch::Device& device, const Tensor& state) {
  at::Generator generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

struct Autocast {
  bool enabled = false;
  at::ScalarType dtype = at::kFloat;

  static Autocast now(at::DeviceType device) {
    if (!at::autocast::is_autocast_available(device)) return {};
    return {at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)};
  }
  void set(at::DeviceType device) const {
    if (!at::autocast::is_autocast_available(device)) return;
    at::autocast::set_autocast_enabled(device, enabled);
    at::autocast::set_autocast_dtype(device, dtype);
  }
};

// What the second run finds as the first did, and puts back.
class Surroundings {
 public:
  Surroundings(const torch::Device& device, bool random)
      : device_(device), autocast_(Autocast::now(device.type())) {
    if (random) random_state_ = random_state(device);
  }
  // These in place of those around, which come back.
  class Within;

 private:
  void set() const {
    autocast_.set(device_.type());
    if (random_state_.defined()) set_random_state(device_, random_state_);
  }

  torch::Device device_;
  Autocast autocast_;
  Tensor random_state_;
};

// Nested, so that the casts of weights are forgotten with the region: the next step's weights are
// others.
class Surroundings::Within {
 public:
  explicit Within(const Surroundings& wanted)
      : outside_(wanted.device_, wanted.random_state_.defined()) {
    at::autocast::increment_nesting();
    wanted.set();
  }
  ~Within() {
    outside_.set();
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  }
  Within(const Within&) = delete;
  Within& operator=(const Within&) = delete;

 private:
  Surroundings outside_;
};

struct Kept : torch::CustomClassHolder {
  Kept(const Region& region, Surroundings surroundings, size_t inputs)
      : region(region), surroundings(surroundings), inputs(inputs) {}

  Region region;
  Surroundings surroundings;
  size_t inputs;
};

struct RecomputeFunction {
  // variables: the inputs, then the parameters.
  static variable_list forward(AutogradContext* ctx, const c10::intrusive_ptr<Kept>& kept,
                               at::TensorList variables) {
    ctx->save_for_backward(variables.vec());
    ctx->saved_data["kept"] = c10::IValue::make_capsule(kept);
    return kept->region.run(variables.slice(0, kept->inputs).vec());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!torch::GradMode::is_enabled(),
                "recompute: expected a backward without create_graph: a region that runs again has "
                "no second derivative");
    const auto capsule = ctx->saved_data["kept"].toCapsule();
    const Kept& kept = *static_cast<Kept*>(capsule.get());
    variable_list variables = ctx->get_saved_variables();
    const torch::AutoGradMode with_graph(true);
    variable_list inputs, leaves;
    for (size_t i = 0; i < variables.size(); ++i) {
      Tensor& variable = variables[i];
      const bool needed = variable.requires_grad();
      if (i < kept.inputs) {  // the region's graph ends here
        variable = variable.detach().requires_grad_(needed);
        inputs.push_back(variable);
      }
      if (needed) leaves.push_back(variable);
    }
    variable_list outputs;
    {
      const Surroundings::Within within(kept.surroundings);
      outputs = kept.region.run(inputs);
    }
    const variable_list found = torch::autograd::grad(outputs, leaves, grads, std::nullopt,
                                                      /*create_graph=*/false,
                                                      /*allow_unused=*/true);
    variable_list result = {Tensor()};  // the region's own
    auto next = found.begin();
    for (const Tensor& variable : variables) {
      result.push_back(variable.requires_grad() ? *next++ : Tensor());
    }
    return result;
  }
};

}  // namespace

variable_list recompute(const Region& region, const variable_list& inputs) {
  if (!torch::GradMode::is_enabled()) return region.run(inputs);
  variable_list variables = inputs;
  variables.insert(variables.end(), region.parameters.begin(), region.parameters.end());
  const Surroundings surroundings(inputs.front().device(), region.random);
  const auto kept = c10::make_intrusive<Kept>(region, surroundings, inputs.size());
  return ops::StrictNode<RecomputeFunction>::apply(kept, at::TensorList(variables));
}

}  // namespace redline::layers
