#include "redline/layers/transformer_layer.h"

#include "redline/layers/recompute.h"
#include "redline/ops/bias_dropout_add.h"

namespace redline::layers {

TransformerLayerImpl::TransformerLayerImpl(const TransformerLayerOptions& given) : options(given) {
  options.mlp.hidden_size = options.attention.hidden_size;
  options.mlp.norm = options.attention.norm = options.norm;
  options.mlp.bias = options.attention.bias = options.bias;
  options.attention.recompute |= options.recompute == Recompute::selective;
  reset();
}

void TransformerLayerImpl::reset() {
  self_attention = register_module("self_attention", Attention(options.attention));
  layernorm_mlp = register_module("layernorm_mlp", LayerNormMLP(options.mlp));
}

Tensor TransformerLayerImpl::add(const Tensor& x, const Tensor& residual) const {
  return ops::bias_dropout_add(x, std::nullopt, residual, options.dropout, is_training());
}

Stream TransformerLayerImpl::forward_residual(const Stream& stream, const Packing& packing) {
  if (options.recompute != Recompute::full) return run(stream, packing);
  const auto again = [this, packing](const variable_list& inputs) -> variable_list {
    const Stream given{.x = inputs[0],
                       .residual = inputs.size() > 1 ? std::optional(inputs[1]) : std::nullopt};
    const Stream out = run(given, packing);
    return out.residual ? variable_list{out.x, *out.residual} : variable_list{out.x};
  };
  variable_list inputs = {stream.x};
  if (stream.residual) inputs.push_back(*stream.residual);
  const variable_list out = recompute({.run = again,
                                       .parameters = parameters(),
                                       .owner = weak_from_this().lock(),
                                       .random = options.dropout > 0},
                                      inputs);
  return {.x = out[0], .residual = out.size() > 1 ? std::optional(out[1]) : std::nullopt};
}

Stream TransformerLayerImpl::run(const Stream& stream, const Packing& packing) {
  Tensor attended, residual = stream.x;
  if (stream.residual) {
    std::tie(attended, residual) =
        self_attention->forward_residual(stream.x, *stream.residual, packing);
  } else {
    attended = self_attention->forward(stream.x, packing);
  }
  if (options.dropout == 0) {
    auto [y, sum] = layernorm_mlp->forward_residual(attended, residual);
    return {.x = y, .residual = sum};
  }
  const Tensor x = add(attended, residual);
  return {.x = add(layernorm_mlp(x), x)};
}

Tensor TransformerLayerImpl::forward(const Tensor& x, const Packing& packing) {
  const Stream stream = forward_residual({.x = x}, packing);
  return stream.residual ? add(stream.x, *stream.residual) : stream.x;
}

}  // namespace redline::layers
