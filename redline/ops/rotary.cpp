#include "redline/ops/rotary.h"

#include "redline/ops/below_autograd.h"
#include "redline/ops/registration.h"
#include "redline/ops/rotary_run.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Inputs = RotaryInputs;
using Packing = RotaryPacking;

Packing packing_of(int64_t heads, int64_t kv_heads, const char* op = "qkv_rotary") {
  TORCH_CHECK(kv_heads >= 1 && heads >= 1, op,
              ": kv_heads: expected heads and kv_heads of 1 or more, not ", heads, " and ",
              kv_heads);
  TORCH_CHECK(heads % kv_heads == 0, op, ": kv_heads: expected a divisor of heads, ", heads,
              ", not ", kv_heads);
  return {heads, kv_heads};
}

constexpr const char* split_name = "qkv_rotary_split";

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

QueryKeyValue split_qkv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                        int64_t kv_heads, const OptionalTensor& positions,
                        const OptionalTensor& cu_seqlens, bool interleaved,
                        std::string_view layout) {
  const Packing packing = packing_of(heads, kv_heads, split_name);
  return rotate_apart(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved, true});
}

Tensor join_qkv(const Tensor& q_grad, const Tensor& k_grad, const Tensor& v_grad, const Tensor& cos,
                const Tensor& sin, int64_t heads, int64_t kv_heads, const OptionalTensor& positions,
                const OptionalTensor& cu_seqlens, bool interleaved, std::string_view layout) {
  const Packing packing = packing_of(heads, kv_heads, split_name);
  return rotate_together({q_grad, k_grad, v_grad},
                         {cos, sin, positions, cu_seqlens, layout, packing, interleaved, true});
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

QueryKeyValue call_split(const Tensor& qkv, const Inputs& in) {
  static const auto op = find_op<decltype(split_qkv)>("redline::qkv_rotary_split_forward");
  return op.call(qkv, in.cos, in.sin, in.packing.heads, in.packing.kv_heads, in.positions,
                 in.cu_seqlens, in.interleaved, in.layout);
}

Tensor call_join(const variable_list& grads, const Inputs& in) {
  static const auto op = find_op<decltype(join_qkv)>("redline::qkv_rotary_split_backward");
  return op.call(grads[0], grads[1], grads[2], in.cos, in.sin, in.packing.heads,
                 in.packing.kv_heads, in.positions, in.cu_seqlens, in.interleaved, in.layout);
}

// --- derivative ---------------------------------------------------------------------------------

void keep(AutogradContext* ctx, const Inputs& in) {
  ctx->save_for_backward({in.cos, in.sin, value(in.positions), value(in.cu_seqlens)});
  ctx->saved_data["layout"] = std::string(in.layout);
  ctx->saved_data["heads"] = in.packing.heads;
  ctx->saved_data["kv_heads"] = in.packing.kv_heads;
  ctx->saved_data["interleaved"] = in.interleaved;
  ctx->saved_data["split"] = in.split;
}

// The layout's text stays ctx's.
Inputs kept(AutogradContext* ctx) {
  const variable_list saved = ctx->get_saved_variables();
  return {saved[0],
          saved[1],
          optional(saved[2]),
          optional(saved[3]),
          ctx->saved_data["layout"].toStringRef(),
          {ctx->saved_data["heads"].toInt(), ctx->saved_data["kv_heads"].toInt()},
          ctx->saved_data["interleaved"].toBool(),
          ctx->saved_data["split"].toBool()};
}

struct RotaryFunction {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Inputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    keep(ctx, in);
    return call(x, in, /*backward=*/false);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Inputs in = kept(ctx);
    const BelowAutograd below(grads);
    return {call(grads[0], in, /*backward=*/true), Tensor()};
  }
};

struct SplitFunction {
  static variable_list forward(AutogradContext* ctx, const Tensor& qkv, const Inputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    keep(ctx, in);
    const auto [q, k, v] = call_split(qkv, in);
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Inputs in = kept(ctx);
    const BelowAutograd below(grads);
    return {call_join(grads, in), Tensor()};
  }
};

void check_tables(const Inputs& in) {
  for (const auto& [name, table] : {std::pair{"cos", &in.cos}, std::pair{"sin", &in.sin}}) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && table->requires_grad()), in.op(), ": ", name,
                ": expected a table that needs no gradient, there is none for it");
  }
}

Tensor differentiable(const Tensor& x, const Inputs& in) {
  check_tables(in);
  return StrictNode<RotaryFunction>::apply(x, in);
}

QueryKeyValue differentiable_split(const Tensor& qkv, const Inputs& in) {
  check_tables(in);
  const variable_list parts = StrictNode<SplitFunction>::apply(qkv, in);
  return {parts[0], parts[1], parts[2]};
}

Tensor without_derivative(const Tensor& x, const Inputs& in) {
  return rotate(x, in, /*backward=*/false);
}

// The public ops over `apply` and `apply_split`.
template <auto apply, auto apply_split>
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
  static QueryKeyValue split(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                             int64_t kv_heads, const OptionalTensor& positions, bool interleaved,
                             std::string_view layout, const OptionalTensor& cu_seqlens) {
    const Packing packing = packing_of(heads, kv_heads, split_name);
    return apply_split(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved, true});
  }
  static void implement(torch::Library& m) {
    m.impl("rotary", x);
    m.impl("qkv_rotary", qkv);
    m.impl("qkv_rotary_split", split);
  }
};

void implement_inner(torch::Library& m) {
  m.impl("rotary_forward", turn<false>);
  m.impl("rotary_backward", turn<true>);
  m.impl("qkv_rotary_forward", turn_qkv<false>);
  m.impl("qkv_rotary_backward", turn_qkv<true>);
  m.impl("qkv_rotary_split_forward", split_qkv);
  m.impl("qkv_rotary_split_backward", join_qkv);
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

QueryKeyValue qkv_rotary_split(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                               int64_t heads, int64_t kv_heads, const OptionalTensor& positions,
                               bool interleaved, std::string_view layout,
                               const OptionalTensor& cu_seqlens) {
  static const auto op = find_op<decltype(qkv_rotary_split)>("redline::qkv_rotary_split");
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
  m.def(
      "qkv_rotary_split(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads, "
      "Tensor? positions=None, bool interleaved=False, str layout=\"bshd\", *, "
      "Tensor? cu_seqlens=None) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "qkv_rotary_split_forward(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads, "
      "Tensor? positions, Tensor? cu_seqlens, bool interleaved, str layout) "
      "-> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "qkv_rotary_split_backward(Tensor q_grad, Tensor k_grad, Tensor v_grad, Tensor cos, "
      "Tensor sin, int heads, int kv_heads, Tensor? positions, Tensor? cu_seqlens, "
      "bool interleaved, str layout) -> Tensor");
}

const Registration registration({
    .public_ops = {"rotary", "qkv_rotary", "qkv_rotary_split"},
    .inner_ops = {"rotary_forward", "rotary_backward", "qkv_rotary_forward", "qkv_rotary_backward",
                  "qkv_rotary_split_forward", "qkv_rotary_split_backward"},
    .inner = implement_inner,
    .without_derivative = Public<without_derivative, rotate_apart>::implement,
    .differentiable = Public<differentiable, differentiable_split>::implement,
});

}  // namespace redline::ops
