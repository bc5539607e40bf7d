// What an autograd node keeps beside its tensors, as one value of AutogradContext::saved_data.
#pragma once

#include <utility>

#include "redline/ops/torch.h"

namespace redline::ops {

template <typename Value>
struct Held : torch::CustomClassHolder {
  explicit Held(Value value) : value(std::move(value)) {}
  const Value value;
};

template <typename Value>
c10::IValue hold(Value value) {
  return c10::IValue::make_capsule(c10::make_intrusive<Held<Value>>(std::move(value)));
}

template <typename Value>
const Value& held(const c10::IValue& from) {
  return static_cast<const Held<Value>&>(*from.toCapsule()).value;
}

}  // namespace redline::ops
