// Strict mode: a slower path than the op has is an error that says what to change.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// On, or off within an outer one, while it lives: on its thread, in the backward passes that the
// thread starts, and in the backward of every node that a forward made meanwhile.
class StrictGuard {
 public:
  explicit StrictGuard(bool strict = true);
  ~StrictGuard();
  StrictGuard(const StrictGuard&) = delete;
  StrictGuard& operator=(const StrictGuard&) = delete;
};

bool is_strict();

// As the node keeps it from forward, for as long as its backward runs, on whichever thread.
class KeptStrict {
 public:
  static void keep(torch::autograd::AutogradContext* ctx);
  explicit KeptStrict(torch::autograd::AutogradContext* ctx);

 private:
  std::optional<StrictGuard> guard_;
};

// The second half of StrictNode.
template <typename Node>
struct StrictBackward : public torch::autograd::Function<StrictBackward<Node>> {
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const KeptStrict kept(ctx);
    return Node::backward(ctx, grads);
  }
};

// The node of a Node with static forward() and backward() of torch's form.
template <typename Node>
struct StrictNode : public torch::autograd::Function<StrictNode<Node>> {
  template <typename... Inputs>
  static auto forward(torch::autograd::AutogradContext* ctx, Inputs&&... inputs) {
    KeptStrict::keep(ctx);
    return Node::forward(ctx, std::forward<Inputs>(inputs)...);
  }
};

}  // namespace redline::ops

// torch's node asks for its name in every backward, which demangles it: 0.6 us.
template <typename Node>
struct torch::autograd::CppNode<redline::ops::StrictNode<Node>>
    : public torch::autograd::CppNode<redline::ops::StrictBackward<Node>> {
  std::string name() const override {
    static const std::string text = c10::demangle(typeid(CppNode).name());
    return text;
  }
};
