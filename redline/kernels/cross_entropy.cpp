#include "redline/kernels/cross_entropy.h"

#include <limits>

#include "redline/core/dispatch.h"
#include "redline/kernels/cpu/cross_entropy.h"
#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/operands.h"

namespace redline {
namespace {

constexpr const char* op = "cross_entropy";

void check_logits(const TensorView& logits) {
  REDLINE_CHECK(logits.rank == 2, op, ": logits: expected [rows, vocabulary], not ", logits);
  check_rows(op, "logits", logits, logits.sizes[0], logits.sizes[1]);
  check_floating(op, "logits", logits);
}

void check_target_vector(const TensorView& targets, int64_t rows) {
  check_values(op, "targets", targets, rows, DType::int64);
}

void check_statistics(const TensorView& statistics, int64_t rows, DType dtype) {
  REDLINE_CHECK(statistics.rank == 2 && statistics.sizes[0] == rows &&
                    (statistics.sizes[1] == 3 || statistics.sizes[1] == 4) && is_rows(statistics),
                op, ": statistics: expected [", rows, ", 3 or 4], not ", statistics);
  REDLINE_CHECK(statistics.dtype == dtype, op, ": statistics: expected ", dtype, ", not ",
                statistics.dtype);
}

// Slices of a vocabulary are merged by the statistics' maximum, which a softcap rounds: logits that
// are not the largest may share it.
void check_predictions(const CrossEntropyStatistics& args, int64_t rows) {
  check_values(op, "predictions", args.predictions, rows, DType::int64);
  REDLINE_CHECK(!args.skip_ignored, op, ": predictions: expected every row to be read");
  REDLINE_CHECK(args.softcap == 0 || args.vocab_start == 0, op,
                ": predictions: expected no logit_softcap with a vocab_start, not ", args.softcap);
  REDLINE_CHECK(rows == 0 || args.logits.sizes[1] > 0, op,
                ": predictions: expected at least one class, not logits of ", args.logits);
}

void check_softcap(double softcap) {
  REDLINE_CHECK(softcap >= 0, op, ": logit_softcap: expected more than 0, not ", softcap);
}

void check_smoothing(double label_smoothing, const TensorView& statistics) {
  REDLINE_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op,
                ": label_smoothing: expected a number of [0, 1], not ", label_smoothing);
  REDLINE_CHECK(label_smoothing == 0 || statistics.sizes[1] == 4, op,
                ": statistics: expected [rows, 4], with the sum of the logits, for label "
                "smoothing, not ",
                statistics);
}

void check_z_loss(double z_loss) {
  REDLINE_CHECK(z_loss >= 0 && z_loss < std::numeric_limits<double>::infinity(), op,
                ": z_loss: expected a finite number of 0 or more, not ", z_loss);
}

const cpu::CrossEntropyKernels& kernels() {
  return cpu::choose(cpu::baseline::cross_entropy_kernels, cpu::avx2::cross_entropy_kernels,
                     cpu::avx512::cross_entropy_kernels);
}

}  // namespace

void check(const CrossEntropyStatistics& args) {
  check_logits(args.logits);
  const int64_t rows = args.logits.sizes[0];
  check_target_vector(args.targets, rows);
  check_statistics(args.statistics, rows, accumulation_dtype(args.logits.dtype));
  check_softcap(args.softcap);
  if (args.predictions) check_predictions(args, rows);
}

void check(const CrossEntropyLoss& args) {
  const int64_t rows = args.statistics.sizes[0];
  const DType dtype = args.statistics.dtype;
  check_statistics(args.statistics, rows, dtype);
  check_target_vector(args.targets, rows);
  check_values(op, "row_loss", args.row_loss, rows, dtype);
  check_values(op, "log_sum_exp", args.log_sum_exp, rows, dtype);
  if (args.reduction != Reduction::none) {
    check_values(op, "loss", args.loss, 1, dtype);
    check_values(op, "count", args.count, 1, dtype);
  }
  check_smoothing(args.label_smoothing, args.statistics);
  check_z_loss(args.z_loss);
}

void check(const CrossEntropyGradient& args) {
  check_logits(args.logits);
  const int64_t rows = args.logits.sizes[0];
  const DType dtype = accumulation_dtype(args.logits.dtype);
  check_target_vector(args.targets, rows);
  check_statistics(args.statistics, rows, dtype);
  REDLINE_CHECK(
      args.loss_grad.rank == 1 && args.loss_grad.sizes[0] == rows && args.loss_grad.dtype == dtype,
      op, ": loss_grad: expected [", rows, "] ", dtype, ", not ", args.loss_grad);
  if (args.log_sum_exp_grad) {
    check_values(op, "log_sum_exp_grad", args.log_sum_exp_grad, rows, dtype);
  }
  if (args.count) check_values(op, "count", args.count, 1, dtype);
  check_rows(op, "logits_grad", args.logits_grad, rows, args.logits.sizes[1]);
  REDLINE_CHECK(args.logits_grad.dtype == args.logits.dtype, op, ": logits_grad: expected ",
                args.logits.dtype, ", not ", args.logits_grad.dtype);
  check_softcap(args.softcap);
  check_z_loss(args.z_loss);
}

CrossEntropyStatistics statistics_of(const CrossEntropyPromise& args) {
  return {.logits = args.logits,
          .targets = args.targets,
          .statistics = args.statistics,
          .ignore_index = args.ignore_index,
          .softcap = args.softcap,
          .skip_ignored = !args.predictions,
          .predictions = args.predictions};
}

CrossEntropyGradient gradient_of(const CrossEntropyPromise& args) {
  return {.logits = args.logits,
          .targets = args.targets,
          .statistics = args.statistics,
          .loss_grad = args.loss_scale,
          .log_sum_exp_grad = {},
          .count = args.count,
          .logits_grad = args.logits_grad,
          .vocabulary = args.logits.sizes[1],
          .ignore_index = args.ignore_index,
          .label_smoothing = args.label_smoothing,
          .z_loss = args.z_loss,
          .softcap = args.softcap};
}

void check(const CrossEntropyCount& args) {
  const int64_t rows = args.targets.sizes[0];
  check_target_vector(args.targets, rows);
  REDLINE_CHECK(rows <= counted_rows, op, ": targets: expected at most ", counted_rows, ", not ",
                rows);
  check_values(op, "count", args.count, 1, DType::float32);
}

void check(const CrossEntropyPromise& args) {
  check(statistics_of(args));
  check(gradient_of(args));
  check_smoothing(args.label_smoothing, args.statistics);
}

void check(const CrossEntropyRescale& args) {
  check_logits(args.logits_grad);
  const DType dtype = accumulation_dtype(args.logits_grad.dtype);
  check_values(op, "given", args.given, 1, dtype);
  check_values(op, "promised", args.promised, 1, dtype);
}

void check_targets(const char* op, const TensorView& targets, int64_t vocabulary,
                   int64_t ignore_index) {
  for (int64_t row = 0; row < targets.sizes[0]; ++row) {
    const int64_t target = targets.as<const int64_t>()[row];
    REDLINE_CHECK(target == ignore_index || (target >= 0 && target < vocabulary), op,
                  ": targets: expected classes of [0, ", vocabulary, ") or ignore_index ",
                  ignore_index, ", not ", target, " in row ", row);
  }
}

void run(const CrossEntropyStatistics& args, Range rows) { kernels().statistics(args, rows); }
void run(const CrossEntropyLoss& args, Range rows) { kernels().loss(args, rows); }
void run(const CrossEntropyGradient& args, Range rows) { kernels().gradient(args, rows); }

// Row by row: the gradient reads what the statistics have brought into the cache.
void run(const CrossEntropyPromise& args, Range rows) {
  const CrossEntropyStatistics statistics = statistics_of(args);
  const CrossEntropyGradient gradient = gradient_of(args);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    kernels().statistics(statistics, {row, row + 1});
    kernels().gradient(gradient, {row, row + 1});
  }
}

namespace {

// In float64, one row after the other; rows that are ignored hold 0.
template <typename Acc>
void add_rows(const CrossEntropyLoss& args) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t row = 0; row < args.row_loss.sizes[0]; ++row) {
    sum += static_cast<double>(args.row_loss.as<const Acc>()[row]);
    count += args.targets.as<const int64_t>()[row] != args.ignore_index;
  }
  const double divisor = args.reduction == Reduction::mean ? static_cast<double>(count) : 1.0;
  *args.count.as<Acc>() = static_cast<Acc>(divisor);
  *args.loss.as<Acc>() = static_cast<Acc>(sum / divisor);
}

}  // namespace

void finish(const CrossEntropyLoss& args) {
  visit_dtype<float, double>(op, args.statistics.dtype,
                             [&]<typename Acc>() { add_rows<Acc>(args); });
}

}  // namespace redline
