#include "redline/ops/activation_part.h"

#include "redline/kernels/activation.h"
#include "redline/kernels/gated_activation.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace

bool is_gated(const char* op, std::string_view kind) {
  const bool gated = is_gated_activation(kind);
  TORCH_CHECK(gated || is_activation(kind), op, ": activation: expected one of ",
              gated_activation_kinds, ", ", activation_kinds, ", not ", kind);
  return gated;
}

void check_activation_bias(const char* op, const char* name, const OptionalTensor& bias,
                           const Tensor& weight) {
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), op, ": ", name,
              ": expected [", weight.sym_size(0), "], not ", bias->sym_sizes());
  TORCH_CHECK(bias->scalar_type() == weight.scalar_type() ||
                  bias->scalar_type() == accumulation_type(weight),
              op, ": ", name, ": expected ", weight.scalar_type(), " or Float, not ",
              bias->scalar_type());
  check_devices(op, weight, {{name, *bias}});
}

Tensor activate(const Tensor& x, const OptionalTensor& bias, std::string_view kind) {
  using Plain = Tensor(const Tensor&, const OptionalTensor&, std::string_view);
  using Gated = Tensor(const Tensor&, const OptionalTensor&, std::string_view,
                       const OptionalTensor&, const OptionalTensor&, std::optional<double>,
                       std::optional<double>, std::optional<double>, const OptionalTensor&);
  static const auto plain = find_op<Plain>("redline::activation_forward");
  static const auto gated = find_op<Gated>("redline::gated_activation_forward");
  if (!is_gated_activation(kind)) return plain.call(x, bias, kind);
  return gated.call(x, {}, kind, bias, {}, {}, {}, {}, {});
}

ActivationGradients activate_backward(const Tensor& y_grad, const Tensor& x,
                                      const OptionalTensor& bias, std::string_view kind,
                                      ActivationNeeds needs) {
  using Plain = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                           std::string_view, bool);
  using Gated = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, const OptionalTensor&,
      const OptionalTensor&, std::optional<double>, std::optional<double>, std::optional<double>,
      const OptionalTensor&, bool, bool);
  using Rebuild = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                     const OptionalTensor&, std::string_view, bool);
  static const auto plain = find_op<Plain>("redline::activation_backward");
  static const auto gated = find_op<Gated>("redline::gated_activation_backward");
  static const auto plain_rebuild = find_op<Rebuild>("redline::activation_backward_rebuild");
  static const auto gated_rebuild = find_op<Rebuild>("redline::gated_activation_backward_rebuild");
  const bool packed = is_gated_activation(kind);
  if (needs.y) {
    const auto& op = packed ? gated_rebuild : plain_rebuild;
    const auto [x_grad, bias_grad, y] = op.call(y_grad, x, bias, kind, needs.bias);
    return {x_grad, bias_grad, y};
  }
  if (!packed) {
    const auto [x_grad, bias_grad] = plain.call(y_grad, x, bias, kind, needs.bias);
    return {x_grad, bias_grad, {}};
  }
  const auto [x_grad, linear_grad, bias_grad, row_scale_grad] =
      gated.call(y_grad, x, {}, kind, bias, {}, {}, {}, {}, {}, needs.bias, false);
  return {x_grad, bias_grad, {}};
}

}  // namespace redline::ops
