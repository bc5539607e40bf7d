#include "redline/ops/rotary.h"

#include "redline/kernels/rotary.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How the heads of x lie: unpacked (heads is 0), or q, k and v in groups.
struct Packing {
  int64_t heads = 0;
  int64_t kv_heads = 0;

  explicit operator bool() const { return heads > 0; }
  int64_t group_heads() const { return heads > 0 ? heads / kv_heads + 2 : 1; }
};

struct Inputs {
  Tensor cos, sin;
  OptionalTensor positions, cu_seqlens;
  std::string_view layout;
  Packing packing;
  bool interleaved;

  const char* op() const { return packing ? "qkv_rotary" : "rotary"; }
  const char* tensor() const { return packing ? "qkv" : "x"; }
  bool packed_sequences() const { return layout == "thd"; }
};

void check_options(const Inputs& in) {
  TORCH_CHECK(in.layout == "bshd" || in.layout == "sbhd" || in.layout == "thd", in.op(),
              ": layout: expected bshd, sbhd or thd, not ", in.layout);
  if (in.packed_sequences()) {
    TORCH_CHECK(in.positions || in.cu_seqlens, in.op(),
                ": cu_seqlens: expected cu_seqlens or positions with layout thd, not neither");
  } else {
    TORCH_CHECK(!in.cu_seqlens, in.op(), ": cu_seqlens: expected none with layout ", in.layout,
                ", only thd has boundaries");
  }
}

void check_inputs(const Tensor& x, const Inputs& in) {
  check_options(in);
  const int64_t rank = (in.packed_sequences() ? 3 : 4) - (in.packing ? 1 : 0);
  TORCH_CHECK(x.dim() == rank, in.op(), ": ", in.tensor(), ": expected a rank of ", rank,
              " with layout ", in.layout, ", not ", x.dim());
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), in.op(), ": ", in.tensor(),
              ": expected a floating dtype, not ", x.scalar_type());
  check_devices(in.op(), x,
                {{"cos", in.cos},
                 {"sin", in.sin},
                 {"positions", value(in.positions)},
                 {"cu_seqlens", value(in.cu_seqlens)}});
}

// [outer, inner, heads, head_dim] of x or y: packed heads taken apart, thd under an outer of 1.
TensorView view_tokens(const Tensor& tensor, const Inputs& in) {
  TensorView result = view(tensor);
  if (in.packing) {
    const int64_t heads = in.packing.kv_heads * in.packing.group_heads();
    const int last = result.rank++ - 1;
    TORCH_CHECK(result.sizes[last] % heads == 0, in.op(), ": qkv: expected a last axis of ", heads,
                " heads, not ", result.sizes[last]);
    result.sizes[last + 1] = result.sizes[last] / heads;
    result.strides[last + 1] = result.strides[last];
    result.sizes[last] = heads;
    result.strides[last] *= result.sizes[last + 1];
  }
  if (in.packed_sequences()) {
    for (int i = result.rank++; i > 0; --i) {
      result.sizes[i] = result.sizes[i - 1];
      result.strides[i] = result.strides[i - 1];
    }
    result.sizes[0] = 1;
  }
  return result;
}

// [outer, inner] of positions [seq], [batch, seq], [1, seq] or [tokens], by strides alone.
TensorView view_positions(const Inputs& in, const TensorView& x) {
  if (!in.positions) return {};
  TensorView result = view(*in.positions);
  const int sequence_axis = in.layout == "sbhd" ? 0 : 1, batch_axis = 1 - sequence_axis;
  const int64_t length = x.sizes[sequence_axis], batch = x.sizes[batch_axis];
  const int last = result.rank - 1;
  const bool one_row = result.rank == 1 || (result.rank == 2 && result.sizes[0] == 1);
  const bool fits = (one_row || (result.rank == 2 && result.sizes[0] == batch)) &&
                    result.sizes[last] == length && !(in.packed_sequences() && result.rank != 1);
  TORCH_CHECK(fits, in.op(), ": positions: expected [", length, "]",
              in.packed_sequences()
                  ? std::string()
                  : " or [" + std::to_string(batch) + ", " + std::to_string(length) + "]",
              ", not ", in.positions->sizes());
  const int64_t batch_stride = one_row ? 0 : result.strides[0], stride = result.strides[last];
  result.rank = 2;
  result.sizes[sequence_axis] = length;
  result.strides[sequence_axis] = stride;
  result.sizes[batch_axis] = batch;
  result.strides[batch_axis] = batch_stride;
  return result;
}

// x, or the gradient of y when backward, turned.
Tensor rotate(const Tensor& x, const Inputs& in, bool backward) {
  check_inputs(x, in);
  Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  if (x.is_meta()) return y;
  const bool adjacent = x.stride(-1) == 1 || x.size(-1) <= 1;
  const Tensor source = adjacent ? x : x.contiguous();
  const Tensor cos = in.cos.contiguous(), sin = in.sin.contiguous();
  const OptionalTensor cu_seqlens = contiguous(in.cu_seqlens);
  const TensorView tokens = view_tokens(source, in);
  const Rotary args{.x = tokens,
                    .cos = view(cos),
                    .sin = view(sin),
                    .positions = view_positions(in, tokens),
                    .cu_seqlens = view(cu_seqlens),
                    .y = view_tokens(y, in),
                    .sequence_axis = in.layout == "sbhd" ? 0 : 1,
                    .group_heads = in.packing.group_heads(),
                    .rotated_heads = in.packing ? in.packing.group_heads() - 1 : 1,
                    .interleaved = in.interleaved,
                    .backward = backward};
  if (run_on_cuda(x, args)) return y;
  check_positions(args);
  parallel_ranges(tokens.sizes[0] * tokens.sizes[1],
                  rows_per_task(tokens.sizes[2] * tokens.sizes[3]),
                  [&](Range range) { run(args, range); });
  return y;
}

Packing packing_of(int64_t heads, int64_t kv_heads) {
  TORCH_CHECK(kv_heads >= 1 && heads >= 1,
              "qkv_rotary: kv_heads: expected heads and kv_heads of 1 ", "or more, not ", heads,
              " and ", kv_heads);
  TORCH_CHECK(heads % kv_heads == 0, "qkv_rotary: kv_heads: expected a divisor of heads, ", heads,
              ", not ", kv_heads);
  return {heads, kv_heads};
}

// --- inner ops ----------------------------------------------------------------------------------

template <bool backward>
Tensor turn(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
            const OptionalTensor& cu_seqlens, bool interleaved, std::string_view layout) {
  return rotate(x, {cos, sin, positions, cu_seqlens, layout, {}, interleaved}, backward);
}

template <bool backward>
Tensor turn_qkv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                int64_t kv_heads, const OptionalTensor& positions, const OptionalTensor& cu_seqlens,
                bool interleaved, std::string_view layout) {
  const Packing packing = packing_of(heads, kv_heads);
  return rotate(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved}, backward);
}

// Through the dispatcher, so that tracing sees the inner ops.
Tensor call(const Tensor& x, const Inputs& in, bool backward) {
  if (in.packing) {
    using Signature = decltype(turn_qkv<false>);
    static const auto forward_op = find_op<Signature>("redline::qkv_rotary_forward");
    static const auto backward_op = find_op<Signature>("redline::qkv_rotary_backward");
    return (backward ? backward_op : forward_op)
        .call(x, in.cos, in.sin, in.packing.heads, in.packing.kv_heads, in.positions, in.cu_seqlens,
              in.interleaved, in.layout);
  }
  using Signature = decltype(turn<false>);
  static const auto forward_op = find_op<Signature>("redline::rotary_forward");
  static const auto backward_op = find_op<Signature>("redline::rotary_backward");
  return (backward ? backward_op : forward_op)
      .call(x, in.cos, in.sin, in.positions, in.cu_seqlens, in.interleaved, in.layout);
}

// --- derivative ---------------------------------------------------------------------------------

struct RotaryFunction : public torch::autograd::Function<RotaryFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Inputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({in.cos, in.sin, value(in.positions), value(in.cu_seqlens)});
    ctx->saved_data["layout"] = std::string(in.layout);
    ctx->saved_data["heads"] = in.packing.heads;
    ctx->saved_data["kv_heads"] = in.packing.kv_heads;
    ctx->saved_data["interleaved"] = in.interleaved;
    return call(x, in, /*backward=*/false);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::string layout = ctx->saved_data["layout"].toStringRef();
    const Inputs in{saved[0],
                    saved[1],
                    optional(saved[2]),
                    optional(saved[3]),
                    layout,
                    {ctx->saved_data["heads"].toInt(), ctx->saved_data["kv_heads"].toInt()},
                    ctx->saved_data["interleaved"].toBool()};
    return {call(grads[0], in, /*backward=*/true), Tensor()};
  }
};

Tensor differentiable(const Tensor& x, const Inputs& in) {
  for (const auto& [name, table] : {std::pair{"cos", &in.cos}, std::pair{"sin", &in.sin}}) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && table->requires_grad()), in.op(), ": ", name,
                ": expected a table that needs no gradient, there is none for it");
  }
  return RotaryFunction::apply(x, in);
}

Tensor without_derivative(const Tensor& x, const Inputs& in) {
  return rotate(x, in, /*backward=*/false);
}

// The public ops over `apply`.
template <auto apply>
struct Public {
  static Tensor x(const Tensor& x, const Tensor& cos, const Tensor& sin,
                  const OptionalTensor& positions, bool interleaved, std::string_view layout,
                  const OptionalTensor& cu_seqlens) {
    return apply(x, {cos, sin, positions, cu_seqlens, layout, {}, interleaved});
  }
  static Tensor qkv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                    int64_t kv_heads, const OptionalTensor& positions, bool interleaved,
                    std::string_view layout, const OptionalTensor& cu_seqlens) {
    const Packing packing = packing_of(heads, kv_heads);
    return apply(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved});
  }
  static void implement(torch::Library& m) {
    m.impl("rotary", x);
    m.impl("qkv_rotary", qkv);
  }
};

void implement_inner(torch::Library& m) {
  m.impl("rotary_forward", turn<false>);
  m.impl("rotary_backward", turn<true>);
  m.impl("qkv_rotary_forward", turn_qkv<false>);
  m.impl("qkv_rotary_backward", turn_qkv<true>);
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& positions, bool interleaved, std::string_view layout,
              const OptionalTensor& cu_seqlens) {
  static const auto op = find_op<decltype(rotary)>("redline::rotary");
  return op.call(x, cos, sin, positions, interleaved, layout, cu_seqlens);
}

Tensor qkv_rotary(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                  int64_t kv_heads, const OptionalTensor& positions, bool interleaved,
                  std::string_view layout, const OptionalTensor& cu_seqlens) {
  static const auto op = find_op<decltype(qkv_rotary)>("redline::qkv_rotary");
  return op.call(qkv, cos, sin, heads, kv_heads, positions, interleaved, layout, cu_seqlens);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, bool interleaved=False, "
      "str layout=\"bshd\", *, Tensor? cu_seqlens=None) -> Tensor");
  m.def(
      "qkv_rotary(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads, "
      "Tensor? positions=None, bool interleaved=False, str layout=\"bshd\", *, "
      "Tensor? cu_seqlens=None) -> Tensor");
  m.def(
      "rotary_forward(Tensor x, Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens, "
      "bool interleaved, str layout) -> Tensor");
  m.def(
      "rotary_backward(Tensor y_grad, Tensor cos, Tensor sin, Tensor? positions, "
      "Tensor? cu_seqlens, bool interleaved, str layout) -> Tensor");
  m.def(
      "qkv_rotary_forward(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads, "
      "Tensor? positions, Tensor? cu_seqlens, bool interleaved, str layout) -> Tensor");
  m.def(
      "qkv_rotary_backward(Tensor y_grad, Tensor cos, Tensor sin, int heads, int kv_heads, "
      "Tensor? positions, Tensor? cu_seqlens, bool interleaved, str layout) -> Tensor");
}

const Registration registration({
    .public_ops = {"rotary", "qkv_rotary"},
    .inner_ops = {"rotary_forward", "rotary_backward", "qkv_rotary_forward", "qkv_rotary_backward"},
    .inner = implement_inner,
    .without_derivative = Public<without_derivative>::implement,
    .differentiable = Public<differentiable>::implement,
});

}  // namespace redline::ops
