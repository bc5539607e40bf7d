// A torch::nn holder that takes its options as a braced list: `RMSNorm norm({.dim = 4096});`.
// The one place that includes torch/torch.h, which is precompiled.
#pragma once

#include <torch/torch.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

namespace redline::layers {

using torch::Tensor;

// What the ops take for a parameter that may be absent.
inline std::optional<Tensor> given(const Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

template <typename Implementation, typename Options>
class Holder : public torch::nn::ModuleHolder<Implementation> {
 public:
  using Impl = Implementation;
  using torch::nn::ModuleHolder<Implementation>::ModuleHolder;
  explicit Holder(const Options& options)
      : torch::nn::ModuleHolder<Implementation>(std::make_shared<Implementation>(options)) {}
};

}  // namespace redline::layers
