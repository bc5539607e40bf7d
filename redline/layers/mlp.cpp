#include "redline/layers/mlp.h"

#include <algorithm>

#include "redline/layers/linear.h"
#include "redline/ops/activation.h"
#include "redline/ops/gated_activation.h"

namespace redline::layers {
namespace {

constexpr std::array gated_kinds = {"swiglu", "geglu", "reglu", "quick_geglu", "clamped_swiglu"};
constexpr std::array plain_kinds = {"gelu", "gelu_erf", "quick_gelu",
                                    "silu", "relu",     "squared_relu"};

template <size_t count>
bool holds(const std::array<const char*, count>& kinds, const std::string& kind) {
  return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
}

bool gated(const std::string& activation) { return holds(gated_kinds, activation); }

}  // namespace

LayerNormMLPImpl::LayerNormMLPImpl(const LayerNormMLPOptions& options) : options(options) {
  const std::string& kind = options.activation;
  TORCH_CHECK(gated(kind) || holds(plain_kinds, kind), "LayerNormMLP: activation: expected ",
              c10::Join(" ", gated_kinds), " ", c10::Join(" ", plain_kinds), ", not ", kind);
  reset();
}

void LayerNormMLPImpl::reset() {
  const int64_t hidden = options.hidden_size, ffn = options.ffn_hidden_size;
  const int64_t fc1_rows = gated(options.activation) ? 2 * ffn : ffn;
  gain = register_gain(*this, hidden, options.norm);
  fc1_weight = register_parameter("fc1_weight", torch::empty({fc1_rows, hidden}));
  if (options.bias) fc1_bias = register_parameter("fc1_bias", torch::empty({fc1_rows}));
  fc2_weight = register_parameter("fc2_weight", torch::empty({hidden, ffn}));
  if (options.bias) fc2_bias = register_parameter("fc2_bias", torch::empty({hidden}));
  reset_linear(fc1_weight, fc1_bias);
  reset_linear(fc2_weight, fc2_bias);
}

Tensor LayerNormMLPImpl::project(const Tensor& normed) const {
  const Tensor up = torch::linear(normed, fc1_weight);
  const Tensor activated =
      gated(options.activation)
          ? ops::gated_activation(up, {.kind = options.activation, .bias = given(fc1_bias)})
          : ops::activation(up, given(fc1_bias), options.activation);
  return torch::linear(activated, fc2_weight, fc2_bias);
}

Tensor LayerNormMLPImpl::forward(const Tensor& x) {
  return project(normalize(x, gain, options.norm));
}

std::tuple<Tensor, Tensor> LayerNormMLPImpl::forward_residual(const Tensor& x,
                                                              const Tensor& residual) {
  auto [normed, sum] = normalize_residual(x, residual, gain, options.norm);
  return {project(normed), sum};
}

}  // namespace redline::layers
