#include "redline/ops/norm_part.h"

#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;

// A call of to() that changes nothing returns its input, which no op below autograd may.
Tensor in_dtype(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

void check_parameter(const char* op, const char* name, const OptionalTensor& parameter,
                     const Tensor& x) {
  if (!parameter) return;
  TORCH_CHECK(parameter->dim() == 1 && parameter->sym_size(0) == x.sym_size(-1), op, ": ", name,
              ": expected [", x.sym_size(-1), "], not ", parameter->sym_sizes());
  TORCH_CHECK(parameter->scalar_type() == x.scalar_type() ||
                  parameter->scalar_type() == accumulation_type(x),
              op, ": ", name, ": expected ", x.scalar_type(), " as x has, or Float, not ",
              parameter->scalar_type());
}

}  // namespace

void check_norm_part(const char* op, const Tensor& x, const OptionalTensor& residual,
                     const NormParameters& parameters, const NormPartOptions& options) {
  const Norm norm = norm_from(op, options.kind);
  TORCH_CHECK(x.dim() >= 1, op, ": x: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op, ": x: expected a floating dtype, not ",
              x.scalar_type());
  TORCH_CHECK(options.epsilon >= 0, op, ": epsilon: expected 0 or more, not ", options.epsilon);
  TORCH_CHECK(options.dropout >= 0 && options.dropout <= 1, op, ": dropout: expected 0 to 1, not ",
              options.dropout);
  TORCH_CHECK(residual || options.dropout == 0, op,
              ": dropout: expected 0 without a residual, not ", options.dropout);
  check_parameter(op, "norm_weight", parameters.weight, x);
  check_parameter(op, "norm_bias", parameters.bias, x);
  TORCH_CHECK(norm == Norm::layer || !parameters.bias, op,
              ": norm_bias: expected none beside rms_norm");
  check_devices(
      op, x,
      {{"residual", residual}, {"norm_weight", parameters.weight}, {"norm_bias", parameters.bias}});
  if (!residual) return;
  TORCH_CHECK(residual->sym_sizes() == x.sym_sizes(), op, ": residual: expected ", x.sym_sizes(),
              ", not ", residual->sym_sizes());
  TORCH_CHECK(
      residual->scalar_type() == x.scalar_type() || residual->scalar_type() == accumulation_type(x),
      op, ": residual: expected ", x.scalar_type(), " as x has, or Float, not ",
      residual->scalar_type());
}

NormPart::NormPart(const Tensor& x, const OptionalTensor& residual,
                   const NormParameters& parameters, const NormPartOptions& options,
                   at::ScalarType dtype)
    : norm_(options.kind == "rms_norm" ? Norm::rms : Norm::layer),
      epsilon_(options.epsilon),
      dropout_(options.dropout),
      zero_centered_(options.zero_centered),
      has_residual_(residual.has_value()),
      has_weight_(parameters.weight.has_value()),
      has_bias_(parameters.bias.has_value()),
      x_dtype_(x.scalar_type()),
      dtype_(dtype) {
  const auto wants = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  trained_ = wants(x) || wants(residual) || wants(parameters.weight) || wants(parameters.bias);
}

// Six bits, then a byte for each dtype.
NormPart::NormPart(Packed packed, AutogradContext* ctx)
    : norm_(packed.value & 1 ? Norm::layer : Norm::rms),
      dropout_(packed.value & 32 ? ctx->saved_data["dropout"].toDouble() : 0),
      zero_centered_(packed.value & 2),
      has_residual_(packed.value & 4),
      has_weight_(packed.value & 8),
      has_bias_(packed.value & 16),
      x_dtype_(static_cast<at::ScalarType>(packed.value >> 8 & 255)),
      dtype_(static_cast<at::ScalarType>(packed.value >> 16 & 255)) {}

NormPart::Packed NormPart::packed() const {
  return Packed((norm_ == Norm::layer) | zero_centered_ << 1 | has_residual_ << 2 |
                has_weight_ << 3 | has_bias_ << 4 | (dropout_ > 0) << 5 |
                static_cast<int64_t>(x_dtype_) << 8 | static_cast<int64_t>(dtype_) << 16);
}

void NormPart::save(AutogradContext* ctx, Packed packed) const {
  ctx->saved_data["node"] = packed.value;
  if (dropout_ > 0) ctx->saved_data["dropout"] = dropout_;
}

NormPart::Output NormPart::forward(const Tensor& x, const OptionalTensor& residual,
                                   const NormParameters& parameters) const {
  const NormOutputs out = norm_forward(x, {.norm = norm_,
                                           .residual = residual,
                                           .weight = parameters.weight,
                                           .bias = parameters.bias,
                                           .row_count = {},
                                           .epsilon = epsilon_,
                                           .zero_centered = zero_centered_,
                                           .dropout = dropout_});
  return {.normalized = in_dtype(out.y, dtype_),
          .sum = has_residual_ ? out.sum : Tensor(),
          .kept = {.source = has_residual_ ? out.sum : x,
                   .weight = value(parameters.weight),
                   .bias = value(parameters.bias),
                   .mean = out.mean,
                   .inverse_std = out.inverse_std,
                   .rng_state = out.rng_state}};
}

Tensor NormPart::rebuild(const NormKept& kept) const {
  return norm_rebuild(kept.source, optional(kept.weight), optional(kept.bias),
                      {.mean = kept.mean, .inverse_std = kept.inverse_std}, zero_centered_, dtype_);
}

NormPart::Needs NormPart::needs(Edges& edges) const {
  Needs needs = {};
  needs.x = edges.next();
  needs.residual = edges.next(has_residual_);
  needs.weight = edges.next(has_weight_);
  needs.bias = edges.next(has_bias_);
  return needs;
}

NormPart::Gradients NormPart::backward(const NormKept& kept, const Tensor& normalized_grad,
                                       const Tensor& sum_grad, const Needs& needs,
                                       bool rebuilds) const {
  const NormBackwardInputs given = {.norm = norm_,
                                    .mean = kept.mean,
                                    .inverse_std = kept.inverse_std,
                                    .weight = optional(kept.weight),
                                    .bias = optional(kept.bias),
                                    .sum_grad = optional(sum_grad),
                                    .row_count = {},
                                    .zero_centered = zero_centered_,
                                    .needs_weight = needs.weight,
                                    .needs_bias = needs.bias,
                                    .needs_y = rebuilds,
                                    .rng_state = kept.rng_state,
                                    .dropout = dropout_,
                                    .input_dtype = x_dtype_};
  NormGradients out;
  if (needs.any() && normalized_grad.defined()) {
    out = norm_backward(normalized_grad, kept.source, given);
  } else {
    if (needs.any() && sum_grad.defined()) out = sum_backward(sum_grad, given);
    if (rebuilds) out.y = rebuild(kept);
  }
  if (needs.x && !out.input.defined() && out.x.defined()) out.input = in_dtype(out.x, x_dtype_);
  return {.x = needs.x ? out.input : Tensor(),
          .residual = needs.residual ? out.x : Tensor(),
          .weight = needs.weight ? out.weight : Tensor(),
          .bias = needs.bias ? out.bias : Tensor(),
          .normalized = out.y};
}

}  // namespace redline::ops
