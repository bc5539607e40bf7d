// Writes parameters, outputs and gradients of the C++ layers to a safetensors file, from one seed:
// tests/test_layers.py makes the same with the Python layers and compares bits.
#include <cmath>
#include <cstdio>

#include "examples/cpp/safetensors.h"
#include "redline/extensions/transformer_engine.h"
#include "redline/layers/gpt.h"

namespace {

using redline::layers::Normalization;
using torch::Tensor;

safetensors::File outputs;

// Calls make() and the module it gives on seeded data, forward and backward, under `name`.
template <typename Make>
void record(const std::string& name, Make make) {
  torch::manual_seed(1);
  auto layer = make();
  const Tensor x = torch::randn({2, 7, 16}, torch::requires_grad());
  const Tensor y = layer->forward(x);
  y.backward(torch::randn_like(y));
  outputs.tensors[name + "/y"] = y;
  outputs.tensors[name + "/x_grad"] = x.grad();
  for (const auto& parameter : layer->named_parameters()) {
    outputs.tensors[name + "/parameter/" + parameter.key()] = parameter.value();
    outputs.tensors[name + "/grad/" + parameter.key()] = parameter.value().grad();
  }
}

void record_gpt(const std::string& name, bool tied) {
  torch::manual_seed(1);
  redline::layers::GPT gpt({.vocabulary = 31,
                            .layers = 2,
                            .layer = {.attention = {.hidden_size = 16, .heads = 4, .kv_heads = 2},
                                      .mlp = {.ffn_hidden_size = 24}},
                            .tied = tied});
  const Tensor tokens = torch::randint(31, {2, 9});
  const Tensor loss = gpt->loss(tokens.slice(1, 0, 8), tokens.slice(1, 1, 9));
  loss.backward();
  outputs.tensors[name + "/y"] = loss;
  for (const auto& parameter : gpt->named_parameters()) {
    outputs.tensors[name + "/parameter/" + parameter.key()] = parameter.value();
    outputs.tensors[name + "/grad/" + parameter.key()] = parameter.value().grad();
  }
}

// main_grad after two delayed gradients, of which the first overwrites.
void record_main_grad() {
  torch::manual_seed(1);
  redline::extensions::transformer_engine::TELayerNormColumnParallelLinear layer(
      {.input_size = 16,
       .output_size = 5,
       .config = {.gradient_accumulation_fusion = true, .delay_wgrad_compute = true}});
  layer->gradient.main_grad = torch::full({5, 16}, NAN);
  layer->gradient.overwrite = true;
  const Tensor x = torch::randn({2, 7, 16});
  for (int step = 0; step < 2; ++step) std::get<0>(layer->forward(x)).sum().backward();
  for (int step = 0; step < 2; ++step) layer->backward_dw();
  outputs.tensors["main_grad/main_grad"] = layer->gradient.main_grad;
  outputs.tensors["main_grad/bias"] = layer->bias.grad();
}

void record_all() {
  using namespace redline::layers;
  record("RMSNorm", [] { return RMSNorm({.dim = 16, .epsilon = 1e-6}); });
  record("LayerNorm", [] { return LayerNorm({.dim = 16, .zero_centered = true}); });
  record("Linear", [] { return Linear({.in_features = 16, .out_features = 5}); });
  record("LayerNormLinear", [] {
    return LayerNormLinear(
        {.in_features = 16, .out_features = 5, .norm = {.kind = Normalization::layer_norm}});
  });
  record("LayerNormMLP", [] { return LayerNormMLP({.hidden_size = 16, .ffn_hidden_size = 24}); });
  record("LayerNormMLP-gelu", [] {
    return LayerNormMLP({.hidden_size = 16, .ffn_hidden_size = 24, .activation = "gelu"});
  });
  record("Attention",
         [] { return Attention({.hidden_size = 16, .heads = 4, .kv_heads = 2, .bias = true}); });
  record("Attention-qk_norm", [] {
    return Attention({.hidden_size = 16, .heads = 4, .qk_norm = true, .rotary = {.dim = 2}});
  });
  record("TransformerLayer", [] {
    return TransformerLayer({.attention = {.hidden_size = 16, .heads = 4, .kv_heads = 2},
                             .mlp = {.ffn_hidden_size = 24}});
  });
  for (const auto& [name, recompute] :
       {std::pair{"TransformerLayer-selective", Recompute::selective},
        std::pair{"TransformerLayer-full", Recompute::full}}) {
    record(name, [recompute = recompute] {
      return TransformerLayer({.attention = {.hidden_size = 16, .heads = 4, .kv_heads = 2},
                               .mlp = {.ffn_hidden_size = 24},
                               .recompute = recompute});
    });
  }
  record_gpt("GPT", /*tied=*/false);
  record_gpt("GPT-tied", /*tied=*/true);
  record_main_grad();
}

}  // namespace

int main(int count, char** values) {
  if (count != 2) {
    std::fprintf(stderr, "layer_outputs: expected one file name\n");
    return 1;
  }
  record_all();
  safetensors::save(values[1], outputs);
}
