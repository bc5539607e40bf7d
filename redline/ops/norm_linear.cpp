// Over budget: parameters: the dispatcher's schema fixes the signature.
#include "redline/ops/norm_linear.h"

#include "redline/ops/below_autograd.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Options = NormLinearOptions;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalQueue = std::optional<c10::intrusive_ptr<WeightGradientQueue>>;

constexpr const char* op_name = "norm_linear";
constexpr ProductNames names = {.op = op_name};

void check_inputs(const Tensor& x, const NormParameters& norm, const Tensor& weight,
                  const OptionalTensor& bias, const Options& options) {
  check_weight(names, x, product_dtype(x, weight), weight, bias);
  TORCH_CHECK(x.sym_size(-1) == weight.sym_size(1), op_name, ": x: expected a last dimension of ",
              weight.sym_size(1), ", not ", x.sym_size(-1));
  check_norm_part(op_name, x, options.residual, norm, options.norm);
  check_weight_gradient(names, weight, options.weight_gradient);
}

// --- derivative ---------------------------------------------------------------------------------

struct NormLinearFunction {
  static constexpr int has_bias_bit = 0, returns_normalized_bit = 1;

  // Returns y, then the sum with a residual, then the normalised input where it is asked for.
  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& norm_weight,
                               const OptionalTensor& norm_bias, const Tensor& weight,
                               const OptionalTensor& bias, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const NormParameters parameters = {.weight = norm_weight, .bias = norm_bias};
    const NormPart norm(x, residual, parameters, options.norm, weight.scalar_type());
    const NormPart::Output normed = norm.forward(x, residual, parameters);
    const bool trained = weight.requires_grad(), keep = options.keep_normalized;
    variable_list saved = normed.kept.saved(norm.trained() || (trained && !keep));
    saved.push_back(norm.trained() ? weight : Tensor());
    saved.push_back(trained && keep ? normed.normalized : Tensor());
    ctx->save_for_backward(std::move(saved));
    NormPart::Packed packed = norm.packed();
    packed.set(has_bias_bit, bias.has_value());
    packed.set(returns_normalized_bit, options.return_norm_output);
    norm.save(ctx, packed);
    if (trained) save_weight_gradient(ctx, "weight", options.weight_gradient);
    ctx->set_materialize_grads(false);
    variable_list out = {product(normed.normalized, weight, bias)};
    if (residual) out.push_back(normed.sum);
    if (options.return_norm_output) out.push_back(normed.normalized);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd below(grads);
    const NormPart::Packed packed(ctx->saved_data["node"].toInt());
    const NormPart norm(packed, ctx);
    const NormKept kept = NormKept::from(saved);
    const Tensor &weight = saved[NormKept::count], &y_grad = grads[0];
    Edges edges(ctx);
    const NormPart::Needs needs = norm.needs(edges);
    const bool needs_weight = edges.next();
    const bool needs_bias = edges.next(packed.has(has_bias_bit));
    Tensor normalized_grad, weight_grad, bias_grad;
    if (y_grad.defined()) {
      if (needs_bias) bias_grad = rows_of(y_grad).sum(at::IntArrayRef{0});
      if (needs.any()) normalized_grad = product_input_grad(y_grad, weight);
    }
    if (packed.has(returns_normalized_bit) && grads.back().defined()) {
      normalized_grad =
          normalized_grad.defined() ? normalized_grad + grads.back() : Tensor(grads.back());
    }
    const Tensor sum_grad = norm.has_residual() ? grads[1] : Tensor();
    const Tensor& normalized = saved[NormKept::count + 1];
    const bool multiplies = needs_weight && y_grad.defined();
    const NormPart::Gradients in =
        norm.backward(kept, normalized_grad, sum_grad, needs, multiplies && !normalized.defined());
    if (multiplies) {
      const WeightGrad product = {rows_of(y_grad),
                                  rows_of(normalized.defined() ? normalized : in.normalized),
                                  saved_weight_gradient(ctx, "weight")};
      weight_grad = product.given();
      product.write();
    }
    return {in.x, in.residual, in.weight, in.bias, weight_grad, bias_grad, Tensor()};
  }
};

// --- the schema's form --------------------------------------------------------------------------

using Results = std::tuple<Tensor, Tensor, Tensor>;

// What both directions of one dispatch key share; Run takes the checked call.
template <Results (*Run)(const Tensor&, const NormParameters&, const Tensor&, const OptionalTensor&,
                         const Options&)>
Results implement(const Tensor& x, const OptionalTensor& norm_weight,
                  const OptionalTensor& norm_bias, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, std::string_view norm, double epsilon,
                  bool zero_centered, bool keep_normalized, bool return_norm_output,
                  const OptionalTensor& main_grad, bool accumulate, std::string dummy_grad,
                  const OptionalQueue& delayed, const std::optional<std::string>& tp_group,
                  bool sequence_parallel, double dropout) {
  check_one_rank(op_name, tp_group, sequence_parallel);
  return Run(x, {norm_weight, norm_bias}, weight, bias,
             {.residual = residual,
              .norm = {std::string(norm), epsilon, zero_centered, dropout},
              .keep_normalized = keep_normalized,
              .return_norm_output = return_norm_output,
              .weight_gradient = {main_grad, accumulate, std::move(dummy_grad), delayed}});
}

Results differentiable(const Tensor& x, const NormParameters& norm, const Tensor& weight,
                       const OptionalTensor& bias, const Options& options) {
  check_inputs(x, norm, weight, bias, options);
  const variable_list out = StrictNode<NormLinearFunction>::apply(x, options.residual, norm.weight,
                                                                  norm.bias, weight, bias, options);
  return {out[0], options.residual ? out[1] : Tensor(),
          options.return_norm_output ? out.back() : Tensor()};
}

Results without_derivative(const Tensor& x, const NormParameters& norm, const Tensor& weight,
                           const OptionalTensor& bias, const Options& options) {
  check_inputs(x, norm, weight, bias, options);
  const NormPart part(x, options.residual, norm, options.norm, weight.scalar_type());
  const NormPart::Output normed = part.forward(x, options.residual, norm);
  return {product(normed.normalized, weight, bias), normed.sum,
          options.return_norm_output ? normed.normalized : Tensor()};
}

// The stock rules: the product's operands in autocast's dtype, the norm in x's.
template <c10::DeviceType device, c10::DispatchKey key>
Results autocast(const Tensor& x, const NormParameters& norm, const Tensor& weight,
                 const OptionalTensor& bias, const Options& options) {
  const c10::impl::ExcludeDispatchKeyGuard off(key);
  const NormLinearOutput out =
      norm_linear(narrow_for_product(x, device), norm, cast_for_product(weight, device),
                  bias ? OptionalTensor(cast_for_product(*bias, device)) : std::nullopt, options);
  return {out.y, out.sum, out.normalized};
}

}  // namespace

// --- public op ----------------------------------------------------------------------------------

NormLinearOutput norm_linear(const Tensor& x, const NormParameters& norm, const Tensor& weight,
                             const OptionalTensor& bias, const Options& options) {
  static const auto op = find_op<decltype(implement<differentiable>)>("redline::norm_linear");
  const auto& [main_grad, accumulate, dummy_grad, delayed] = options.weight_gradient;
  const auto [y, sum, normalized] =
      op.call(x, norm.weight, norm.bias, weight, bias, options.residual, options.norm.kind,
              options.norm.epsilon, options.norm.zero_centered, options.keep_normalized,
              options.return_norm_output, main_grad, accumulate, dummy_grad, delayed, std::nullopt,
              false, options.norm.dropout);
  return {y, sum, normalized};
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "norm_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, "
      "Tensor? bias=None, *, Tensor? residual=None, str norm=\"rms_norm\", float epsilon=1e-5, "
      "bool zero_centered=False, bool keep_normalized=False, bool return_norm_output=False, "
      "Tensor? main_grad=None, bool accumulate=True, str dummy_grad=\"none\", "
      "__torch__.torch.classes.redline.WeightGradientQueue? delayed=None, str? tp_group=None, "
      "bool sequence_parallel=False, float dropout=0.0) "
      "-> (Tensor y, Tensor sum, Tensor normalized)",
      {at::Tag::nondeterministic_seeded});
}

const Registration registration({
    .public_ops = {"norm_linear"},
    .without_derivative =
        [](torch::Library& m) { m.impl("norm_linear", implement<without_derivative>); },
    .differentiable = [](torch::Library& m) { m.impl("norm_linear", implement<differentiable>); },
    .autocast_cpu =
        [](torch::Library& m) {
          m.impl("norm_linear",
                 implement<autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>>);
        },
    .autocast_cuda =
        [](torch::Library& m) {
          m.impl("norm_linear",
                 implement<autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>>);
        },
});

}  // namespace redline::ops
