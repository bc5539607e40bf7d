// Over budget: parameters: the dispatcher's schema fixes the signature.
#include "redline/ops/gemm.h"

#include "redline/ops/dense.h"
#include "redline/ops/gemm_uneven.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;

constexpr const char* op_name = "gemm";

GemmEpilogue epilogue_from(std::string_view name) {
  if (name == "none") return GemmEpilogue::none;
  if (name == "gelu") return GemmEpilogue::gelu;
  TORCH_CHECK(name == "gelu_grad", op_name, ": epilogue: expected none, gelu or gelu_grad, not ",
              name);
  return GemmEpilogue::gelu_grad;
}

bool is_16_bit(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

// --- what every device is asked -----------------------------------------------------------------

void check_factors(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.dim() == 2 || a.dim() == 3, op_name,
              ": a: expected [M, K] or [batch, M, K], not a rank of ", a.dim());
  TORCH_CHECK(at::isFloatingType(a.scalar_type()), op_name, ": a: expected a floating dtype, not ",
              a.scalar_type());
  TORCH_CHECK(b.scalar_type() == a.scalar_type(), op_name, ": b: expected ", a.scalar_type(),
              " as a has, not ", b.scalar_type());
  TORCH_CHECK(b.dim() == a.dim() && b.sym_size(-2) == a.sym_size(-1) &&
                  (a.dim() == 2 || b.sym_size(0) == a.sym_size(0)),
              op_name, ": b: expected [", a.dim() == 3 ? "batch, " : "", "K, N] beside a ",
              a.sym_sizes(), ", not ", b.sym_sizes());
  check_devices(op_name, a, {{"b", b}});
}

c10::SymDimVector sizes_of(const Tensor& a, const Tensor& b) {
  c10::SymDimVector sizes(a.sym_sizes().begin(), a.sym_sizes().end());
  sizes.back() = b.sym_size(-1);
  return sizes;
}

at::ScalarType check_options(const Tensor& a, const Tensor& b, const GemmOptions& options) {
  check_factors(a, b);
  const at::ScalarType dtype = options.out_dtype.value_or(a.scalar_type());
  TORCH_CHECK(dtype == a.scalar_type() || dtype == accumulation_type(a), op_name,
              ": out_dtype: expected ", a.scalar_type(), " or ", accumulation_type(a), ", not ",
              dtype);
  const auto check_vector = [&](const char* name, const Tensor& tensor, c10::SymIntArrayRef sizes) {
    TORCH_CHECK(tensor.sym_sizes() == sizes, op_name, ": ", name, ": expected ", sizes, ", not ",
                tensor.sym_sizes());
    TORCH_CHECK(tensor.scalar_type() == dtype, op_name, ": ", name, ": expected ", dtype,
                " as out has, not ", tensor.scalar_type());
    check_devices(op_name, a, {{name, tensor}});
  };
  const auto& [bias, epilogue, pre_activation, out_dtype] = options;
  const bool backward = epilogue_from(epilogue) == GemmEpilogue::gelu_grad;
  TORCH_CHECK(!backward || !bias, op_name, ": bias: expected none with gelu_grad");
  TORCH_CHECK(backward == pre_activation.has_value(), op_name, ": pre_activation: expected ",
              backward ? "one with gelu_grad" : "none without gelu_grad");
  if (bias) check_vector("bias", *bias, {b.sym_size(-1)});
  if (pre_activation) check_vector("pre_activation", *pre_activation, sizes_of(a, b));
  return dtype;
}

// --- ATen's products ----------------------------------------------------------------------------

void note_product(const Tensor& factor) {
  note_choice("the product is the library's: ", factor.is_cuda() ? "cuBLAS" : "oneDNN or MKL");
}

Tensor product_by_aten(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  if (a.dim() == 2) return bias ? at::addmm(*bias, a, b) : at::mm(a, b);
  return bias ? at::baddbmm(*bias, a, b) : at::bmm(a, b);
}

// In the accumulation dtype: no product of ATen's on the CPU is wider than its factors.
Tensor wide_product(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  if (!a.is_cuda() && is_16_bit(a.scalar_type())) {
    note_fallback({op_name, "out", "give float32 factors, or no main_grad"},
                  "the CPU has no product that adds up 16-bit factors in float32: they are copied "
                  "to it");
  }
  const at::ScalarType wide = accumulation_type(a);
  return product_by_aten(a.to(wide), b.to(wide), bias ? OptionalTensor(bias->to(wide)) : bias);
}

Tensor gemm_by_aten(const Tensor& a, const Tensor& b, const GemmOptions& options) {
  note_product(a);
  const bool same = options.out_dtype.value_or(a.scalar_type()) == a.scalar_type();
  const Tensor y = same ? product_by_aten(a, b, options.bias) : wide_product(a, b, options.bias);
  switch (epilogue_from(options.epilogue)) {
    case GemmEpilogue::gelu:
      return at::gelu(y, "tanh");
    case GemmEpilogue::gelu_grad:
      return at::gelu_backward(y, *options.pre_activation, "tanh");
    default:
      return y;
  }
}

// What follows a product that lies in out, step by step. The product had the bias.
void epilogue_by_aten(const GemmOperands& o) {
  Tensor out = o.out, bias_grad = o.bias_grad, pre = o.pre_activation;
  if (o.epilogue == GemmEpilogue::gelu) {
    if (pre.defined()) pre.copy_(out);
    at::gelu_out(out, out, "tanh");
  } else if (o.epilogue == GemmEpilogue::gelu_grad) {
    at::gelu_backward_out(out, out, pre, "tanh");
  }
  if (bias_grad.defined()) {
    bias_grad.copy_(at::sum(o.a, at::IntArrayRef{-1}, false, accumulation_type(o.a)));
  }
}

void product_out_by_aten(const GemmOperands& o) {
  note_product(o.a);
  Tensor out = o.out;
  const OptionalTensor bias = optional(o.bias);
  const at::ScalarType dtype = o.a.scalar_type();
  if (out.scalar_type() != dtype || (o.accumulate && is_16_bit(dtype) && !out.is_cuda())) {
    const Tensor sum = wide_product(o.a, o.b, bias);
    o.accumulate ? out.add_(sum) : out.copy_(sum);
  } else if (o.a.dim() == 3) {
    o.accumulate ? out.baddbmm_(o.a, o.b) : out.copy_(product_by_aten(o.a, o.b, bias));
  } else if (o.accumulate) {
    out.addmm_(o.a, o.b);
  } else if (bias) {
    at::addmm_out(out, *bias, o.a, o.b);
  } else {
    at::mm_out(out, o.a, o.b);
  }
}

// --- cuBLASLt's ---------------------------------------------------------------------------------

// The library knows neither float64 (with its epilogues) nor empty matrices.
bool is_for_library(const Tensor& a, const Tensor& b) {
  const at::ScalarType dtype = a.scalar_type();
  return with_cuda && a.is_cuda() && (dtype == at::kFloat || is_16_bit(dtype)) && a.numel() > 0 &&
         b.numel() > 0;
}

// torch's own setting of what a float32 product may round its factors to.
bool allows_tf32() {
  return !at::NoTF32Guard::should_disable_tf32() &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

// The tensor, or a contiguous copy where neither rows nor columns are adjacent.
Tensor as_matrix(const char* name, const Tensor& tensor) {
  if (!tensor.defined() || matrix_layout(view(tensor))) return tensor;
  return contiguous(op_name, name, tensor);
}

// With strides that the library can read: copies of what has others.
GemmOperands as_matrices(const GemmOperands& o) {
  GemmOperands matrices = o;
  matrices.a = as_matrix("a", o.a);
  matrices.b = as_matrix("b", o.b);
  matrices.out = as_matrix("out", o.out);
  matrices.pre_activation = as_matrix("pre_activation", o.pre_activation);
  if (o.bias.defined()) matrices.bias = contiguous(op_name, "bias", o.bias);
  return matrices;
}

Gemm arguments(const GemmOperands& o) {
  return {.a = view(o.a),
          .b = view(o.b),
          .out = view(o.out),
          .bias = view(o.bias),
          .pre_activation = view(o.pre_activation),
          .bias_grad = view(o.bias_grad),
          .workspace = {},
          .epilogue = o.epilogue,
          .accumulate = o.accumulate,
          .tf32 = o.a.scalar_type() == at::kFloat && allows_tf32()};
}

// False where the library has no algorithm with this epilogue; nothing is written then.
bool run_library([[maybe_unused]] const GemmOperands& operands) {
  if constexpr (with_cuda) {
    const c10::OptionalDeviceGuard guard(operands.a.device());
    const Stream stream = stream_of(operands.a);
    Gemm args = arguments(operands);
    check(args);
    while (true) {
      const std::optional<int64_t> bytes = workspace_bytes(args, stream);
      if (!bytes) return false;
      const at::DataPtr workspace = workspace_of(*bytes);
      args.workspace = {workspace.get(), *bytes};
      if (run(args, stream)) return true;
      TORCH_WARN(op_name, ": an algorithm of cuBLASLt failed for a ", operands.a.sizes(), " and b ",
                 operands.b.sizes(), "; the next of its heuristic's runs");
    }
  }
  return false;
}

void product_by_library(const GemmOperands& o) {
  if (const auto split = split_uneven(o)) {
    note_choice("a size is no multiple of 16 bytes: what is over is a product of its own");
    product_by_library(split->first);
    product_by_library(split->second);
    if (split->sum.defined()) o.accumulate ? o.out.add_(split->sum) : o.out.copy_(split->sum);
    return;
  }
  if (run_library(o)) return;
  const GemmOperands product = {.a = o.a, .b = o.b, .out = o.out, .accumulate = o.accumulate};
  TORCH_CHECK(run_library(product), op_name, ": cuBLASLt has no algorithm for a ", o.a.sizes(),
              " and b ", o.b.sizes(), " of ", o.a.scalar_type());
  if (o.bias.defined()) o.out.add_(o.bias);
  epilogue_by_aten(o);
}

void gemm_out_by_library(const GemmOperands& operands) {
  // For profiles: some callers are below the dispatcher.
  RECORD_FUNCTION("redline::gemm_out", c10::ArrayRef<const c10::IValue>{});
  const GemmOperands o = as_matrices(operands);
  product_by_library(o);
  if (!o.out.is_same(operands.out)) operands.out.copy_(o.out);
  if (o.epilogue == GemmEpilogue::gelu && !o.pre_activation.is_same(operands.pre_activation)) {
    operands.pre_activation.copy_(o.pre_activation);
  }
}

// --- inner ops ----------------------------------------------------------------------------------

Tensor empty_product(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  return at::empty_symint(sizes_of(a, b), a.options().dtype(dtype));
}

Tensor gemm_kernel(const Tensor& a, const Tensor& b, const OptionalTensor& bias,
                   std::string_view epilogue, const OptionalTensor& pre_activation,
                   OptionalType out_dtype) {
  const GemmOptions options{bias, epilogue, pre_activation, out_dtype};
  const at::ScalarType dtype = check_options(a, b, options);
  if (a.is_meta()) return empty_product(a, b, dtype);
  if (!is_for_library(a, b)) return gemm_by_aten(a, b, options);
  const Tensor out = empty_product(a, b, dtype);
  gemm_out_by_library({.a = a,
                       .b = b,
                       .out = out,
                       .bias = value(bias),
                       .pre_activation = value(pre_activation),
                       .epilogue = epilogue_from(epilogue)});
  return out;
}

std::tuple<Tensor, Tensor> gemm_gelu_kernel(const Tensor& a, const Tensor& b,
                                            const OptionalTensor& bias) {
  check_options(a, b, {.bias = bias, .epilogue = "gelu"});
  if (!a.is_meta() && !is_for_library(a, b)) {
    note_product(a);
    const Tensor pre = product_by_aten(a, b, bias);
    return {at::gelu(pre, "tanh"), pre};
  }
  const Tensor out = empty_product(a, b, a.scalar_type()), pre = at::empty_like(out);
  if (a.is_meta()) return {out, pre};
  gemm_out_by_library({.a = a,
                       .b = b,
                       .out = out,
                       .bias = value(bias),
                       .pre_activation = pre,
                       .epilogue = GemmEpilogue::gelu});
  return {out, pre};
}

void gemm_into_kernel(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate,
                      const OptionalTensor& bias_grad) {
  check_factors(a, b);
  const c10::SymDimVector product = sizes_of(a, b);
  const c10::SymIntArrayRef sizes = product;
  TORCH_CHECK(out.sym_sizes() == sizes, op_name, ": out: expected ", sizes, ", not ",
              out.sym_sizes());
  TORCH_CHECK(at::isFloatingType(out.scalar_type()), op_name,
              ": out: expected a floating dtype, not ", out.scalar_type());
  check_devices(op_name, a, {{"out", out}, {"bias_grad", bias_grad}});
  if (bias_grad) {
    TORCH_CHECK(a.dim() == 2 && bias_grad->dim() == 1 && bias_grad->sym_size(0) == a.sym_size(0),
                op_name, ": bias_grad: expected [M] beside a [M, K] ", a.sym_sizes(), ", not ",
                bias_grad->sym_sizes());
    TORCH_CHECK(bias_grad->scalar_type() == out.scalar_type() && bias_grad->is_contiguous(),
                op_name, ": bias_grad: expected contiguous ", out.scalar_type(),
                " as out has, not ", bias_grad->scalar_type());
    bump_versions({*bias_grad});
  }
  bump_versions({out});
  if (a.is_meta()) return;
  gemm_out({.a = a, .b = b, .out = out, .bias_grad = value(bias_grad), .accumulate = accumulate});
}

void implement_inner(torch::Library& m) {
  m.impl("gemm", gemm_kernel);
  m.impl("gemm_gelu", gemm_gelu_kernel);
  m.impl("gemm_into", gemm_into_kernel);
}

}  // namespace

// --- through the dispatcher ---------------------------------------------------------------------

namespace {

// Whether gemm(a, b) is our op, without a derivative. Otherwise it is ATen's, which has one: on the
// CPU, and where autograd records the call, as backward's does when it is to be differentiated.
bool is_gemm_ours(const Tensor& a, const Tensor& b) {
  const bool recorded = at::GradMode::is_enabled() && (a.requires_grad() || b.requires_grad()) &&
                        !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradCUDA);
  return a.is_cuda() && !recorded;
}

}  // namespace

Tensor gemm(const Tensor& a, const Tensor& b, const GemmOptions& options) {
  static const auto op = find_op<decltype(gemm_kernel)>("redline::gemm");
  if (!is_gemm_ours(a, b)) return gemm_by_aten(a, b, options);
  return op.call(a, b, options.bias, options.epilogue, options.pre_activation, options.out_dtype);
}

std::tuple<Tensor, Tensor> gemm_gelu(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  static const auto op = find_op<decltype(gemm_gelu_kernel)>("redline::gemm_gelu");
  return op.call(a, b, bias);
}

void gemm_into(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate,
               const OptionalTensor& bias_grad) {
  static const auto op = find_op<decltype(gemm_into_kernel)>("redline::gemm_into");
  op.call(out, a, b, accumulate, bias_grad);
}

void gemm_out(const GemmOperands& o) {
  const at::ScalarType dtype = o.out.scalar_type();
  if (!is_for_library(o.a, o.b)) {
    product_out_by_aten(o);
    epilogue_by_aten(o);
  } else if (dtype == o.a.scalar_type() || dtype == at::kFloat) {
    gemm_out_by_library(o);
  } else {  // a buffer of a type that the library does not write beside these factors
    note_fallback({op_name, "out", "give it float32 or of the factors' dtype"},
                  "cuBLASLt writes no ", c10::str(dtype), " beside factors of ",
                  c10::str(o.a.scalar_type()), ": a float32 product is copied to it");
    const Tensor sum = at::empty(o.out.sizes(), o.a.options().dtype(at::kFloat));
    const Tensor bias = o.bias.defined() ? o.bias.to(at::kFloat) : o.bias;
    gemm_out_by_library({.a = o.a, .b = o.b, .out = sum, .bias = bias});
    o.accumulate ? o.out.add_(sum) : o.out.copy_(sum);
    epilogue_by_aten(o);
  }
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "gemm(Tensor a, Tensor b, *, Tensor? bias=None, str epilogue=\"none\", "
      "Tensor? pre_activation=None, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "gemm_gelu(Tensor a, Tensor b, *, Tensor? bias=None) -> (Tensor out, Tensor pre_activation)");
  m.def(
      "gemm_into(Tensor(a!) out, Tensor a, Tensor b, *, bool accumulate=True, "
      "Tensor(b!)? bias_grad=None) -> ()");
}

const Registration registration({
    .inner_ops = {"gemm", "gemm_gelu", "gemm_into"},
    .inner = implement_inner,
});

}  // namespace redline::ops
