#include "redline/ops/cross_entropy_promise.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>

#include "redline/kernels/cross_entropy.h"
#include "redline/ops/cross_entropy_inner.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;

constexpr const char* op_name = "cross_entropy";

// What a promise writes; predictions where they are defined.
struct Promise {
  Tensor statistics, logits_grad, predictions;
};

// The gradient may go over the logits. Both come from with_rows().
void write_promise(const Tensor& logits, const Tensor& targets, const Promise& out,
                   const CrossEntropyOptions& options) {
  const Tensor rows = flat_targets(op_name, targets);
  const auto type = accumulation_type(logits);
  Tensor loss_scale, count;
  if (options.reduction == "mean") {
    count = mean_divisor(rows, options.ignore_index, type).view({1});
  }
  const CrossEntropyPromise args{
      .logits = view_rows(logits),
      .targets = view(rows),
      .loss_scale = row_values(*options.loss_scale, rows.numel(), type, loss_scale),
      .count = view(count),
      .statistics = view(out.statistics),
      .logits_grad = view_rows(out.logits_grad),
      .ignore_index = options.ignore_index,
      .label_smoothing = options.label_smoothing,
      .z_loss = options.z_loss,
      .softcap = options.logit_softcap.value_or(0),
      .predictions = out.predictions.defined() ? view(out.predictions.view({-1})) : TensorView{}};
  if (!logits.is_cuda()) {  // before anything is written
    check_targets(op_name, args.targets, args.logits.sizes[1], options.ignore_index);
  }
  run_rows(logits, args, args.logits.sizes[0], args.logits.sizes[1]);
}

CrossEntropyOptions promised_options(const Tensor& loss_scale, std::string_view reduction,
                                     int64_t ignore_index, double label_smoothing, double z_loss,
                                     std::optional<double> logit_softcap) {
  return {.reduction = std::string(reduction),
          .ignore_index = ignore_index,
          .label_smoothing = label_smoothing,
          .z_loss = z_loss,
          .logit_softcap = logit_softcap,
          .loss_scale = loss_scale};
}

Promise promise(const Tensor& logits, const Tensor& targets, const Tensor& predictions,
                const CrossEntropyOptions& options) {
  check_loss_inputs(logits, targets);
  const Promise out = {empty_statistics(logits, targets, options.label_smoothing != 0),
                       empty_contiguous(logits), predictions};
  if (!logits.is_meta()) {
    write_promise(with_rows(op_name, "logits", logits), targets, out, options);
  }
  return out;
}

Promise promise_inplace(Tensor& logits, const Tensor& targets, const Tensor& predictions,
                        const CrossEntropyOptions& options) {
  check_loss_inputs(logits, targets);
  at::assert_no_internal_overlap(logits);
  Promise out = {empty_statistics(logits, targets, options.label_smoothing != 0), {}, predictions};
  if (!logits.is_meta()) {
    const Tensor rows =
        with_rows(op_name, "logits", logits);  // a copy where the layout asks for one
    out.logits_grad = rows;
    write_promise(rows, targets, out, options);
    if (!rows.is_same(logits)) logits.copy_(rows);
  }
  bump_version(logits);
  return out;
}

// {statistics, logits_grad}
std::tuple<Tensor, Tensor> cross_entropy_promise(const Tensor& logits, const Tensor& targets,
                                                 const Tensor& loss_scale,
                                                 std::string_view reduction, int64_t ignore_index,
                                                 double label_smoothing, double z_loss,
                                                 std::optional<double> logit_softcap) {
  const Promise out = promise(logits, targets, {},
                              promised_options(loss_scale, reduction, ignore_index, label_smoothing,
                                               z_loss, logit_softcap));
  return {out.statistics, out.logits_grad};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_promise_with_predictions(
    const Tensor& logits, const Tensor& targets, const Tensor& loss_scale,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double z_loss,
    std::optional<double> logit_softcap) {
  const Promise out = promise(logits, targets, empty_predictions(targets),
                              promised_options(loss_scale, reduction, ignore_index, label_smoothing,
                                               z_loss, logit_softcap));
  return {out.statistics, out.logits_grad, out.predictions};
}

Tensor cross_entropy_promise_inplace(Tensor& logits, const Tensor& targets,
                                     const Tensor& loss_scale, std::string_view reduction,
                                     int64_t ignore_index, double label_smoothing, double z_loss,
                                     std::optional<double> logit_softcap) {
  return promise_inplace(logits, targets, {},
                         promised_options(loss_scale, reduction, ignore_index, label_smoothing,
                                          z_loss, logit_softcap))
      .statistics;
}

// {statistics, predictions}
std::tuple<Tensor, Tensor> cross_entropy_promise_inplace_with_predictions(
    Tensor& logits, const Tensor& targets, const Tensor& loss_scale, std::string_view reduction,
    int64_t ignore_index, double label_smoothing, double z_loss,
    std::optional<double> logit_softcap) {
  const Promise out = promise_inplace(logits, targets, empty_predictions(targets),
                                      promised_options(loss_scale, reduction, ignore_index,
                                                       label_smoothing, z_loss, logit_softcap));
  return {out.statistics, out.predictions};
}

Tensor cross_entropy_fulfil(const Tensor& kept, const Tensor& loss_grad, const Tensor& loss_scale) {
  Tensor out = empty_contiguous(kept);
  if (!kept.is_meta()) at::mul_out(out, kept, kept_ratio(op_name, loss_grad, loss_scale));
  return out;
}

void cross_entropy_fulfil_inplace(Tensor& kept, const Tensor& loss_grad, const Tensor& loss_scale) {
  fulfil_inplace(op_name, kept, loss_grad, loss_scale);
}

void implement(torch::Library& m) {
  m.impl("cross_entropy_promise", cross_entropy_promise);
  m.impl("cross_entropy_promise_inplace", cross_entropy_promise_inplace);
  m.impl("cross_entropy_promise_with_predictions", cross_entropy_promise_with_predictions);
  m.impl("cross_entropy_promise_inplace_with_predictions",
         cross_entropy_promise_inplace_with_predictions);
  m.impl("cross_entropy_fulfil", cross_entropy_fulfil);
  m.impl("cross_entropy_fulfil_inplace", cross_entropy_fulfil_inplace);
}

}  // namespace

void check_loss_scale(const char* op, const Tensor& targets, const CrossEntropyOptions& options) {
  if (!options.loss_scale) return;
  const Tensor& scale = *options.loss_scale;
  check_devices(op, targets, {{"loss_scale", scale}});
  TORCH_CHECK(at::isFloatingType(scale.scalar_type()), op,
              ": loss_scale: expected a floating dtype, not ", scale.scalar_type());
  const bool none = options.reduction == "none";
  const bool per_target = none && scale.sym_sizes() == targets.sym_sizes();
  TORCH_CHECK(scale.dim() == 0 || per_target, op, ": loss_scale: expected a scalar",
              none ? ", or one number per target" : "", ", not ", scale.sym_sizes());
}

Tensor mean_divisor(const Tensor& targets, int64_t ignore_index, at::ScalarType dtype) {
  if (!targets.is_cuda() || dtype != at::kFloat || targets.numel() > counted_rows) {
    return targets.ne(ignore_index).sum(dtype);
  }
  Tensor count = at::empty({}, targets.options().dtype(dtype));
  run_on_cuda(targets, CrossEntropyCount{.targets = view(targets),
                                         .count = view(count.view({1})),
                                         .ignore_index = ignore_index});
  return count;
}

Tensor kept_ratio(const char* op, const Tensor& loss_grad, const Tensor& loss_scale) {
  const Tensor scale = loss_scale.to(loss_grad.scalar_type());
  const Tensor same = loss_grad.eq(scale);
  if (loss_grad.dim() == 0) return (loss_grad / scale).masked_fill_(same, 1).view({1});
  const Tensor all = same.all();
  TORCH_CHECK(
      loss_grad.is_cuda() || all.item<bool>(), op,
      ": loss_scale: expected the upstream gradient that was promised for every target, not "
      "another; without loss_scale any is right");
  return at::full({}, NAN, loss_grad.options()).masked_fill_(all, 1).view({1});
}

bool is_traced(const Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::Python) ||
         tensor.key_set().has(c10::DispatchKey::Functionalize) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool is_given_away(const Tensor& kept) {
  return !is_traced(kept) && !torch::autograd::get_current_graph_task_keep_graph();
}

namespace {

// A scalar's ratio is the kernel's own; of one number per target it is computed here.
void rescale(const char* op, Tensor& kept, const Tensor& loss_grad, const Tensor& loss_scale) {
  const auto type = accumulation_type(kept);
  const bool scalar = loss_grad.dim() == 0;
  const Tensor given =
      (scalar ? loss_grad : kept_ratio(op, loss_grad, loss_scale)).to(type).reshape({1});
  const Tensor promised = scalar ? loss_scale.to(loss_grad.scalar_type()).to(type).view({1})
                                 : at::ones({1}, given.options());
  const Tensor rows = with_rows(op, "kept", kept);
  run_on_cuda(
      kept, CrossEntropyRescale{
                .logits_grad = view_rows(rows), .given = view(given), .promised = view(promised)});
  if (!rows.is_same(kept)) kept.copy_(rows);
}

}  // namespace

// On CUDA, where nothing is read back, the kernel sees that there is nothing to do.
void fulfil_inplace(const char* op, Tensor& kept, const Tensor& loss_grad,
                    const Tensor& loss_scale) {
  if (kept.is_cuda()) {
    rescale(op, kept, loss_grad, loss_scale);
  } else if (!kept.is_meta()) {
    const Tensor ratio = kept_ratio(op, loss_grad, loss_scale).to(accumulation_type(kept));
    if (ratio.item<double>() != 1) kept.mul_(ratio);
  }
  bump_version(kept);
}

CrossEntropyPromised call_promise(Tensor logits, const Tensor& targets,
                                  const CrossEntropyOptions& o, CrossEntropyPromiseForm form) {
  const auto call = [&](const auto& op) {
    return op.call(logits, targets, *o.loss_scale, o.reduction, o.ignore_index, o.label_smoothing,
                   o.z_loss, o.logit_softcap);
  };
  if (form.inplace && form.predictions) {
    static const auto op = find_op<decltype(cross_entropy_promise_inplace_with_predictions)>(
        "redline::cross_entropy_promise_inplace_with_predictions");
    const auto [statistics, predictions] = call(op);
    return {statistics, logits, predictions};
  }
  if (form.inplace) {
    static const auto op =
        find_op<decltype(cross_entropy_promise_inplace)>("redline::cross_entropy_promise_inplace");
    return {call(op), logits, {}};
  }
  if (form.predictions) {
    static const auto op = find_op<decltype(cross_entropy_promise_with_predictions)>(
        "redline::cross_entropy_promise_with_predictions");
    const auto [statistics, logits_grad, predictions] = call(op);
    return {statistics, logits_grad, predictions};
  }
  static const auto op = find_op<decltype(cross_entropy_promise)>("redline::cross_entropy_promise");
  const auto [statistics, logits_grad] = call(op);
  return {statistics, logits_grad, {}};
}

Tensor call_fulfil(Tensor kept, const Tensor& loss_grad, const Tensor& loss_scale, bool inplace) {
  static const auto find_inplace =
      find_op<decltype(cross_entropy_fulfil_inplace)>("redline::cross_entropy_fulfil_inplace");
  static const auto find = find_op<decltype(cross_entropy_fulfil)>("redline::cross_entropy_fulfil");
  if (!inplace) return find.call(kept, loss_grad, loss_scale);
  find_inplace.call(kept, loss_grad, loss_scale);
  return kept.detach();
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  const std::string rest =
      " logits, Tensor targets, Tensor loss_scale, str reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float? logit_softcap) -> ";
  const auto define = [&](const std::string& name, const std::string& results) {
    m.def((name + rest + results).c_str());
  };
  define("cross_entropy_promise(Tensor", "(Tensor statistics, Tensor logits_grad)");
  define("cross_entropy_promise_inplace(Tensor(a!)", "Tensor");
  define("cross_entropy_promise_with_predictions(Tensor",
         "(Tensor statistics, Tensor logits_grad, Tensor predictions)");
  define("cross_entropy_promise_inplace_with_predictions(Tensor(a!)",
         "(Tensor statistics, Tensor predictions)");
  m.def("cross_entropy_fulfil(Tensor kept, Tensor loss_grad, Tensor loss_scale) -> Tensor");
  m.def("cross_entropy_fulfil_inplace(Tensor(a!) kept, Tensor loss_grad, Tensor loss_scale) -> ()");
}

const Registration registration({
    .inner_ops = {"cross_entropy_promise", "cross_entropy_promise_inplace",
                  "cross_entropy_promise_with_predictions",
                  "cross_entropy_promise_inplace_with_predictions", "cross_entropy_fulfil",
                  "cross_entropy_fulfil_inplace"},
    .inner = implement,
});

}  // namespace redline::ops
