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

Stream TransformerLayerImpl::forward_residual(const Stream& stream, const Packing& packing) {
  const double drops = drawn();  // as it is now: backward may find the module in another mode
  if (options.recompute != Recompute::full) return run(stream, packing, drops);
  const auto again = [this, packing, drops,
                      dropout = stream.dropout](const variable_list& inputs) -> variable_list {
    const Stream given{.x = inputs[0],
                       .residual = inputs.size() > 1 ? std::optional(inputs[1]) : std::nullopt,
                       .dropout = dropout};
    const Stream out = run(given, packing, drops);
    return {out.x, *out.residual};
  };
  variable_list inputs = {stream.x};
  if (stream.residual) inputs.push_back(*stream.residual);
  const variable_list out = recompute({.run = again,
                                       .parameters = parameters(),
                                       .owner = weak_from_this().lock(),
                                       .random = drops > 0 || stream.dropout > 0},
                                      inputs);
  return {.x = out[0], .residual = out[1], .dropout = drops};
}

Stream TransformerLayerImpl::run(const Stream& stream, const Packing& packing, double drops) {
  Tensor attended, residual = stream.x;
  if (stream.residual) {
    std::tie(attended, residual) =
        self_attention->forward_residual(stream.x, *stream.residual, packing, stream.dropout);
  } else {
    attended = self_attention->forward(stream.x, packing);
  }
  auto [y, sum] = layernorm_mlp->forward_residual(attended, residual, drops);
  return {.x = y, .residual = sum, .dropout = drops};
}

Tensor TransformerLayerImpl::forward(const Tensor& x, const Packing& packing) {
  const Stream stream = forward_residual({.x = x}, packing);
  return ops::bias_dropout_add(stream.x, std::nullopt, *stream.residual, stream.dropout);
}

}  // namespace redline::layers
