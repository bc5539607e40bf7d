#include "redline/ops/cross_entropy.h"

#include "redline/ops/cross_entropy_inner.h"
#include "redline/ops/cross_entropy_promise.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext, torch::autograd::variable_list;

constexpr const char* op_name = "cross_entropy";

// What is given beside the loss.
struct Wanted {
  bool log_sum_exp = false, predictions = false;
};

struct Forward {
  Tensor loss, log_sum_exp, count, statistics, predictions;
};

void check_inputs(const Tensor& logits, const Tensor& targets, const CrossEntropyOptions& options,
                  Wanted wanted) {
  check_loss_inputs(logits, targets);
  check_options(op_name, options);
  check_loss_scale(op_name, targets, options);
  TORCH_CHECK(!options.loss_scale || !wanted.log_sum_exp, op_name,
              ": loss_scale: expected none with log_sum_exp, whose upstream gradient is not "
              "promised");
}

Forward call_forward(const Tensor& logits, const Tensor& targets,
                     const CrossEntropyOptions& options, Wanted wanted) {
  Tensor statistics, predictions;
  if (wanted.predictions) {
    std::tie(statistics, predictions) = call_statistics_with_predictions(logits, targets, options);
  } else {
    statistics = call_statistics(logits, targets, options, wanted.log_sum_exp);
  }
  const auto [loss, lse, count] = call_loss(statistics, targets, logits.sym_size(-1), options);
  return {loss, lse, count, statistics, predictions};
}

// {loss}, and what else is wanted, in the order of Wanted.
variable_list results_of(const Forward& out, Wanted wanted) {
  variable_list results = {out.loss};
  if (wanted.log_sum_exp) results.push_back(out.log_sum_exp);
  if (wanted.predictions) results.push_back(out.predictions);
  return results;
}

// --- derivative ---------------------------------------------------------------------------------

void check_overwritable(const Tensor& logits) {
  if (!logits.requires_grad() || is_traced(logits)) return;
  const bool of_leaf = logits.is_leaf() || (logits.is_view() && logits._base().is_leaf() &&
                                            logits._base().requires_grad());
  TORCH_CHECK(!of_leaf, op_name,
              ": inplace_backward: expected logits that an op computed, not a leaf tensor, whose "
              "values the gradient would replace");
}

struct CrossEntropyFunction {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets,
                               const CrossEntropyOptions& options, Wanted wanted) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Forward out = call_forward(logits, targets, options, wanted);
    save_options(ctx, options);
    ctx->saved_data["with_log_sum_exp"] = wanted.log_sum_exp;
    const bool mean = options.reduction == "mean";
    ctx->save_for_backward({logits, targets, out.statistics, mean ? out.count : Tensor()});
    ctx->set_materialize_grads(false);
    if (wanted.predictions) ctx->mark_non_differentiable({out.predictions});
    return results_of(out, wanted);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &targets = saved[1], &statistics = saved[2];
    const Tensor lse_grad = ctx->saved_data["with_log_sum_exp"].toBool() ? grads[1] : Tensor();
    if (!grads[0].defined() && !lse_grad.defined()) return {Tensor(), Tensor(), Tensor(), Tensor()};
    const Tensor loss_grad = grads[0].defined() ? grads[0] : at::zeros({}, statistics.options());
    const CrossEntropyOptions options = saved_options(ctx);
    const bool inplace = options.inplace_backward && !is_traced(logits);
    TORCH_CHECK(!inplace || !at::GradMode::is_enabled(), op_name,
                ": inplace_backward: expected a backward without create_graph");
    const Tensor logits_grad = call_gradient(logits,
                                             {targets, statistics, loss_grad, optional(lse_grad),
                                              optional(saved[3]), 0, logits.sym_size(-1), options},
                                             inplace);
    return {logits_grad, Tensor(), Tensor(), Tensor()};
  }
};

// Under options.loss_scale: what is kept is the gradient.
struct PromisedCrossEntropyFunction {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets,
                               const CrossEntropyOptions& options, Wanted wanted) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool inplace = options.inplace_backward && !is_traced(logits);
    const auto [statistics, kept, predictions] = call_promise(
        logits, targets, options, {.inplace = inplace, .predictions = wanted.predictions});
    ctx->save_for_backward({kept, *options.loss_scale});
    if (wanted.predictions) ctx->mark_non_differentiable({predictions});
    const auto [loss, lse, count] = call_loss(statistics, targets, logits.sym_size(-1), options);
    return results_of({loss, lse, count, statistics, predictions}, wanted);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), op_name,
                ": loss_scale: expected a backward without create_graph");
    const variable_list saved = ctx->get_saved_variables();
    return {call_fulfil(saved[0], grads[0], saved[1], is_given_away(saved[0])), Tensor(), Tensor(),
            Tensor()};
  }
};

variable_list without_derivative(const Tensor& logits, const Tensor& targets,
                                 const CrossEntropyOptions& options, Wanted wanted) {
  check_inputs(logits, targets, options, wanted);
  return results_of(call_forward(logits, targets, options, wanted), wanted);
}

variable_list differentiable(const Tensor& logits, const Tensor& targets,
                             const CrossEntropyOptions& options, Wanted wanted) {
  check_inputs(logits, targets, options, wanted);
  if (options.inplace_backward) check_overwritable(logits);
  if (!options.loss_scale) {
    return StrictNode<CrossEntropyFunction>::apply(logits, targets, options, wanted);
  }
  if (logits.requires_grad() && at::GradMode::is_enabled()) {
    return StrictNode<PromisedCrossEntropyFunction>::apply(logits, targets, options, wanted);
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // no gradient: the promise costs nothing
  return without_derivative(logits, targets, options, wanted);
}

CrossEntropyOptions options_from(std::string_view reduction, int64_t ignore_index,
                                 double label_smoothing, double z_loss,
                                 std::optional<double> logit_softcap, bool inplace_backward,
                                 const std::optional<Tensor>& loss_scale) {
  return {std::string(reduction), ignore_index,     label_smoothing, z_loss,
          logit_softcap,          inplace_backward, loss_scale};
}

// The public ops of one dispatch key, in the form of their schemas.
template <variable_list (*Run)(const Tensor&, const Tensor&, const CrossEntropyOptions&, Wanted)>
struct Public {
  static Tensor loss(const Tensor& logits, const Tensor& targets, std::string_view reduction,
                     int64_t ignore_index, double label_smoothing, double z_loss,
                     std::optional<double> logit_softcap, bool inplace_backward,
                     const std::optional<Tensor>& loss_scale) {
    return Run(logits, targets,
               options_from(reduction, ignore_index, label_smoothing, z_loss, logit_softcap,
                            inplace_backward, loss_scale),
               {})[0];
  }
  static std::tuple<Tensor, Tensor> with_log_sum_exp(
      const Tensor& logits, const Tensor& targets, std::string_view reduction, int64_t ignore_index,
      double label_smoothing, double z_loss, std::optional<double> logit_softcap,
      bool inplace_backward, const std::optional<Tensor>& loss_scale) {
    const variable_list out = Run(logits, targets,
                                  options_from(reduction, ignore_index, label_smoothing, z_loss,
                                               logit_softcap, inplace_backward, loss_scale),
                                  {.log_sum_exp = true});
    return {out[0], out[1]};
  }
  static std::tuple<Tensor, Tensor, Tensor> with_predictions(
      const Tensor& logits, const Tensor& targets, std::string_view reduction, int64_t ignore_index,
      double label_smoothing, double z_loss, std::optional<double> logit_softcap,
      bool inplace_backward, const std::optional<Tensor>& loss_scale, bool with_log_sum_exp) {
    const variable_list out = Run(logits, targets,
                                  options_from(reduction, ignore_index, label_smoothing, z_loss,
                                               logit_softcap, inplace_backward, loss_scale),
                                  {.log_sum_exp = with_log_sum_exp, .predictions = true});
    return {out[0], with_log_sum_exp ? out[1] : no_output(out[0]), out.back()};
  }
  static void implement(torch::Library& m) {
    m.impl("cross_entropy", loss);
    m.impl("cross_entropy_with_log_sum_exp", with_log_sum_exp);
    m.impl("cross_entropy_with_predictions", with_predictions);
  }
};

}  // namespace

// --- public ops ---------------------------------------------------------------------------------

Tensor cross_entropy(const Tensor& logits, const Tensor& targets,
                     const CrossEntropyOptions& options) {
  static const auto op = find_op<decltype(Public<differentiable>::loss)>("redline::cross_entropy");
  return op.call(logits, targets, options.reduction, options.ignore_index, options.label_smoothing,
                 options.z_loss, options.logit_softcap, options.inplace_backward,
                 options.loss_scale);
}

std::tuple<Tensor, Tensor> cross_entropy_with_log_sum_exp(const Tensor& logits,
                                                          const Tensor& targets,
                                                          const CrossEntropyOptions& options) {
  static const auto op = find_op<decltype(Public<differentiable>::with_log_sum_exp)>(
      "redline::cross_entropy_with_log_sum_exp");
  return op.call(logits, targets, options.reduction, options.ignore_index, options.label_smoothing,
                 options.z_loss, options.logit_softcap, options.inplace_backward,
                 options.loss_scale);
}

CrossEntropyPredicted cross_entropy_with_predictions(const Tensor& logits, const Tensor& targets,
                                                     const CrossEntropyOptions& options,
                                                     bool with_log_sum_exp) {
  static const auto op = find_op<decltype(Public<differentiable>::with_predictions)>(
      "redline::cross_entropy_with_predictions");
  const auto [loss, log_sum_exp, predictions] =
      op.call(logits, targets, options.reduction, options.ignore_index, options.label_smoothing,
              options.z_loss, options.logit_softcap, options.inplace_backward, options.loss_scale,
              with_log_sum_exp);
  return {loss, log_sum_exp, predictions};
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor targets, str reduction=\"mean\", "
      "int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, "
      "float? logit_softcap=None, *, bool inplace_backward=False, Tensor? loss_scale=None) -> "
      "Tensor");
  m.def(
      "cross_entropy_with_log_sum_exp(Tensor logits, Tensor targets, str reduction=\"mean\", "
      "int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, "
      "float? logit_softcap=None, *, bool inplace_backward=False, Tensor? loss_scale=None) "
      "-> (Tensor loss, Tensor log_sum_exp)");
  m.def(
      "cross_entropy_with_predictions(Tensor logits, Tensor targets, str reduction=\"mean\", "
      "int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, "
      "float? logit_softcap=None, *, bool inplace_backward=False, Tensor? loss_scale=None, "
      "bool with_log_sum_exp=False) -> (Tensor loss, Tensor log_sum_exp, Tensor predictions)");
}

// Autocast: 16-bit logits are read as they are. The float32 copy that stock cross entropy makes is
// the cost.
const Registration registration({
    .public_ops = {"cross_entropy", "cross_entropy_with_log_sum_exp",
                   "cross_entropy_with_predictions"},
    .without_derivative = Public<without_derivative>::implement,
    .differentiable = Public<differentiable>::implement,
});

}  // namespace redline::ops
