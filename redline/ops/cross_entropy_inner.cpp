#include "redline/ops/cross_entropy_inner.h"

#include <ATen/MemoryOverlap.h>

#include <cmath>

#include "redline/kernels/cross_entropy.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;

constexpr const char* op_name = "cross_entropy";

Reduction reduction_from(const char* op, std::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "mean") return Reduction::mean;
  TORCH_CHECK(name == "sum", op, ": reduction: expected none, mean or sum, not ", name);
  return Reduction::sum;
}

// --- inner ops ----------------------------------------------------------------------------------

// `args` says what the tensors do not.
void write_statistics(const Tensor& logits, const Tensor& targets, const Tensor& statistics,
                      const Tensor& predictions, CrossEntropyStatistics args) {
  const Tensor logit_rows = with_rows(op_name, "logits", logits),
               rows = flat_targets(op_name, targets);
  args.logits = view_rows(logit_rows);
  args.targets = view(rows);
  args.statistics = view(statistics);
  if (predictions.defined()) args.predictions = view(predictions.view({-1}));
  run_rows(logits, args, args.logits.sizes[0], args.logits.sizes[1]);
}

Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& targets,
                                c10::SymInt vocab_start, std::optional<double> logit_softcap,
                                std::optional<int64_t> ignore_index, bool with_sum) {
  check_loss_inputs(logits, targets);
  const Tensor statistics = empty_statistics(logits, targets, with_sum);
  if (logits.is_meta()) return statistics;
  CrossEntropyStatistics args{};
  args.vocab_start = vocab_start.expect_int();
  args.ignore_index = ignore_index.value_or(0);
  args.softcap = logit_softcap.value_or(0);
  args.skip_ignored = ignore_index.has_value();
  write_statistics(logits, targets, statistics, {}, args);
  return statistics;
}

// Of every row. Slices of a vocabulary merge by the maximum, the first of equal ones, which is the
// logits' own where there is no softcap; a NaN shows in the sum of exponentials.
std::tuple<Tensor, Tensor> cross_entropy_statistics_with_predictions(
    const Tensor& logits, const Tensor& targets, c10::SymInt vocab_start,
    std::optional<double> logit_softcap, bool with_sum) {
  check_loss_inputs(logits, targets);
  const Tensor statistics = empty_statistics(logits, targets, with_sum);
  const Tensor predictions = empty_predictions(targets);
  if (logits.is_meta()) return {statistics, predictions};
  CrossEntropyStatistics args{};
  args.vocab_start = vocab_start.expect_int();
  args.softcap = logit_softcap.value_or(0);
  write_statistics(logits, targets, statistics, predictions, args);
  return {statistics, predictions};
}

// {loss, log_sum_exp, count}; count is what a mean was divided by.
std::tuple<Tensor, Tensor, Tensor> cross_entropy_loss(const Tensor& statistics,
                                                      const Tensor& targets, c10::SymInt vocabulary,
                                                      std::string_view reduction_name,
                                                      int64_t ignore_index, double label_smoothing,
                                                      double z_loss) {
  const Reduction reduction = reduction_from(op_name, reduction_name);
  const bool reduced = reduction != Reduction::none;
  const auto options = statistics.options();
  const Tensor log_sum_exp = at::empty_symint(targets.sym_sizes(), options);
  const Tensor loss =
      reduced ? at::empty({}, options) : at::empty_symint(targets.sym_sizes(), options);
  const Tensor count = reduced ? at::empty({}, options) : no_output(statistics);
  if (statistics.is_meta()) return {loss, log_sum_exp, count};
  const Tensor rows = flat_targets(op_name, targets);
  const Tensor row_loss = reduced ? at::empty({rows.numel()}, options) : loss.view({-1});
  const Tensor partial = reduced && statistics.is_cuda()
                             ? at::empty({loss_chunks(rows.numel()), 2}, options)
                             : Tensor();
  const CrossEntropyLoss args{.statistics = view(statistics),
                              .targets = view(rows),
                              .row_loss = view(row_loss),
                              .log_sum_exp = view(log_sum_exp.view({-1})),
                              .loss = reduced ? view(loss.view({1})) : TensorView{},
                              .count = reduced ? view(count.view({1})) : TensorView{},
                              .partial = view(partial),
                              .vocabulary = vocabulary.expect_int(),
                              .ignore_index = ignore_index,
                              .label_smoothing = label_smoothing,
                              .z_loss = z_loss,
                              .reduction = reduction};
  if (!statistics.is_cuda()) check_targets(op_name, args.targets, args.vocabulary, ignore_index);
  if (run_on_cuda(statistics, args)) return {loss, log_sum_exp, count};
  parallel_ranges(rows.numel(), 4096, "rows", [&](Range range) { run(args, range); });
  if (reduced) finish(args);
  return {loss, log_sum_exp, count};
}

void write_gradient(const Tensor& logits, const Tensor& logits_grad,
                    const CrossEntropyUpstream& in) {
  const Tensor rows = flat_targets(op_name, in.targets);
  const auto type = accumulation_type(logits);
  Tensor loss_grad;
  OptionalTensor lse_grad = in.log_sum_exp_grad;
  if (lse_grad) lse_grad = lse_grad->to(type).reshape({-1}).contiguous();
  const OptionalTensor count = in.count ? OptionalTensor(in.count->view({1})) : std::nullopt;
  const CrossEntropyGradient args{
      .logits = view_rows(logits),
      .targets = view(rows),
      .statistics = view(in.statistics),
      .loss_grad = row_values(in.loss_grad, rows.numel(), type, loss_grad),
      .log_sum_exp_grad = view(lse_grad),
      .count = view(count),
      .logits_grad = view_rows(logits_grad),
      .vocab_start = in.vocab_start.expect_int(),
      .vocabulary = in.vocabulary.expect_int(),
      .ignore_index = in.options.ignore_index,
      .label_smoothing = in.options.label_smoothing,
      .z_loss = in.options.z_loss,
      .softcap = in.options.logit_softcap.value_or(0)};
  run_rows(logits, args, args.logits.sizes[0], args.logits.sizes[1]);
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& targets, const Tensor& statistics,
                              const Tensor& loss_grad, const OptionalTensor& log_sum_exp_grad,
                              const OptionalTensor& count, c10::SymInt vocab_start,
                              c10::SymInt vocabulary, int64_t ignore_index, double label_smoothing,
                              double z_loss, std::optional<double> logit_softcap) {
  check_loss_inputs(logits, targets);
  const Tensor logits_grad = empty_contiguous(logits);
  if (logits.is_meta()) return logits_grad;
  const CrossEntropyOptions formula = {"", ignore_index, label_smoothing, z_loss, logit_softcap};
  write_gradient(
      with_rows(op_name, "logits", logits), logits_grad,
      {targets, statistics, loss_grad, log_sum_exp_grad, count, vocab_start, vocabulary, formula});
  return logits_grad;
}

void cross_entropy_gradient_inplace(Tensor& logits, const Tensor& targets, const Tensor& statistics,
                                    const Tensor& loss_grad, const OptionalTensor& log_sum_exp_grad,
                                    const OptionalTensor& count, c10::SymInt vocab_start,
                                    c10::SymInt vocabulary, int64_t ignore_index,
                                    double label_smoothing, double z_loss,
                                    std::optional<double> logit_softcap) {
  check_loss_inputs(logits, targets);
  at::assert_no_internal_overlap(logits);
  bump_version(logits);
  if (logits.is_meta()) return;
  const Tensor rows = with_rows(op_name, "logits", logits);  // a copy where the layout asks for one
  const CrossEntropyOptions formula = {"", ignore_index, label_smoothing, z_loss, logit_softcap};
  write_gradient(
      rows, rows,
      {targets, statistics, loss_grad, log_sum_exp_grad, count, vocab_start, vocabulary, formula});
  if (!rows.is_same(logits)) logits.copy_(rows);
}

void implement(torch::Library& m) {
  m.impl("cross_entropy_statistics", cross_entropy_statistics);
  m.impl("cross_entropy_statistics_with_predictions", cross_entropy_statistics_with_predictions);
  m.impl("cross_entropy_loss", cross_entropy_loss);
  m.impl("cross_entropy_gradient", cross_entropy_gradient);
  m.impl("cross_entropy_gradient_inplace", cross_entropy_gradient_inplace);
}

}  // namespace

Tensor empty_statistics(const Tensor& logits, const Tensor& targets, bool with_sum) {
  return at::empty_symint({targets.sym_numel(), with_sum ? 4 : 3},
                          logits.options().dtype(accumulation_type(logits)));
}

Tensor empty_predictions(const Tensor& targets) {
  return at::empty_symint(targets.sym_sizes(), targets.options().dtype(at::kLong));
}

void bump_version(const Tensor& tensor) {
  if (!tensor.is_inference()) torch::autograd::impl::bump_version(tensor);
}

TensorView row_values(const Tensor& given, int64_t rows, at::ScalarType dtype, Tensor& flat) {
  flat = given.to(dtype).reshape({-1}).contiguous();
  TensorView result = view(flat);
  if (given.dim() == 0) {
    result.sizes[0] = rows;
    result.strides[0] = 0;
  }
  return result;
}

void check_loss_inputs(const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK(logits.dim() >= 1, op_name,
              ": logits: expected at least one dimension, not a scalar");
  TORCH_CHECK(at::isFloatingType(logits.scalar_type()), op_name,
              ": logits: expected a floating dtype, not ", logits.scalar_type());
  TORCH_CHECK(targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt, op_name,
              ": targets: expected classes as int64 or int32 (soft targets are not built), not ",
              targets.scalar_type());
  const auto rows = logits.sym_sizes().slice(0, logits.dim() - 1);
  TORCH_CHECK(targets.sym_sizes() == rows, op_name, ": targets: expected ", rows, ", not ",
              targets.sym_sizes());
  check_devices(op_name, logits, {{"targets", targets}});
}

void check_options(const char* op, const CrossEntropyOptions& options) {
  reduction_from(op, options.reduction);
  TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, op,
              ": label_smoothing: expected a number of [0, 1], not ", options.label_smoothing);
  TORCH_CHECK(options.z_loss >= 0 && std::isfinite(options.z_loss), op,
              ": z_loss: expected a finite number of 0 or more, not ", options.z_loss);
  TORCH_CHECK(!options.logit_softcap || *options.logit_softcap > 0, op,
              ": logit_softcap: expected more than 0, not ", *options.logit_softcap);
}

void save_options(AutogradContext* ctx, const CrossEntropyOptions& options) {
  ctx->saved_data["reduction"] = options.reduction;
  ctx->saved_data["ignore_index"] = options.ignore_index;
  ctx->saved_data["label_smoothing"] = options.label_smoothing;
  ctx->saved_data["z_loss"] = options.z_loss;
  ctx->saved_data["logit_softcap"] = options.logit_softcap;
  ctx->saved_data["inplace_backward"] = options.inplace_backward;
}

CrossEntropyOptions saved_options(AutogradContext* ctx) {
  auto& data = ctx->saved_data;
  return {data["reduction"].toStringRef(),
          data["ignore_index"].toInt(),
          data["label_smoothing"].toDouble(),
          data["z_loss"].toDouble(),
          data["logit_softcap"].toOptional<double>(),
          data["inplace_backward"].toBool()};
}

Tensor call_statistics(const Tensor& logits, const Tensor& targets,
                       const CrossEntropyOptions& options, bool every_row) {
  static const auto op =
      find_op<decltype(cross_entropy_statistics)>("redline::cross_entropy_statistics");
  const auto skipped = every_row ? std::nullopt : std::optional(options.ignore_index);
  return op.call(logits, targets, 0, options.logit_softcap, skipped, options.label_smoothing != 0);
}

std::tuple<Tensor, Tensor> call_statistics_with_predictions(const Tensor& logits,
                                                            const Tensor& targets,
                                                            const CrossEntropyOptions& options) {
  static const auto op = find_op<decltype(cross_entropy_statistics_with_predictions)>(
      "redline::cross_entropy_statistics_with_predictions");
  return op.call(logits, targets, 0, options.logit_softcap, options.label_smoothing != 0);
}

std::tuple<Tensor, Tensor, Tensor> call_loss(const Tensor& statistics, const Tensor& targets,
                                             c10::SymInt vocabulary,
                                             const CrossEntropyOptions& options) {
  static const auto op = find_op<decltype(cross_entropy_loss)>("redline::cross_entropy_loss");
  return op.call(statistics, targets, std::move(vocabulary), options.reduction,
                 options.ignore_index, options.label_smoothing, options.z_loss);
}

Tensor call_gradient(Tensor logits, const CrossEntropyUpstream& in, bool inplace) {
  static const auto find_inplace =
      find_op<decltype(cross_entropy_gradient_inplace)>("redline::cross_entropy_gradient_inplace");
  static const auto find =
      find_op<decltype(cross_entropy_gradient)>("redline::cross_entropy_gradient");
  const auto call = [&](const auto& op) {
    return op.call(logits, in.targets, in.statistics, in.loss_grad, in.log_sum_exp_grad, in.count,
                   in.vocab_start, in.vocabulary, in.options.ignore_index,
                   in.options.label_smoothing, in.options.z_loss, in.options.logit_softcap);
  };
  if (!inplace) return call(find);
  call(find_inplace);
  return logits.detach();
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "cross_entropy_statistics(Tensor logits, Tensor targets, SymInt vocab_start=0, "
      "float? logit_softcap=None, int? ignore_index=None, bool with_sum=False) -> Tensor");
  m.def(
      "cross_entropy_statistics_with_predictions(Tensor logits, Tensor targets, "
      "SymInt vocab_start=0, float? logit_softcap=None, bool with_sum=False) "
      "-> (Tensor statistics, Tensor predictions)");
  m.def(
      "cross_entropy_loss(Tensor statistics, Tensor targets, SymInt vocabulary, str reduction, "
      "int ignore_index, float label_smoothing, float z_loss) "
      "-> (Tensor loss, Tensor log_sum_exp, Tensor count)");
  m.def(
      "cross_entropy_gradient(Tensor logits, Tensor targets, Tensor statistics, "
      "Tensor loss_grad, Tensor? log_sum_exp_grad, Tensor? count, SymInt vocab_start, "
      "SymInt vocabulary, int ignore_index, float label_smoothing, float z_loss, "
      "float? logit_softcap) -> Tensor");
  m.def(
      "cross_entropy_gradient_inplace(Tensor(a!) logits, Tensor targets, Tensor statistics, "
      "Tensor loss_grad, Tensor? log_sum_exp_grad, Tensor? count, SymInt vocab_start, "
      "SymInt vocabulary, int ignore_index, float label_smoothing, float z_loss, "
      "float? logit_softcap) -> ()");
}

const Registration registration({
    .inner_ops = {"cross_entropy_statistics", "cross_entropy_statistics_with_predictions",
                  "cross_entropy_loss", "cross_entropy_gradient", "cross_entropy_gradient_inplace"},
    .inner = implement,
});

}  // namespace redline::ops
