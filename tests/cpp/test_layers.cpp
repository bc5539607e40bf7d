// The manners of the C++ layers and of AdamW; what they compute is compared in test_layers.py.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include "redline/layers/gpt.h"
#include "redline/layers/recompute.h"
#include "redline/ops/adamw_optimizer.h"
#include "redline/ops/cross_entropy.h"
#include "redline/ops/log.h"
#include "redline/ops/norm.h"
#include "redline/ops/strict.h"

namespace redline::layers {
namespace {

GPTOptions small_gpt() {
  return {.vocabulary = 31,
          .layers = 1,
          .layer = {.attention = {.hidden_size = 16, .heads = 4, .kv_heads = 2, .qk_norm = true},
                    .mlp = {.ffn_hidden_size = 24}}};
}

Tensor some_tokens() { return torch::arange(18).view({2, 9}) % 31; }

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "nothing was refused";
}

TEST(Layers, ACloneHasTheValuesAndMemoryOfItsOwn) {
  GPT gpt(small_gpt());
  const auto twin = std::dynamic_pointer_cast<GPTImpl>(gpt->clone());
  EXPECT_TRUE(torch::equal(twin->forward(some_tokens()), gpt(some_tokens())));
  const auto ours = gpt->named_parameters(), theirs = twin->named_parameters();
  ASSERT_EQ(ours.keys(), theirs.keys());
  const torch::NoGradGuard no_grad;
  for (const auto& named : theirs) named.value().add_(1);
  for (const auto& named : ours)
    EXPECT_FALSE(torch::equal(named.value(), theirs[named.key()])) << named.key();
}

TEST(Layers, ToMovesEveryParameterAndLeavesTheTablesFloat32) {
  GPT gpt(small_gpt());
  const Tensor wide = gpt(some_tokens());
  gpt->to(torch::kBFloat16);
  for (const auto& parameter : gpt->parameters())
    EXPECT_EQ(parameter.scalar_type(), torch::kBFloat16);
  const Tensor narrow = gpt(some_tokens());
  EXPECT_EQ(narrow.scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(torch::allclose(narrow.to(torch::kFloat), wide, 0.1, 0.05));
}

// Gradients of a GPT's parameters, from one seed; the model may be gone when backward runs.
std::vector<Tensor> gradients(const GPTOptions& options, bool autocast = false) {
  torch::manual_seed(1);
  std::vector<Tensor> parameters;
  Tensor loss;
  {
    GPT gpt(options);
    parameters = gpt->parameters();
    at::autocast::set_autocast_enabled(at::kCPU, autocast);
    loss = gpt->loss(some_tokens(), some_tokens());
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
  return torch::autograd::grad({loss}, parameters);
}

TEST(Layers, RecomputedOnesHaveTheGradientsOfThoseThatKeep) {
  for (const Recompute recompute : {Recompute::selective, Recompute::full}) {
    for (const double dropout : {0.0, 0.5}) {
      for (const bool autocast : {false, true}) {
        GPTOptions options = small_gpt();
        options.layers = 2;
        options.layer.dropout = dropout;
        const std::vector<Tensor> kept = gradients(options, autocast);
        options.layer.recompute = recompute;
        const std::vector<Tensor> again = gradients(options, autocast);
        ASSERT_EQ(kept.size(), again.size());
        for (size_t i = 0; i < kept.size(); ++i) EXPECT_TRUE(torch::equal(kept[i], again[i])) << i;
      }
    }
  }
}

TEST(Layers, ARecomputedLayerOfAFrozenInputStillTrains) {
  TransformerLayer layer({.attention = {.hidden_size = 16, .heads = 4},
                          .mlp = {.ffn_hidden_size = 24},
                          .recompute = Recompute::full});
  layer(torch::randn({2, 5, 16})).sum().backward();
  for (const Tensor& parameter : layer->parameters()) EXPECT_TRUE(parameter.grad().defined());
}

TEST(Layers, BadOptionsAreRefusedAtConstruction) {
  const auto attention = [](AttentionOptions options) {
    return refusal([=] { Attention built(options); });
  };
  EXPECT_EQ(attention({.hidden_size = 16}), "Attention: heads: expected 1 or more, not 0");
  EXPECT_EQ(attention({.hidden_size = 16, .heads = 4, .kv_heads = 3}),
            "Attention: kv_heads: expected a divisor of 4, not 3");
  for (const int64_t dim : {3, 6, -2}) {
    EXPECT_EQ(attention({.hidden_size = 16, .heads = 4, .rotary = {.dim = dim}}),
              "Attention: rotary_dim: expected an even number up to the head_dim 4, not " +
                  std::to_string(dim));
  }
  EXPECT_EQ(refusal([] {
              LayerNormMLP built({.hidden_size = 4, .ffn_hidden_size = 4, .activation = "swish"});
            }),
            "LayerNormMLP: activation: expected one of swiglu, geglu, reglu, quick_geglu, "
            "clamped_swiglu, gelu, gelu_erf, quick_gelu, silu, relu, squared_relu, not swish");
}

TEST(Layers, LayerNormLinearGivesItsNormToo) {
  LayerNormLinear kept({.in_features = 8, .out_features = 4, .keep_normalized = true});
  const Tensor x = torch::randn({3, 8}, torch::requires_grad());
  const auto [y, normalized] = kept->forward_normalized(x);
  EXPECT_TRUE(torch::equal(normalized, normalize(x, kept->gain, kept->options.norm)));
  EXPECT_TRUE(torch::equal(y, kept(x)));
  const Tensor expected = torch::autograd::grad({y.sum()}, {x})[0];
  kept->options.keep_normalized = false;
  EXPECT_TRUE(torch::equal(torch::autograd::grad({kept(x).sum()}, {x})[0], expected));
}

TEST(Layers, LayerNormMLPSendsBothWeightGradientsWhereTheyBelong) {
  for (const bool delayed : {false, true}) {
    LayerNormMLP mlp(
        {.hidden_size = 8,
         .ffn_hidden_size = 4,
         .weight_gradient = {.accumulate_main_grad = true, .delay_weight_grad = delayed}});
    const Tensor x = torch::randn({3, 8});
    EXPECT_EQ(refusal([&] { mlp(x); }).substr(0, 40), "LayerNormMLP: fc1: main_grad: expected a");
    mlp->fc1_gradient.main_grad = torch::zeros_like(mlp->fc1_weight);
    mlp->fc2_gradient.main_grad = torch::zeros_like(mlp->fc2_weight);
    mlp(x).sum().backward();
    if (delayed) {
      EXPECT_FALSE(mlp->fc1_gradient.main_grad.any().item<bool>());
      mlp->backward_dw();
    }
    LayerNormMLP stock({.hidden_size = 8, .ffn_hidden_size = 4});
    for (size_t i = 0; i < stock->parameters().size(); ++i)
      stock->parameters()[i].data().copy_(mlp->parameters()[i]);
    stock(x).sum().backward();
    EXPECT_FALSE(mlp->fc1_weight.grad().defined());
    EXPECT_TRUE(torch::equal(mlp->fc1_gradient.main_grad, stock->fc1_weight.grad()));
    EXPECT_TRUE(torch::equal(mlp->fc2_gradient.main_grad, stock->fc2_weight.grad()));
  }
}

TEST(Layers, BackwardWritesOverTheLogitsUnlessAskedNotTo) {
  for (const bool inplace : {true, false}) {
    GPTOptions options = small_gpt();
    options.inplace_backward = inplace;
    GPT gpt(options);
    const Tensor loss = gpt->loss(some_tokens(), some_tokens());
    loss.backward({}, /*retain_graph=*/true);
    const std::string second = refusal([&] { loss.backward(); });
    EXPECT_EQ(second.find("modified by an inplace operation") != std::string::npos, inplace);
  }
}

TEST(Layers, AFusedLossIsTheLossOfTheLogits) {
  for (const bool tied : {true, false}) {
    GPTOptions options = small_gpt();
    options.tied = tied;
    GPT gpt(options);
    const Tensor expected = gpt->loss(some_tokens(), some_tokens());
    const auto expected_grads = torch::autograd::grad({expected}, gpt->parameters());
    for (const FusedLoss mode : {FusedLoss::promise, FusedLoss::recompute}) {
      gpt->options.fused_loss = mode;
      const Tensor loss = gpt->loss(some_tokens(), some_tokens());
      EXPECT_TRUE(torch::allclose(loss, expected));
      const auto grads = torch::autograd::grad({loss}, gpt->parameters());
      for (size_t i = 0; i < grads.size(); ++i)
        EXPECT_TRUE(torch::allclose(grads[i], expected_grads[i], 1e-4, 1e-6)) << i;
    }
  }
}

TEST(Layers, AFusedLossFillsMainGradAndRefusesToWait) {
  GPTOptions options = small_gpt();
  options.fused_loss = FusedLoss::promise;
  GPT gpt(options);
  gpt->head->gradient = WeightGradient({.accumulate_main_grad = true});
  gpt->head->gradient.main_grad = torch::zeros_like(gpt->head->weight);
  gpt->loss(some_tokens(), some_tokens()).backward();
  EXPECT_FALSE(gpt->head->weight.grad().defined());
  EXPECT_GT(gpt->head->gradient.main_grad.abs().sum().item<float>(), 0);
  gpt->head->gradient = WeightGradient({.delay_weight_grad = true});
  EXPECT_EQ(
      refusal([&] { gpt->loss(some_tokens(), some_tokens()); }),
      "fused_linear_cross_entropy: delayed: expected none, for a queue would keep the logits' "
      "gradient");
}

TEST(CrossEntropy, PredictionsComeBesideTheLoss) {
  const Tensor logits = torch::randn({9, 31}, torch::requires_grad());
  const Tensor targets = torch::arange(9);
  const auto [loss, none, predictions] = ops::cross_entropy_with_predictions(logits, targets);
  EXPECT_TRUE(torch::equal(loss, ops::cross_entropy(logits, targets)));
  EXPECT_TRUE(torch::equal(predictions, logits.argmax(-1)));
  EXPECT_EQ(none.numel(), 0);
  const auto all = ops::cross_entropy_with_predictions(logits, targets, {.z_loss = 0.1}, true);
  EXPECT_EQ(all.log_sum_exp.sizes(), targets.sizes());
  EXPECT_TRUE(all.log_sum_exp.requires_grad() && !all.predictions.requires_grad());
}

struct Trained {
  Tensor parameter = torch::full({5}, 2.0, torch::requires_grad());
  AdamW optimizer{{parameter}, {.learning_rate = 0.1}};

  explicit Trained(double gradient) { parameter.mutable_grad() = torch::full({5}, gradient); }
};

TEST(AdamW, ScaledGradientsTakeTheStepOfThePlainOnes) {
  Trained plain(0.5), scaled(0.5 * 1024);
  plain.optimizer.step();
  scaled.optimizer.step({.grad_scale = torch::tensor(1024.0F)});
  EXPECT_TRUE(torch::equal(plain.parameter, scaled.parameter));
}

TEST(Strict, ACopyIsRefusedWhileTheGuardLives) {
  const Tensor x = torch::ones({4, 3}).t();
  {
    const ops::StrictGuard strict;
    EXPECT_THROW(ops::rms_norm(x, {}), std::runtime_error);
    const ops::StrictGuard lifted(false);
    EXPECT_NO_THROW(ops::rms_norm(x, {}));
  }
  EXPECT_NO_THROW(ops::rms_norm(x, {}));
}

TEST(Strict, ARecomputedRegionIsHeldAsItsForwardWas) {
  std::vector<bool> runs;
  const Region region{.run = [&](const variable_list& in) -> variable_list {
    runs.push_back(ops::is_strict());
    return {ops::rms_norm(in[0], {})};
  }};
  Tensor y;
  {
    const ops::StrictGuard strict;
    y = recompute(region, {torch::ones({3, 4}, torch::requires_grad())})[0];
  }
  y.backward(torch::ones_like(y));
  EXPECT_EQ(runs, (std::vector<bool>{true, true}));
}

variable_list product_of(const variable_list& in) { return {torch::mm(in[0], in[1])}; }

TEST(Layers, AWrongInputIsToldInWordsOfX) {
  Attention attention({.hidden_size = 8, .heads = 2, .rotary = {.max_positions = 8}});
  EXPECT_EQ(refusal([&] { attention->forward(torch::ones({2, 8})); }),
            "Attention: x: expected [batch, sequence, hidden_size], not [2, 8]");
  EXPECT_EQ(refusal([&] { attention->forward(torch::ones({1, 9, 8})); }),
            "Attention: x: expected a sequence of at most 8, which is max_positions, not 9");
  EXPECT_EQ(refusal([&] { attention->forward(torch::ones({1, 2, 9})); }),
            "norm_linear: x: expected a last dimension of 8, not 9");
  const Packing packing{.cu_seqlens = torch::tensor({0, 2}, torch::kInt)};
  EXPECT_EQ(refusal([&] { attention->forward(torch::ones({1, 2, 8}), packing); }),
            "Attention: x: expected [tokens, hidden_size] beside cu_seqlens, not [1, 2, 8]");
}

TEST(Layers, APreActivationInAnotherDtypeIsRefused) {
  const std::string expected =
      "pre_activation_dtype: expected none, not Float8_e4m3fn; keeping the pre-activation in "
      "another dtype is not built yet";
  const LayerNormMLPOptions options{
      .hidden_size = 4, .ffn_hidden_size = 8, .pre_activation_dtype = torch::kFloat8_e4m3fn};
  EXPECT_EQ(refusal([&] { LayerNormMLP mlp(options); }), "LayerNormMLP: " + expected);
  const Tensor x = torch::ones({2, 4});
  ops::NormMlpOptions node;
  node.pre_activation_dtype = options.pre_activation_dtype;
  EXPECT_EQ(refusal([&] { ops::norm_mlp(x, {}, {.fc1_weight = x, .fc2_weight = x}, node); }),
            "norm_mlp: " + expected);
}

TEST(Layers, GPTPredictsItsLargestLogits) {
  GPT gpt(small_gpt());
  const Tensor tokens = some_tokens(), largest = gpt(tokens).argmax(-1);
  const auto [loss, predictions] = gpt->loss_and_predictions(tokens, tokens);
  EXPECT_TRUE(torch::equal(loss, gpt->loss(tokens, tokens)));
  EXPECT_TRUE(torch::equal(predictions, largest));
  const auto [each, same] = gpt->loss_and_predictions(tokens, tokens, {}, "none");
  EXPECT_EQ(each.sizes(), tokens.sizes());
  EXPECT_TRUE(torch::equal(same, largest));
  GPTOptions fused = small_gpt();
  fused.fused_loss = FusedLoss::recompute;
  EXPECT_EQ(refusal([&] { GPT(fused)->loss_and_predictions(tokens, tokens); }),
            "GPT: predictions: expected a fused_loss of none, for a fused one has no logits");
}

TEST(Recompute, ForgetsItsCastsOfWeights) {
  const Tensor x = torch::ones({2, 3}), weight = torch::ones({3, 2}, torch::requires_grad());
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::increment_nesting();
  const Tensor y = recompute({.run = product_of}, {x, weight})[0];
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  y.sum().backward();
  {
    const torch::NoGradGuard no_grad;
    weight.mul_(2);
  }
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const Tensor again = torch::mm(x, weight);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(again[0][0].item<float>(), 6);
}

TEST(Recompute, ASecondDerivativeIsRefused) {
  const Tensor x = torch::ones({2, 2}, torch::requires_grad());
  const Tensor y = recompute({.run = product_of}, {x, x})[0];
  const std::string said = refusal(
      [&] { torch::autograd::grad({y.sum()}, {x}, {}, std::nullopt, /*create_graph=*/true); });
  EXPECT_NE(said.find("recompute: expected a backward without create_graph"), std::string::npos);
}

TEST(Log, AKernelIsNamedWithoutNamespacesAndParameters) {
  EXPECT_EQ(ops::readable_kernel(
                "_ZN7redline4cuda43_GLOBAL__N__cd017f3a_10_forward_cu_464c0d1014forward_kernelINS1_"
                "4FormI6__halffLb0ELb1EEENS1_4TileILi0ELi4ELi1ELi8EEEEEvNS1_7ForwardE"),
            "forward_kernel<Form<__half, float, false, true>, Tile<0, 4, 1, 8> >");
  EXPECT_EQ(ops::readable_kernel("no mangled name"), "no mangled name");
}

TEST(AdamW, FoundInfLeavesEverythingAsItWas) {
  Trained trained(0.5);
  trained.optimizer.step({.found_inf = torch::tensor(1.0F)});
  EXPECT_TRUE(torch::equal(trained.parameter, torch::full({5}, 2.0)));
  EXPECT_EQ(trained.optimizer.state_of(trained.parameter)["step"].item<float>(), 0);
  trained.optimizer.step({.found_inf = torch::tensor(0.0F)});
  EXPECT_EQ(trained.optimizer.state_of(trained.parameter)["step"].item<float>(), 1);
}

TEST(AdamW, ALoadedStateGoesOnAsIfNeverStopped) {
  Trained first(0.5);
  first.optimizer.step();
  Trained second(0.5);
  {
    const torch::NoGradGuard no_grad;
    second.parameter.copy_(first.parameter);
  }
  second.optimizer.load_state_of(second.parameter, first.optimizer.state_of(first.parameter));
  first.optimizer.step();
  second.optimizer.step();
  EXPECT_TRUE(torch::equal(first.parameter, second.parameter));
}

TEST(AdamW, AStateOfAnotherParameterIsRefused) {
  Trained trained(0.5);
  auto state = trained.optimizer.state_of(trained.parameter);
  const auto load = [&] { trained.optimizer.load_state_of(trained.parameter, state); };
  state["exp_avg"] = torch::zeros({4});
  EXPECT_EQ(refusal(load), "AdamW: state: exp_avg: expected [5], not [4]");
  state.erase("exp_avg_sq");
  state["exp_avg"] = torch::zeros({5});
  EXPECT_EQ(refusal(load), "AdamW: state: expected exp_avg_sq beside the others");
}

}  // namespace
}  // namespace redline::layers
