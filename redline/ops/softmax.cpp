#include "redline/ops/softmax.h"

#include "redline/kernels/softmax.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* op_name = "softmax";

c10::SymInt heads_of(const Tensor& scores) {
  return scores.dim() >= 3 ? scores.sym_size(-3) : c10::SymInt(1);
}

void check_inputs(const Tensor& scores, const OptionalTensor& mask, const OptionalTensor& sink,
                  std::optional<int64_t> window) {
  TORCH_CHECK(scores.dim() >= 1, op_name,
              ": scores: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(scores.scalar_type()), op_name,
              ": scores: expected a floating dtype, not ", scores.scalar_type());
  check_devices(op_name, scores, {{"mask", mask}, {"sink", sink}});
  TORCH_CHECK(!window || *window >= 1, op_name, ": window: expected 1 or more keys, not ",
              window.value_or(0));
  if (mask) {
    TORCH_CHECK(mask->scalar_type() == at::kBool, op_name, ": mask: expected bool, not ",
                mask->scalar_type());
    bool fits = mask->dim() <= scores.dim();
    for (int64_t i = 1; fits && i <= mask->dim(); ++i) {
      fits = mask->sym_size(-i) == 1 || mask->sym_size(-i) == scores.sym_size(-i);
    }
    TORCH_CHECK(fits, op_name, ": mask: expected a shape that broadcasts to ", scores.sym_sizes(),
                ", not ", mask->sym_sizes());
  }
  if (sink) {
    TORCH_CHECK(at::isFloatingType(sink->scalar_type()), op_name,
                ": sink: expected a floating dtype, not ", sink->scalar_type());
    TORCH_CHECK(sink->dim() == 1 && sink->sym_size(0) == heads_of(scores), op_name,
                ": sink: expected [", heads_of(scores), "], not ", sink->sym_sizes());
  }
}

// [batch, heads, queries, keys] of a tensor with the scores' sizes.
Tensor with_four_axes(const Tensor& tensor) {
  const auto size = [&](int64_t axis) { return tensor.dim() >= axis ? tensor.size(-axis) : 1; };
  const int64_t inner = size(1) * size(2) * size(3);
  return tensor.reshape({inner == 0 ? 0 : tensor.numel() / inner, size(3), size(2), size(1)});
}

SoftmaxRows rows_of(const Tensor& scores, double scale) {
  return {.heads = scores.dim() >= 3 ? scores.size(-3) : 1,
          .queries = scores.dim() >= 2 ? scores.size(-2) : 1,
          .scale = scale};
}

Tensor empty_rows(const Tensor& scores, bool needed) {
  if (!needed) return no_output(scores);
  return at::empty_symint(scores.sym_sizes().slice(0, scores.dim() - 1),
                          scores.options().dtype(accumulation_type(scores)));
}

// --- inner ops ----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> softmax_forward(const Tensor& scores, const OptionalTensor& mask,
                                           double scale, bool causal, std::optional<int64_t> window,
                                           const OptionalTensor& sink) {
  check_inputs(scores, mask, sink, window);
  const Tensor probabilities = empty_contiguous(scores);
  const Tensor sink_probability = empty_rows(scores, sink.has_value());
  if (scores.is_meta() || scores.numel() == 0) return {probabilities, sink_probability};
  const Tensor rows = with_rows(op_name, "scores", scores);
  const Tensor excluded = mask ? with_four_axes(mask->expand_as(scores)) : Tensor();
  if (mask && excluded.const_data_ptr() != mask->const_data_ptr())
    note_copy(op_name, "mask", *mask);
  OptionalTensor sinks = sink;
  if (sinks) sinks = sinks->to(accumulation_type(scores)).contiguous();
  const SoftmaxForward args{
      .shape = rows_of(scores, scale),
      .scores = view_rows(rows),
      .mask = view(excluded),
      .sink = view(sinks),
      .probabilities = view_rows(probabilities),
      .sink_probability = sink ? view(sink_probability.view({-1})) : TensorView{},
      .window = window.value_or(0),
      .causal = causal};
  run_rows(scores, args, args.scores.sizes[0], args.scores.sizes[1]);
  return {probabilities, sink_probability};
}

std::tuple<Tensor, Tensor> softmax_backward(const Tensor& probabilities_grad,
                                            const Tensor& probabilities,
                                            const OptionalTensor& sink_probability, double scale,
                                            bool causal, std::optional<int64_t> window) {
  const Tensor scores_grad = empty_contiguous(probabilities);
  const auto options = probabilities.options().dtype(accumulation_type(probabilities));
  const Tensor sink_grad = sink_probability ? at::empty_symint({heads_of(probabilities)}, options)
                                            : no_output(probabilities);
  if (probabilities.is_meta()) return {scores_grad, sink_grad};
  if (probabilities.numel() == 0) return {scores_grad, sink_grad.zero_()};
  const Tensor grad_rows = with_rows(op_name, "probabilities_grad", probabilities_grad),
               rows = with_rows(op_name, "probabilities", probabilities);
  const Tensor sink_rows = sink_probability ? at::empty_like(*sink_probability) : Tensor();
  const SoftmaxBackward args{
      .shape = rows_of(probabilities, scale),
      .probabilities_grad = view_rows(grad_rows),
      .probabilities = view_rows(rows),
      .sink_probability = sink_probability ? view(sink_probability->view({-1})) : TensorView{},
      .scores_grad = view_rows(scores_grad),
      .sink_rows = sink_probability ? view(sink_rows.view({-1})) : TensorView{},
      .sink_grad = sink_probability ? view(sink_grad) : TensorView{},
      .window = window.value_or(0),
      .causal = causal};
  run_rows(probabilities, args, args.probabilities.sizes[0], args.probabilities.sizes[1]);
  if (sink_probability && !probabilities.is_cuda()) {
    parallel_ranges(args.shape.heads, 1, "head", [&](Range heads) { finish(args, heads); });
  }
  return {scores_grad, sink_grad};
}

// Through the dispatcher, so that tracing sees the inner ops.
std::tuple<Tensor, Tensor> call_forward(const Tensor& scores, const OptionalTensor& mask,
                                        const OptionalTensor& sink, const SoftmaxOptions& options) {
  static const auto op = find_op<decltype(softmax_forward)>("redline::softmax_forward");
  return op.call(scores, mask, options.scale, options.causal, options.window, sink);
}

// --- derivative ---------------------------------------------------------------------------------

struct SoftmaxFunction {
  static Tensor forward(AutogradContext* ctx, const Tensor& scores, const OptionalTensor& mask,
                        const OptionalTensor& sink, const SoftmaxOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [probabilities, sink_probability] = call_forward(scores, mask, sink, options);
    ctx->save_for_backward({probabilities, sink ? sink_probability : Tensor()});
    ctx->saved_data["scale"] = options.scale;
    ctx->saved_data["causal"] = options.causal;
    ctx->saved_data["window"] = options.window;
    ctx->saved_data["has_mask"] = mask.has_value();
    if (sink) ctx->saved_data["sink_dtype"] = sink->scalar_type();
    return probabilities;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<decltype(softmax_backward)>("redline::softmax_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto [scores_grad, sink_grad] = op.call(
        grads[0], saved[0], optional(saved[1]), ctx->saved_data["scale"].toDouble(),
        ctx->saved_data["causal"].toBool(), ctx->saved_data["window"].toOptional<int64_t>());
    Tensor sinks;
    if (saved[1].defined()) sinks = sink_grad.to(ctx->saved_data["sink_dtype"].toScalarType());
    return {scores_grad, Tensor(), sinks, Tensor()};
  }
};

Tensor differentiable(const Tensor& scores, const OptionalTensor& mask, double scale, bool causal,
                      std::optional<int64_t> window, const OptionalTensor& sink) {
  TORCH_CHECK(scores.defined(), op_name, ": scores: expected a tensor, not None");
  return StrictNode<SoftmaxFunction>::apply(scores, mask, sink,
                                            SoftmaxOptions{scale, causal, window});
}

Tensor without_derivative(const Tensor& scores, const OptionalTensor& mask, double scale,
                          bool causal, std::optional<int64_t> window, const OptionalTensor& sink) {
  return std::get<0>(call_forward(scores, mask, sink, {scale, causal, window}));
}

// torch runs softmax in float32 under CUDA autocast.
Tensor in_float32(const Tensor& scores, const OptionalTensor& mask, double scale, bool causal,
                  std::optional<int64_t> window, const OptionalTensor& sink) {
  const c10::impl::ExcludeDispatchKeyGuard off(c10::DispatchKey::AutocastCUDA);
  return softmax(at::autocast::cached_cast(at::kFloat, scores, c10::DeviceType::CUDA), mask, sink,
                 {scale, causal, window});
}

void implement_inner(torch::Library& m) {
  m.impl("softmax_forward", softmax_forward);
  m.impl("softmax_backward", softmax_backward);
}

}  // namespace

// --- public op ----------------------------------------------------------------------------------

Tensor softmax(const Tensor& scores, const OptionalTensor& mask, const OptionalTensor& sink,
               const SoftmaxOptions& options) {
  static const auto op = find_op<decltype(differentiable)>("redline::softmax");
  return op.call(scores, mask, options.scale, options.causal, options.window, sink);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "softmax(Tensor scores, Tensor? mask=None, float scale=1.0, bool causal=False, "
      "int? window=None, Tensor? sink=None) -> Tensor");
  m.def(
      "softmax_forward(Tensor scores, Tensor? mask, float scale, bool causal, int? window, "
      "Tensor? sink) -> (Tensor probabilities, Tensor sink_probability)");
  m.def(
      "softmax_backward(Tensor probabilities_grad, Tensor probabilities, "
      "Tensor? sink_probability, float scale, bool causal=False, int? window=None) "
      "-> (Tensor scores_grad, Tensor sink_grad)");
}

const Registration registration({
    .public_ops = {"softmax"},
    .inner_ops = {"softmax_forward", "softmax_backward"},
    .inner = implement_inner,
    .without_derivative = [](torch::Library& m) { m.impl("softmax", without_derivative); },
    .differentiable = [](torch::Library& m) { m.impl("softmax", differentiable); },
    .autocast_cuda = [](torch::Library& m) { m.impl("softmax", in_float32); },
});

}  // namespace redline::ops
