// Over budget: parameters: the dispatcher's schema fixes the signature.
#include "redline/ops/linear.h"

#include <torch/custom_class.h>

#include "redline/ops/below_autograd.h"
#include "redline/ops/dense.h"
#include "redline/ops/direct_view.h"
#include "redline/ops/gemm.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalQueue = std::optional<c10::intrusive_ptr<WeightGradientQueue>>;

constexpr const char* op_name = "linear";
constexpr ProductNames names = {.op = op_name};

void check_inputs(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const WeightGradientOptions& options) {
  check_weight(names, x, x.scalar_type(), weight, bias);
  TORCH_CHECK(x.sym_size(-1) == weight.sym_size(1), op_name, ": x: expected a last dimension of ",
              weight.sym_size(1), ", not ", x.sym_size(-1));
  check_weight_gradient(names, weight, options);
}

bool is_16_bit(const Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
}

Tensor transposed(const Tensor& matrix) {
  return is_private(matrix) ? swapped_directly(matrix, 0, 1) : matrix.t();
}

// y [rows, cols], a temporary, with the leading dimensions of x.
Tensor as_rows_of(const Tensor& x, const Tensor& y) {
  if (x.dim() == 2) return y;
  if (is_private(y) && y.is_contiguous()) {
    c10::DimVector sizes(x.sizes());
    sizes.back() = y.size(1);
    return resized_directly(y, sizes);
  }
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = y.sym_size(1);
  return at::_unsafe_view_symint(y, sizes);
}

void weight_grad_into(const Tensor& buffer, const Tensor& y_grad, const Tensor& x,
                      bool accumulate) {
  TORCH_CHECK(y_grad.dim() == 2 && x.dim() == 2 && y_grad.sym_size(0) == x.sym_size(0), op_name,
              ": y_grad: expected [rows, out] beside x [rows, in] ", x.sym_sizes(), ", not ",
              y_grad.sym_sizes());
  TORCH_CHECK(buffer.dim() == 2 && buffer.sym_size(0) == y_grad.sym_size(1) &&
                  buffer.sym_size(1) == x.sym_size(1),
              op_name, ": main_grad: expected [", y_grad.sym_size(1), ", ", x.sym_size(1),
              "], not ", buffer.sym_sizes());
  bump_versions({buffer});
  if (x.is_meta()) return;
  gemm_out({.a = transposed(y_grad), .b = x, .out = buffer, .accumulate = accumulate});
}

// --- derivative ---------------------------------------------------------------------------------

struct LinearFunction {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const WeightGradientOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool trained = weight.requires_grad();
    variable_list saved = {trained ? x : Tensor(), x.requires_grad() ? weight : Tensor()};
    if (bias) saved.emplace_back();  // that there is one; an entry of saved_data costs 0.3 us
    ctx->save_for_backward(std::move(saved));
    if (trained) save_weight_gradient(ctx, "weight", options);
    return product(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutograd below(grads);
    const Tensor &x = saved[0], &weight = saved[1], &y_grad = grads[0];
    const Tensor rows = rows_of(y_grad);
    Tensor x_grad, weight_grad, bias_grad;
    if (ctx->needs_input_grad(0)) x_grad = product_input_grad(y_grad, weight);
    if (saved.size() > 2 && ctx->needs_input_grad(2)) {
      bias_grad = rows.sum(at::IntArrayRef{0});
    }
    if (ctx->needs_input_grad(1)) {
      const WeightGrad product = {rows, rows_of(x), saved_weight_gradient(ctx, "weight")};
      weight_grad = product.given();
      product.write();
    }
    return {x_grad, weight_grad, bias_grad, Tensor()};
  }
};

// --- the schema's form --------------------------------------------------------------------------

Tensor differentiable(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& main_grad, bool accumulate, std::string dummy_grad,
                      const OptionalQueue& delayed, const std::optional<std::string>& tp_group,
                      bool sequence_parallel) {
  check_one_rank(op_name, tp_group, sequence_parallel);
  const WeightGradientOptions options{main_grad, accumulate, std::move(dummy_grad), delayed};
  check_inputs(x, weight, bias, options);
  return StrictNode<LinearFunction>::apply(x, weight, bias, options);
}

Tensor without_derivative(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& main_grad, bool accumulate, std::string dummy_grad,
                          const OptionalQueue& delayed, const std::optional<std::string>& tp_group,
                          bool sequence_parallel) {
  check_one_rank(op_name, tp_group, sequence_parallel);
  check_inputs(x, weight, bias, {main_grad, accumulate, std::move(dummy_grad), delayed});
  return product(x, weight, bias);
}

// The stock op's rule: x, weight and bias in autocast's dtype.
template <c10::DeviceType device, c10::DispatchKey key>
Tensor autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& main_grad, bool accumulate, std::string dummy_grad,
                const OptionalQueue& delayed, const std::optional<std::string>& tp_group,
                bool sequence_parallel) {
  check_one_rank(op_name, tp_group, sequence_parallel);
  const c10::impl::ExcludeDispatchKeyGuard off(key);
  const auto cast = [](const Tensor& tensor) { return cast_for_product(tensor, device); };
  return linear(cast(x), cast(weight), bias ? OptionalTensor(cast(*bias)) : std::nullopt,
                {main_grad, accumulate, std::move(dummy_grad), delayed});
}

void implement_inner(torch::Library& m) { m.impl("linear_weight_grad_into", weight_grad_into); }

}  // namespace

// --- for nodes that hold a product --------------------------------------------------------------

at::ScalarType product_dtype(const Tensor& x, const Tensor& weight) {
  return x.scalar_type() == at::kFloat && is_16_bit(weight) ? weight.scalar_type()
                                                            : x.scalar_type();
}

void check_weight(const ProductNames& names, const Tensor& x, at::ScalarType dtype,
                  const Tensor& weight, const OptionalTensor& bias) {
  const auto& [op, weight_name, bias_name, main_grad_name, dummy_grad_name] = names;
  TORCH_CHECK(x.dim() >= 1, op, ": x: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op, ": x: expected a floating dtype, not ",
              x.scalar_type());
  TORCH_CHECK(weight.dim() == 2, op, ": ", weight_name, ": expected [out, in], not a rank of ",
              weight.dim());
  TORCH_CHECK(weight.scalar_type() == dtype, op, ": ", weight_name, ": expected ", dtype,
              " as x has, not ", weight.scalar_type());
  check_devices(op, x, {{weight_name, weight}, {bias_name, bias}});
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), op, ": ", bias_name,
              ": expected [", weight.sym_size(0), "], not ", bias->sym_sizes());
  TORCH_CHECK(bias->scalar_type() == dtype, op, ": ", bias_name, ": expected ", dtype, " as ",
              weight_name, " has, not ", bias->scalar_type());
}

void check_weight_gradient(const ProductNames& names, const Tensor& weight,
                           const WeightGradientOptions& options) {
  const std::string& dummy = options.dummy_grad;
  TORCH_CHECK(dummy == "none" || dummy == "empty" || dummy == "zeros", names.op, ": ",
              names.dummy_grad, ": expected none, empty or zeros, not ", dummy);
  if (!options.main_grad) return;
  const Tensor& main_grad = *options.main_grad;
  TORCH_CHECK(main_grad.sym_sizes() == weight.sym_sizes(), names.op, ": ", names.main_grad,
              ": expected ", weight.sym_sizes(), ", not ", main_grad.sym_sizes());
  TORCH_CHECK(at::isFloatingType(main_grad.scalar_type()), names.op, ": ", names.main_grad,
              ": expected a floating dtype, not ", main_grad.scalar_type());
  check_devices(names.op, weight, {{names.main_grad, main_grad}});
}

void check_one_rank(const char* op, const std::optional<std::string>& tp_group,
                    bool sequence_parallel) {
  TORCH_CHECK(!tp_group, op, ": tp_group: expected none, not ", tp_group.value_or(""),
              "; products over more ranks are not built");
  TORCH_CHECK(!sequence_parallel, op,
              ": sequence_parallel: expected false; products over more ranks are not built");
}

Tensor rows_of(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  if (is_private(tensor) && tensor.is_contiguous() && tensor.dim() > 0) {
    const int64_t cols = tensor.size(-1);
    return resized_directly(
        tensor, {c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1)), cols});
  }
  return tensor.dim() == 1 ? tensor.unsqueeze(0) : tensor.flatten(0, -2);
}

Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return as_rows_of(x, gemm(rows_of(x), transposed(weight), {.bias = bias}));
}

Tensor product_input_grad(const Tensor& y_grad, const Tensor& weight) {
  return as_rows_of(y_grad, gemm(rows_of(y_grad), weight));
}

Tensor WeightGrad::given() const {
  if (!y_grad.defined() || options.delayed) return {};
  if (!options.main_grad) return gemm(transposed(y_grad), x);
  return dummy_of(*options.main_grad, x.scalar_type(), options.dummy_grad);
}

void WeightGrad::write() const {
  if (!y_grad.defined()) return;
  if (options.delayed) {
    (*options.delayed)
        ->push({.x = x.detach(),
                .y_grad = y_grad.detach(),
                .main_grad = value(options.main_grad),
                .accumulate = options.accumulate});
  } else if (options.main_grad) {
    linear_weight_grad_into(*options.main_grad, y_grad, x, options.accumulate);
  }
}

Tensor dummy_of(const Tensor& main_grad, at::ScalarType dtype, const std::string& kind) {
  if (kind == "none") return {};
  const auto options = main_grad.options().dtype(dtype);
  return kind == "zeros" ? at::zeros_symint(main_grad.sym_sizes(), options)
                         : at::empty_symint(main_grad.sym_sizes(), options);
}

void save_weight_gradient(AutogradContext* ctx, const std::string& name,
                          const WeightGradientOptions& options) {
  if (options.delayed) ctx->saved_data[name + ".delayed"] = *options.delayed;
  if (!options.main_grad) return;
  ctx->saved_data[name + ".main_grad"] = *options.main_grad;
  ctx->saved_data[name + ".accumulate"] = options.accumulate;
  ctx->saved_data[name + ".dummy_grad"] = options.dummy_grad;
}

WeightGradientOptions saved_weight_gradient(AutogradContext* ctx, const std::string& name) {
  auto& data = ctx->saved_data;
  WeightGradientOptions options;
  if (data.empty()) return options;
  if (const auto delayed = data.find(name + ".delayed"); delayed != data.end()) {
    options.delayed = delayed->second.toCustomClass<WeightGradientQueue>();
  }
  if (const auto main_grad = data.find(name + ".main_grad"); main_grad != data.end()) {
    options.main_grad = main_grad->second.toTensor();
    options.accumulate = data[name + ".accumulate"].toBool();
    options.dummy_grad = data[name + ".dummy_grad"].toStringRef();
  }
  return options;
}

Tensor cast_for_product(const Tensor& tensor, c10::DeviceType device) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

Tensor narrow_for_product(const Tensor& x, c10::DeviceType device) {
  return is_16_bit(x) ? cast_for_product(x, device) : x;
}

// --- public -------------------------------------------------------------------------------------

void WeightGradientQueue::push(Entry entry) { entries_.push_back(std::move(entry)); }

std::optional<Tensor> WeightGradientQueue::pop() {
  TORCH_CHECK(!entries_.empty(),
              "WeightGradientQueue: pop: expected a gradient from a backward before, not none");
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard off(c10::autocast_dispatch_keyset);
  const Entry entry = entries_.front();
  std::optional<Tensor> gradient;
  if (entry.main_grad.defined()) {
    linear_weight_grad_into(entry.main_grad, entry.y_grad, entry.x, entry.accumulate);
  } else {
    gradient = gemm(transposed(entry.y_grad), entry.x);
  }
  entries_.pop_front();  // not before: a product that failed for memory may be asked for again
  return gradient;
}

int64_t WeightGradientQueue::size() const { return static_cast<int64_t>(entries_.size()); }

void WeightGradientQueue::clear() { entries_.clear(); }

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
              const WeightGradientOptions& options) {
  static const auto op = find_op<decltype(differentiable)>("redline::linear");
  return op.call(x, weight, bias, options.main_grad, options.accumulate, options.dummy_grad,
                 options.delayed, std::nullopt, false);
}

void linear_weight_grad_into(const Tensor& buffer, const Tensor& y_grad, const Tensor& x,
                             bool accumulate) {
  static const auto op = find_op<decltype(weight_grad_into)>("redline::linear_weight_grad_into");
  op.call(buffer, y_grad, x, accumulate);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.class_<WeightGradientQueue>("WeightGradientQueue")
      .def(torch::init<>())
      .def("pop", &WeightGradientQueue::pop)
      .def("size", &WeightGradientQueue::size)
      .def("clear", &WeightGradientQueue::clear);
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? main_grad=None, "
      "bool accumulate=True, str dummy_grad=\"none\", "
      "__torch__.torch.classes.redline.WeightGradientQueue? delayed=None, "
      "str? tp_group=None, bool sequence_parallel=False) -> Tensor");
  m.def(
      "linear_weight_grad_into(Tensor(a!) buffer, Tensor y_grad, Tensor x, "
      "bool accumulate=True) -> ()");
}

TORCH_LIBRARY_IMPL(redline, CPU, m) { implement_inner(m); }
TORCH_LIBRARY_IMPL(redline, CUDA, m) { implement_inner(m); }
TORCH_LIBRARY_IMPL(redline, Meta, m) { implement_inner(m); }
TORCH_LIBRARY_IMPL(redline, CompositeExplicitAutograd, m) { m.impl("linear", without_derivative); }
TORCH_LIBRARY_IMPL(redline, Autograd, m) {
  m.impl("linear", differentiable);
  refuse_autograd(m, {"linear_weight_grad_into"});
}
TORCH_LIBRARY_IMPL(redline, AutocastCPU, m) {
  m.impl("linear", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(redline, AutocastCUDA, m) {
  m.impl("linear", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}
TORCH_LIBRARY_IMPL(redline, FuncTorchBatched, m) { refuse_vmap(m, {"linear"}); }

}  // namespace redline::ops
