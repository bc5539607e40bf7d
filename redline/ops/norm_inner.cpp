#include "redline/ops/norm_inner.h"

#include "redline/ops/norm_run.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- inner ops ----------------------------------------------------------------------------------

// In place of a state of random numbers, where nothing is dropped.
Tensor no_state(const Tensor& like) { return at::empty({0}, like.options().dtype(at::kLong)); }

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const OptionalTensor& residual,
                                                    const OptionalTensor& weight, double epsilon,
                                                    bool zero_centered,
                                                    const OptionalTensor& row_count) {
  const NormOutputs out =
      run_norm_forward(x, {Norm::rms, residual, weight, {}, row_count, epsilon, zero_centered});
  return {out.y, out.sum, out.inverse_std};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x,
                                                              const OptionalTensor& residual,
                                                              const OptionalTensor& weight,
                                                              const OptionalTensor& bias,
                                                              double epsilon, bool zero_centered,
                                                              const OptionalTensor& row_count) {
  const NormOutputs out =
      run_norm_forward(x, {Norm::layer, residual, weight, bias, row_count, epsilon, zero_centered});
  return {out.y, out.sum, out.mean, out.inverse_std};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& y_grad, const Tensor& x,
                                             const OptionalTensor& weight,
                                             const Tensor& inverse_rms,
                                             const OptionalTensor& sum_grad, bool zero_centered,
                                             const OptionalTensor& row_count, bool needs_weight) {
  const NormGradients out = run_norm_backward(y_grad, x,
                                              {Norm::rms,
                                               {},
                                               inverse_rms,
                                               weight,
                                               {},
                                               sum_grad,
                                               row_count,
                                               zero_centered,
                                               needs_weight,
                                               false});
  return {out.x, out.weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& y_grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& inverse_std, const OptionalTensor& sum_grad,
    bool zero_centered, const OptionalTensor& row_count, bool needs_weight, bool needs_bias) {
  const NormGradients out =
      run_norm_backward(y_grad, x,
                        {Norm::layer, mean, inverse_std, weight, bias, sum_grad, row_count,
                         zero_centered, needs_weight, needs_bias});
  return {out.x, out.weight, out.bias};
}

// Of either norm, by the mean. The first three as the norms' own backward gives them.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward_rebuild(
    const Tensor& y_grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& mean, const Tensor& inverse_std, const OptionalTensor& sum_grad,
    bool zero_centered, bool needs_weight, bool needs_bias) {
  const NormGradients out = run_norm_backward(y_grad, x,
                                              {mean ? Norm::layer : Norm::rms,
                                               value(mean),
                                               inverse_std,
                                               weight,
                                               bias,
                                               sum_grad,
                                               {},
                                               zero_centered,
                                               needs_weight,
                                               needs_bias,
                                               true});
  return {out.x, out.weight, out.bias, out.y};
}

Tensor rebuild(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
               const OptionalTensor& mean, const Tensor& inverse_std, bool zero_centered,
               at::ScalarType dtype) {
  return run_norm_rebuild(x,
                          {.norm = mean ? Norm::layer : Norm::rms,
                           .mean = value(mean),
                           .inverse_std = inverse_std,
                           .weight = weight,
                           .bias = bias,
                           .sum_grad = {},
                           .row_count = {},
                           .zero_centered = zero_centered,
                           .needs_weight = false,
                           .needs_bias = false},
                          dtype);
}

// Of either norm, by its name. mean: layer's.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_with_amax(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, std::string_view norm, double epsilon, bool zero_centered,
    const OptionalTensor& row_count) {
  const NormOutputs out = run_norm_forward(x, {.norm = norm_from("norm_with_amax", norm),
                                               .residual = residual,
                                               .weight = weight,
                                               .bias = bias,
                                               .row_count = row_count,
                                               .epsilon = epsilon,
                                               .zero_centered = zero_centered,
                                               .wants_amax = true});
  return {out.y, out.sum, out.mean, out.inverse_std, out.amax};
}

// Of either norm, by its name; the probability is 0 where nothing is drawn. mean: layer's.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dropout_forward(
    const Tensor& x, const OptionalTensor& input_bias, const Tensor& residual,
    const OptionalTensor& weight, const OptionalTensor& bias, std::string_view norm, double epsilon,
    bool zero_centered, double probability) {
  const NormOutputs out =
      run_norm_forward(x, {.norm = norm_from("bias_dropout_residual_norm", norm),
                           .residual = residual,
                           .weight = weight,
                           .bias = bias,
                           .row_count = {},
                           .epsilon = epsilon,
                           .zero_centered = zero_centered,
                           .input_bias = input_bias,
                           .dropout = probability});
  return {out.y, out.sum, out.mean, out.inverse_std,
          out.rng_state.defined() ? out.rng_state : no_state(x)};
}

// x_grad: with dropout alone, otherwise it is residual_grad.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dropout_backward(
    const Tensor& y_grad, const Tensor& sum, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& inverse_std,
    const OptionalTensor& sum_grad, bool zero_centered, const Tensor& rng_state,
    const OptionalTensor& input_bias, double probability, at::ScalarType x_dtype, bool needs_weight,
    bool needs_bias, bool needs_input_bias, bool needs_y) {
  const NormGradients out = run_norm_backward(y_grad, sum,
                                              {.norm = mean ? Norm::layer : Norm::rms,
                                               .mean = value(mean),
                                               .inverse_std = inverse_std,
                                               .weight = weight,
                                               .bias = bias,
                                               .sum_grad = sum_grad,
                                               .row_count = {},
                                               .zero_centered = zero_centered,
                                               .needs_weight = needs_weight,
                                               .needs_bias = needs_bias,
                                               .needs_y = needs_y,
                                               .rng_state = rng_state,
                                               .input_bias = input_bias,
                                               .dropout = probability,
                                               .input_dtype = x_dtype,
                                               .needs_input_bias = needs_input_bias});
  return {out.x, out.input, out.weight, out.bias, out.input_bias, out.y};
}

void implement(torch::Library& m) {
  m.impl("rms_norm_forward", rms_norm_forward);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("layer_norm_forward", layer_norm_forward);
  m.impl("layer_norm_backward", layer_norm_backward);
  m.impl("norm_forward_with_amax", forward_with_amax);
  m.impl("norm_rebuild", rebuild);
  m.impl("norm_backward_rebuild", norm_backward_rebuild);
  m.impl("bias_dropout_residual_norm_forward", dropout_forward);
  m.impl("bias_dropout_residual_norm_backward", dropout_backward);
}

}  // namespace

Norm norm_from(const char* op, std::string_view kind) {
  TORCH_CHECK(kind == name(Norm::rms) || kind == name(Norm::layer), op,
              ": norm: expected rms_norm or layer_norm, not ", kind);
  return kind == name(Norm::rms) ? Norm::rms : Norm::layer;
}

NormOutputs norm_forward(const Tensor& x, const NormInputs& in) {
  if (in.input_bias || in.dropout > 0) {
    TORCH_CHECK(in.residual, name(in.norm), ": residual: expected one beside dropout");
    static const auto op =
        find_op<decltype(dropout_forward)>("redline::bias_dropout_residual_norm_forward");
    const auto [y, sum, mean, inverse_std, rng_state] =
        op.call(x, in.input_bias, *in.residual, in.weight, in.bias, name(in.norm), in.epsilon,
                in.zero_centered, in.dropout);
    return {y, sum, mean, inverse_std, rng_state};
  }
  if (in.wants_amax) {
    static const auto op = find_op<decltype(forward_with_amax)>("redline::norm_forward_with_amax");
    const auto [y, sum, mean, inverse_std, amax] =
        op.call(x, in.residual, in.weight, in.bias, name(in.norm), in.epsilon, in.zero_centered,
                in.row_count);
    return {y, sum, mean, inverse_std, {}, amax};
  }
  if (in.norm == Norm::rms) {
    static const auto op = find_op<decltype(rms_norm_forward)>("redline::rms_norm_forward");
    const auto [y, sum, inverse_rms] =
        op.call(x, in.residual, in.weight, in.epsilon, in.zero_centered, in.row_count);
    return {y, sum, {}, inverse_rms};
  }
  static const auto op = find_op<decltype(layer_norm_forward)>("redline::layer_norm_forward");
  const auto [y, sum, mean, inverse_std] =
      op.call(x, in.residual, in.weight, in.bias, in.epsilon, in.zero_centered, in.row_count);
  return {y, sum, mean, inverse_std};
}

NormGradients norm_backward(const Tensor& y_grad, const Tensor& x, const NormBackwardInputs& in) {
  if (in.needs_input_bias || in.dropout > 0) {
    static const auto op =
        find_op<decltype(dropout_backward)>("redline::bias_dropout_residual_norm_backward");
    const auto [x_grad, input_grad, weight_grad, bias_grad, input_bias_grad, y] =
        op.call(y_grad, x, in.weight, in.bias, optional(in.mean), in.inverse_std, in.sum_grad,
                in.zero_centered, in.rng_state, in.input_bias, in.dropout, in.input_dtype,
                in.needs_weight, in.needs_bias, in.needs_input_bias, in.needs_y);
    return {.x = x_grad,
            .weight = weight_grad,
            .bias = bias_grad,
            .y = y,
            .input = input_grad,
            .input_bias = input_bias_grad};
  }
  if (in.needs_y) {
    static const auto op =
        find_op<decltype(norm_backward_rebuild)>("redline::norm_backward_rebuild");
    const auto [x_grad, weight_grad, bias_grad, y] =
        op.call(y_grad, x, in.weight, in.bias, optional(in.mean), in.inverse_std, in.sum_grad,
                in.zero_centered, in.needs_weight, in.needs_bias);
    return {x_grad, weight_grad, bias_grad, y};
  }
  if (in.norm == Norm::rms) {
    static const auto op = find_op<decltype(rms_norm_backward)>("redline::rms_norm_backward");
    const auto [x_grad, weight_grad] = op.call(y_grad, x, in.weight, in.inverse_std, in.sum_grad,
                                               in.zero_centered, in.row_count, in.needs_weight);
    return {x_grad, weight_grad, {}};
  }
  static const auto op = find_op<decltype(layer_norm_backward)>("redline::layer_norm_backward");
  const auto [x_grad, weight_grad, bias_grad] =
      op.call(y_grad, x, in.weight, in.bias, in.mean, in.inverse_std, in.sum_grad, in.zero_centered,
              in.row_count, in.needs_weight, in.needs_bias);
  return {x_grad, weight_grad, bias_grad};
}

NormGradients sum_backward(const Tensor& sum_grad, const NormBackwardInputs& in) {
  if (!in.needs_input_bias && in.dropout == 0) return {.x = sum_grad};
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                               at::ScalarType, double, bool);
  static const auto op = find_op<Signature>("redline::bias_dropout_add_backward");
  const auto [input_grad, input_bias_grad] = op.call(
      sum_grad, in.rng_state, in.input_bias, in.input_dtype, in.dropout, in.needs_input_bias);
  return {.x = sum_grad, .input = input_grad, .input_bias = input_bias_grad};
}

Tensor norm_rebuild(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                    const NormOutputs& statistics, bool zero_centered, at::ScalarType dtype) {
  static const auto op = find_op<decltype(rebuild)>("redline::norm_rebuild");
  return op.call(x, weight, bias, optional(statistics.mean), statistics.inverse_std, zero_centered,
                 dtype);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "norm_rebuild(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor inverse_std, "
      "bool zero_centered, ScalarType dtype) -> Tensor");
  m.def(
      "norm_backward_rebuild(Tensor y_grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, "
      "Tensor inverse_std, Tensor? sum_grad, bool zero_centered, bool needs_weight, "
      "bool needs_bias) -> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad, Tensor y)");
  m.def(
      "rms_norm_forward(Tensor x, Tensor? residual, Tensor? weight, float epsilon, "
      "bool zero_centered, Tensor? row_count) -> (Tensor y, Tensor sum, Tensor inverse_rms)");
  m.def(
      "rms_norm_backward(Tensor y_grad, Tensor x, Tensor? weight, Tensor inverse_rms, "
      "Tensor? sum_grad, bool zero_centered, Tensor? row_count, bool needs_weight) "
      "-> (Tensor x_grad, Tensor weight_grad)");
  m.def(
      "layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "float epsilon, bool zero_centered, Tensor? row_count) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor inverse_std)");
  m.def(
      "layer_norm_backward(Tensor y_grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor inverse_std, Tensor? sum_grad, bool zero_centered, Tensor? row_count, "
      "bool needs_weight, bool needs_bias) "
      "-> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad)");
  m.def(
      "norm_forward_with_amax(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str norm, "
      "float epsilon, bool zero_centered, Tensor? row_count) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor inverse_std, Tensor amax)");
  m.def(
      "bias_dropout_residual_norm_forward(Tensor x, Tensor? input_bias, Tensor residual, "
      "Tensor? weight, Tensor? bias, str norm, float epsilon, bool zero_centered, "
      "float probability) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor inverse_std, Tensor rng_state)",
      {at::Tag::nondeterministic_seeded});
  m.def(
      "bias_dropout_residual_norm_backward(Tensor y_grad, Tensor sum, Tensor? weight, "
      "Tensor? bias, Tensor? mean, Tensor inverse_std, Tensor? sum_grad, bool zero_centered, "
      "Tensor rng_state, Tensor? input_bias, float probability, ScalarType x_dtype, "
      "bool needs_weight, bool needs_bias, bool needs_input_bias, bool needs_y) "
      "-> (Tensor residual_grad, Tensor x_grad, Tensor weight_grad, Tensor bias_grad, "
      "Tensor input_bias_grad, Tensor y)");
}

const Registration registration({
    .inner_ops = {"rms_norm_forward", "rms_norm_backward", "layer_norm_forward",
                  "layer_norm_backward", "norm_forward_with_amax", "norm_rebuild",
                  "norm_backward_rebuild", "bias_dropout_residual_norm_forward",
                  "bias_dropout_residual_norm_backward"},
    .inner = implement,
});

}  // namespace redline::ops
