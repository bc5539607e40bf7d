#include "redline/ops/rotary.h"

#include <algorithm>
#include <array>

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
using enum RotaryForm;

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
  return rotate(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved, packed},
                backward);
}

template <bool backward>
QueryAndKey turn_pair(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& positions, const OptionalTensor& cu_seqlens,
                      bool interleaved, std::string_view layout) {
  return rotate_pair(q, k, {cos, sin, positions, cu_seqlens, layout, {}, interleaved, pair},
                     backward);
}

QueryKeyValue split_qkv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                        int64_t kv_heads, const OptionalTensor& positions,
                        const OptionalTensor& cu_seqlens, bool interleaved,
                        std::string_view layout) {
  const Packing packing = packing_of(heads, kv_heads, split_name);
  return rotate_apart(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved, apart});
}

Tensor join_qkv(const Tensor& q_grad, const Tensor& k_grad, const Tensor& v_grad, const Tensor& cos,
                const Tensor& sin, int64_t heads, int64_t kv_heads, const OptionalTensor& positions,
                const OptionalTensor& cu_seqlens, bool interleaved, std::string_view layout) {
  const Packing packing = packing_of(heads, kv_heads, split_name);
  return rotate_together({q_grad, k_grad, v_grad},
                         {cos, sin, positions, cu_seqlens, layout, packing, interleaved, apart});
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

QueryAndKey call_pair(const Tensor& q, const Tensor& k, const Inputs& in, bool backward) {
  using Signature = decltype(turn_pair<false>);
  static const auto forward_op = find_op<Signature>("redline::rotary_pair_forward");
  static const auto backward_op = find_op<Signature>("redline::rotary_pair_backward");
  return (backward ? backward_op : forward_op)
      .call(q, k, in.cos, in.sin, in.positions, in.cu_seqlens, in.interleaved, in.layout);
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

constexpr std::array<std::string_view, 3> layouts = {"bshd", "sbhd", "thd"};

// One entry, as each costs 0.1 us: interleaved, the layout's place (forward checks that it has
// one), then heads and kv_heads.
void keep(AutogradContext* ctx, const Inputs& in) {
  ctx->save_for_backward({in.cos, in.sin, value(in.positions), value(in.cu_seqlens)});
  const int64_t layout = std::find(layouts.begin(), layouts.end(), in.layout) - layouts.begin();
  ctx->saved_data["node"] = static_cast<int64_t>(in.interleaved) | layout << 1 |
                            in.packing.heads << 3 | in.packing.kv_heads << 32;
}

Inputs kept(AutogradContext* ctx) {
  const variable_list saved = ctx->get_saved_variables();
  const int64_t packed = ctx->saved_data["node"].toInt();
  return {saved[0],
          saved[1],
          optional(saved[2]),
          optional(saved[3]),
          layouts.at(packed >> 1 & 3),
          {packed >> 3 & 0x1fffffff, packed >> 32},
          (packed & 1) != 0};
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

struct PairFunction {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Inputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    keep(ctx, in);
    ctx->set_materialize_grads(false);
    const auto [q_turned, k_turned] = call_pair(q, k, in, /*backward=*/false);
    if (!q.requires_grad()) ctx->mark_non_differentiable({q_turned});
    if (!k.requires_grad()) ctx->mark_non_differentiable({k_turned});
    return {q_turned, k_turned};
  }

  // Of one alone where the other has no gradient or needs none.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Inputs in = kept(ctx);
    const BelowAutograd below(grads);
    const bool of_q = grads[0].defined() && ctx->needs_input_grad(0);
    const bool of_k = grads[1].defined() && ctx->needs_input_grad(1);
    if (of_q && of_k) {
      const auto [q_grad, k_grad] = call_pair(grads[0], grads[1], in, /*backward=*/true);
      return {q_grad, k_grad, Tensor()};
    }
    return {of_q ? call(grads[0], in, /*backward=*/true) : Tensor(),
            of_k ? call(grads[1], in, /*backward=*/true) : Tensor(), Tensor()};
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

void check_given(const Tensor& x, const Inputs& in) {
  TORCH_CHECK(x.defined(), in.op(), ": ", in.tensor(), ": expected a tensor, not None");
  for (const auto& [name, table] : {std::pair{"cos", &in.cos}, std::pair{"sin", &in.sin}}) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && table->requires_grad()), in.op(), ": ", name,
                ": expected a table that needs no gradient, there is none for it");
  }
}

Tensor differentiable(const Tensor& x, const Inputs& in) {
  check_given(x, in);
  return StrictNode<RotaryFunction>::apply(x, in);
}

QueryAndKey differentiable_pair(const Tensor& q, const Tensor& k, const Inputs& in) {
  check_given(q, in);
  const variable_list turned = StrictNode<PairFunction>::apply(q, k, in);
  return {turned[0], turned[1]};
}

QueryKeyValue differentiable_split(const Tensor& qkv, const Inputs& in) {
  check_given(qkv, in);
  const variable_list parts = StrictNode<SplitFunction>::apply(qkv, in);
  return {parts[0], parts[1], parts[2]};
}

Tensor without_derivative(const Tensor& x, const Inputs& in) {
  return rotate(x, in, /*backward=*/false);
}

QueryAndKey pair_without_derivative(const Tensor& q, const Tensor& k, const Inputs& in) {
  return rotate_pair(q, k, in, /*backward=*/false);
}

// The public ops over a function for each kind of result.
template <auto apply, auto apply_pair, auto apply_split>
struct Public {
  static Tensor x(const Tensor& x, const Tensor& cos, const Tensor& sin,
                  const OptionalTensor& positions, bool interleaved, std::string_view layout,
                  const OptionalTensor& cu_seqlens) {
    return apply(x, {cos, sin, positions, cu_seqlens, layout, {}, interleaved});
  }
  static QueryAndKey q_and_k(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                             const OptionalTensor& positions, bool interleaved,
                             std::string_view layout, const OptionalTensor& cu_seqlens) {
    return apply_pair(q, k, {cos, sin, positions, cu_seqlens, layout, {}, interleaved, pair});
  }
  static Tensor qkv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                    int64_t kv_heads, const OptionalTensor& positions, bool interleaved,
                    std::string_view layout, const OptionalTensor& cu_seqlens) {
    const Packing packing = packing_of(heads, kv_heads);
    return apply(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved, packed});
  }
  static QueryKeyValue split(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads,
                             int64_t kv_heads, const OptionalTensor& positions, bool interleaved,
                             std::string_view layout, const OptionalTensor& cu_seqlens) {
    const Packing packing = packing_of(heads, kv_heads, split_name);
    return apply_split(qkv, {cos, sin, positions, cu_seqlens, layout, packing, interleaved, apart});
  }
  static void implement(torch::Library& m) {
    m.impl("rotary", x);
    m.impl("rotary_pair", q_and_k);
    m.impl("qkv_rotary", qkv);
    m.impl("qkv_rotary_split", split);
  }
};

void implement_inner(torch::Library& m) {
  m.impl("rotary_forward", turn<false>);
  m.impl("rotary_backward", turn<true>);
  m.impl("rotary_pair_forward", turn_pair<false>);
  m.impl("rotary_pair_backward", turn_pair<true>);
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

QueryAndKey rotary_pair(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                        const OptionalTensor& positions, bool interleaved, std::string_view layout,
                        const OptionalTensor& cu_seqlens) {
  static const auto op = find_op<decltype(rotary_pair)>("redline::rotary_pair");
  return op.call(q, k, cos, sin, positions, interleaved, layout, cu_seqlens);
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
      "rotary_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions=None, "
      "bool interleaved=False, str layout=\"bshd\", *, Tensor? cu_seqlens=None) "
      "-> (Tensor q_turned, Tensor k_turned)");
  m.def(
      "rotary_pair_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, "
      "Tensor? cu_seqlens, bool interleaved, str layout) -> (Tensor q_turned, Tensor k_turned)");
  m.def(
      "rotary_pair_backward(Tensor q_turned_grad, Tensor k_turned_grad, Tensor cos, Tensor sin, "
      "Tensor? positions, Tensor? cu_seqlens, bool interleaved, str layout) "
      "-> (Tensor q_grad, Tensor k_grad)");
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
    .public_ops = {"rotary", "rotary_pair", "qkv_rotary", "qkv_rotary_split"},
    .inner_ops = {"rotary_forward", "rotary_backward", "rotary_pair_forward",
                  "rotary_pair_backward", "qkv_rotary_forward", "qkv_rotary_backward",
                  "qkv_rotary_split_forward", "qkv_rotary_split_backward"},
    .inner = implement_inner,
    .without_derivative =
        Public<without_derivative, pair_without_derivative, rotate_apart>::implement,
    .differentiable = Public<differentiable, differentiable_pair, differentiable_split>::implement,
});

}  // namespace redline::ops
