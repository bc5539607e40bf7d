// Over budget: parameters: the dispatcher's schema fixes the signature.
#include "redline/ops/norm_mlp.h"

#include "redline/ops/activation_part.h"
#include "redline/ops/below_autograd.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Options = NormMlpOptions;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalQueue = std::optional<c10::intrusive_ptr<WeightGradientQueue>>;

constexpr const char* op_name = "norm_mlp";
constexpr ProductNames fc1 = {op_name, "fc1_weight", "fc1_bias", "fc1_main_grad", "fc1_dummy_grad"};
constexpr ProductNames fc2 = {op_name, "fc2_weight", "fc2_bias", "fc2_main_grad", "fc2_dummy_grad"};

void check_inputs(const Tensor& x, const NormParameters& norm, const MlpParameters& mlp,
                  const Options& options) {
  const bool gated = is_gated(op_name, options.activation);
  const at::ScalarType dtype = product_dtype(x, mlp.fc1_weight);
  check_weight(fc1, x, dtype, mlp.fc1_weight, {});  // the activation adds its bias, and checks it
  check_weight(fc2, x, dtype, mlp.fc2_weight, mlp.fc2_bias);
  TORCH_CHECK(x.sym_size(-1) == mlp.fc1_weight.sym_size(1), op_name,
              ": x: expected a last dimension of ", mlp.fc1_weight.sym_size(1), ", not ",
              x.sym_size(-1));
  check_norm_part(op_name, x, options.residual, norm, options.norm);
  const c10::SymInt rows = mlp.fc1_weight.sym_size(0), ffn = mlp.fc2_weight.sym_size(1);
  TORCH_CHECK(rows == (gated ? 2 * ffn : ffn), op_name, ": fc1_weight: expected ",
              gated ? "2 x " : "", ffn, " rows for ", options.activation, " and fc2_weight ",
              mlp.fc2_weight.sym_sizes(), ", not ", rows);
  check_activation_bias(fc1.op, fc1.bias, mlp.fc1_bias, mlp.fc1_weight);
  check_weight_gradient(fc1, mlp.fc1_weight, options.fc1_gradient);
  check_weight_gradient(fc2, mlp.fc2_weight, options.fc2_gradient);
}

// --- derivative ---------------------------------------------------------------------------------

// What the node keeps beside its tensors.
struct Node {
  NormPart norm;
  std::string activation;
  bool has_fc1_bias, has_fc2_bias;

  void save(AutogradContext* ctx) const {
    NormPart::Packed packed = norm.packed();
    packed.set(0, has_fc1_bias);
    packed.set(1, has_fc2_bias);
    norm.save(ctx, packed);
    ctx->saved_data["activation"] = activation;
  }
  static Node from(AutogradContext* ctx) {
    const NormPart::Packed packed(ctx->saved_data["node"].toInt());
    return {NormPart(packed, ctx), ctx->saved_data["activation"].toStringRef(), packed.has(0),
            packed.has(1)};
  }
};

// What of the activation and before it wants a gradient.
struct Needs {
  NormPart::Needs norm;
  bool fc1_weight, fc1_bias, fc2_weight, fc2_bias;

  Needs(const Node& node, Edges edges)
      : norm(node.norm.needs(edges)),
        fc1_weight(edges.next()),
        fc1_bias(edges.next(node.has_fc1_bias)),
        fc2_weight(edges.next()),
        fc2_bias(edges.next(node.has_fc2_bias)) {}
  bool up() const { return norm.any() || fc1_weight || fc1_bias; }
};

// Saved behind the norm's.
struct Kept {
  Tensor up, fc1_weight, fc1_bias, fc2_weight;

  static Kept from(const variable_list& saved) {
    constexpr size_t n = NormKept::count;
    return {saved[n], saved[n + 1], saved[n + 2], saved[n + 3]};
  }
};

struct NormMlpFunction {
  // Returns y, then the sum with a residual.
  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& norm_weight,
                               const OptionalTensor& norm_bias, const Tensor& fc1_weight,
                               const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                               const OptionalTensor& fc2_bias, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const NormParameters parameters = {.weight = norm_weight, .bias = norm_bias};
    const NormPart norm(x, residual, parameters, options.norm, fc1_weight.scalar_type());
    const NormPart::Output normed = norm.forward(x, residual, parameters);
    const Tensor up = product(normed.normalized, fc1_weight, {});
    const Tensor activated = activate(up, fc1_bias, options.activation);
    const bool fc1_trained = fc1_weight.requires_grad(), fc2_trained = fc2_weight.requires_grad();
    const bool to_up =
        norm.trained() || fc1_trained || (fc1_bias.has_value() && fc1_bias->requires_grad());
    variable_list saved = normed.kept.saved(norm.trained() || fc1_trained);
    saved.push_back(to_up || fc2_trained ? up : Tensor());
    saved.push_back(norm.trained() ? fc1_weight : Tensor());
    saved.push_back(value(fc1_bias));
    saved.push_back(to_up ? fc2_weight : Tensor());
    ctx->save_for_backward(std::move(saved));
    Node{norm, options.activation, fc1_bias.has_value(), fc2_bias.has_value()}.save(ctx);
    if (fc1_trained) save_weight_gradient(ctx, "fc1", options.fc1_gradient);
    if (fc2_trained) save_weight_gradient(ctx, "fc2", options.fc2_gradient);
    ctx->set_materialize_grads(false);
    const Tensor y = product(activated, fc2_weight, fc2_bias);
    if (residual) return {y, normed.sum};
    return {y};
  }

  static WeightGrad weight_grad(AutogradContext* ctx, const char* name, const Tensor& y_grad,
                                const Tensor& x) {
    return {rows_of(y_grad), rows_of(x), saved_weight_gradient(ctx, name)};
  }

  // The normalised input's gradient, undefined where nothing before it wants one.
  struct Gradients {
    Tensor normalized, fc1_bias, fc2_weight, fc2_bias;
    Tensor up;       // where fc1's weight has a gradient, which needs the normalised input too
    WeightGrad fc2;  // what is left to write
  };

  static Gradients products(AutogradContext* ctx, const Node& node, const variable_list& saved,
                            const Tensor& y_grad, const Needs& needs) {
    const Kept kept = Kept::from(saved);
    Gradients out;
    if (needs.fc2_bias) out.fc2_bias = rows_of(y_grad).sum(at::IntArrayRef{0});
    Tensor up_grad;
    {
      Tensor activated;
      if (needs.up()) {
        const ActivationGradients grads = activate_backward(
            product_input_grad(y_grad, kept.fc2_weight), kept.up, optional(kept.fc1_bias),
            node.activation, {.bias = needs.fc1_bias, .y = needs.fc2_weight});
        up_grad = grads.x;
        out.fc1_bias = needs.fc1_bias ? grads.bias : Tensor();
        activated = grads.y;
      } else if (needs.fc2_weight) {
        activated = activate(kept.up, optional(kept.fc1_bias), node.activation);
      }
      if (needs.fc2_weight) {
        const WeightGrad fc2 = weight_grad(ctx, "fc2", y_grad, activated);
        out.fc2_weight = fc2.given();
        if (fc2.is_written()) out.fc2 = fc2;  // otherwise the activation's output may go
      }
    }
    if (needs.norm.any()) out.normalized = product_input_grad(up_grad, kept.fc1_weight);
    if (needs.fc1_weight) out.up = up_grad;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd below(grads);
    const Node node = Node::from(ctx);
    const Needs needs(node, Edges(ctx));
    Gradients out;
    if (grads[0].defined()) out = products(ctx, node, saved, grads[0], needs);
    const Tensor sum_grad = node.norm.has_residual() ? grads[1] : Tensor();
    const NormPart::Gradients in = node.norm.backward(NormKept::from(saved), out.normalized,
                                                      sum_grad, needs.norm, out.up.defined());
    out.normalized = Tensor();
    WeightGrad fc1;
    if (out.up.defined()) fc1 = weight_grad(ctx, "fc1", out.up, in.normalized);
    const Tensor fc1_weight = fc1.given();
    fc1.write();
    out.fc2.write();
    return {in.x,         in.residual,    in.weight,    in.bias, fc1_weight,
            out.fc1_bias, out.fc2_weight, out.fc2_bias, Tensor()};
  }
};

// --- the schema's form --------------------------------------------------------------------------

using Results = std::tuple<Tensor, Tensor>;

template <Results (*Run)(const Tensor&, const NormParameters&, const MlpParameters&,
                         const Options&)>
Results implement(const Tensor& x, const OptionalTensor& norm_weight,
                  const OptionalTensor& norm_bias, const Tensor& fc1_weight,
                  const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                  const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                  std::string_view norm, double epsilon, bool zero_centered,
                  std::string_view activation, const OptionalTensor& fc1_main_grad,
                  bool fc1_accumulate, std::string fc1_dummy_grad, const OptionalQueue& fc1_delayed,
                  const OptionalTensor& fc2_main_grad, bool fc2_accumulate,
                  std::string fc2_dummy_grad, const OptionalQueue& fc2_delayed,
                  const std::optional<std::string>& tp_group, bool sequence_parallel,
                  double dropout) {
  check_one_rank(op_name, tp_group, sequence_parallel);
  return Run(
      x, {norm_weight, norm_bias}, {fc1_weight, fc1_bias, fc2_weight, fc2_bias},
      {.residual = residual,
       .norm = {std::string(norm), epsilon, zero_centered, dropout},
       .activation = std::string(activation),
       .fc1_gradient = {fc1_main_grad, fc1_accumulate, std::move(fc1_dummy_grad), fc1_delayed},
       .fc2_gradient = {fc2_main_grad, fc2_accumulate, std::move(fc2_dummy_grad), fc2_delayed}});
}

Results differentiable(const Tensor& x, const NormParameters& norm, const MlpParameters& mlp,
                       const Options& options) {
  check_inputs(x, norm, mlp, options);
  const variable_list out = StrictNode<NormMlpFunction>::apply(
      x, options.residual, norm.weight, norm.bias, mlp.fc1_weight, mlp.fc1_bias, mlp.fc2_weight,
      mlp.fc2_bias, options);
  return {out[0], options.residual ? out[1] : Tensor()};
}

Results without_derivative(const Tensor& x, const NormParameters& norm, const MlpParameters& mlp,
                           const Options& options) {
  check_inputs(x, norm, mlp, options);
  const NormPart part(x, options.residual, norm, options.norm, mlp.fc1_weight.scalar_type());
  const NormPart::Output normed = part.forward(x, options.residual, norm);
  const Tensor activated =
      activate(product(normed.normalized, mlp.fc1_weight, {}), mlp.fc1_bias, options.activation);
  return {product(activated, mlp.fc2_weight, mlp.fc2_bias), normed.sum};
}

// The stock rules: the products' operands in autocast's dtype; the norm, and fc1's bias, which the
// activation adds, in their own.
template <c10::DeviceType device, c10::DispatchKey key>
Results autocast(const Tensor& x, const NormParameters& norm, const MlpParameters& mlp,
                 const Options& options) {
  const c10::impl::ExcludeDispatchKeyGuard off(key);
  const auto cast = [](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(cast_for_product(*tensor, device)) : std::nullopt;
  };
  const NormMlpOutput out = norm_mlp(narrow_for_product(x, device), norm,
                                     {.fc1_weight = *cast(mlp.fc1_weight),
                                      .fc1_bias = mlp.fc1_bias,
                                      .fc2_weight = *cast(mlp.fc2_weight),
                                      .fc2_bias = cast(mlp.fc2_bias)},
                                     options);
  return {out.y, out.sum};
}

}  // namespace

// --- public op ----------------------------------------------------------------------------------

void check_pre_activation_dtype(const char* op, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK(!dtype, op, ": pre_activation_dtype: expected none, not ", *dtype,
              "; keeping the pre-activation in another dtype is not built yet");
}

NormMlpOutput norm_mlp(const Tensor& x, const NormParameters& norm, const MlpParameters& mlp,
                       const Options& options) {
  check_pre_activation_dtype(op_name, options.pre_activation_dtype);
  static const auto op = find_op<decltype(implement<differentiable>)>("redline::norm_mlp");
  const WeightGradientOptions &first = options.fc1_gradient, &second = options.fc2_gradient;
  const auto [y, sum] =
      op.call(x, norm.weight, norm.bias, mlp.fc1_weight, mlp.fc1_bias, mlp.fc2_weight, mlp.fc2_bias,
              options.residual, options.norm.kind, options.norm.epsilon, options.norm.zero_centered,
              options.activation, first.main_grad, first.accumulate, first.dummy_grad,
              first.delayed, second.main_grad, second.accumulate, second.dummy_grad, second.delayed,
              std::nullopt, false, options.norm.dropout);
  return {y, sum};
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "norm_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, "
      "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, *, Tensor? residual=None, "
      "str norm=\"rms_norm\", float epsilon=1e-5, bool zero_centered=False, "
      "str activation=\"swiglu\", Tensor? fc1_main_grad=None, bool fc1_accumulate=True, "
      "str fc1_dummy_grad=\"none\", "
      "__torch__.torch.classes.redline.WeightGradientQueue? fc1_delayed=None, "
      "Tensor? fc2_main_grad=None, bool fc2_accumulate=True, str fc2_dummy_grad=\"none\", "
      "__torch__.torch.classes.redline.WeightGradientQueue? fc2_delayed=None, "
      "str? tp_group=None, bool sequence_parallel=False, float dropout=0.0) "
      "-> (Tensor y, Tensor sum)",
      {at::Tag::nondeterministic_seeded});
}

const Registration registration({
    .public_ops = {"norm_mlp"},
    .without_derivative =
        [](torch::Library& m) { m.impl("norm_mlp", implement<without_derivative>); },
    .differentiable = [](torch::Library& m) { m.impl("norm_mlp", implement<differentiable>); },
    .autocast_cpu =
        [](torch::Library& m) {
          m.impl("norm_mlp",
                 implement<autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>>);
        },
    .autocast_cuda =
        [](torch::Library& m) {
          m.impl("norm_mlp",
                 implement<autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>>);
        },
});

}  // namespace redline::ops
