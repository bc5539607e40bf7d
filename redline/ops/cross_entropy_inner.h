// cross_entropy's inner ops, for the nodes that hold the logits in parts: called through the
// dispatcher, so that tracing sees them; and what such nodes have in common.
#pragma once

#include "redline/core/tensor_view.h"
#include "redline/ops/cross_entropy.h"

namespace redline::ops {

// Throws where logits and targets do not belong together.
void check_loss_inputs(const at::Tensor& logits, const at::Tensor& targets);

// Throws where a number or the reduction is out of range, in the name of `op`.
void check_options(const char* op, const CrossEntropyOptions& options);

// A node's entries of saved_data: plain values, which compiled autograd can hash.
void save_options(torch::autograd::AutogradContext* ctx, const CrossEntropyOptions& options);
CrossEntropyOptions saved_options(torch::autograd::AutogradContext* ctx);

// What a gradient takes besides the logits.
struct CrossEntropyUpstream {
  at::Tensor targets, statistics, loss_grad;
  std::optional<at::Tensor> log_sum_exp_grad, count;
  c10::SymInt vocab_start, vocabulary;
  CrossEntropyOptions options;  // the formula's: no reduction
};

// The inner ops, through the dispatcher, so that tracing sees them.
// [rows, 3], [rows, 4] with label smoothing; ignored rows are read where `every_row` is true.
at::Tensor call_statistics(const at::Tensor& logits, const at::Tensor& targets,
                           const CrossEntropyOptions& options, bool every_row);
// {statistics, predictions}, the second of the targets' shape; every row is read.
std::tuple<at::Tensor, at::Tensor> call_statistics_with_predictions(
    const at::Tensor& logits, const at::Tensor& targets, const CrossEntropyOptions& options);
// {loss, log_sum_exp, count}; count is what a mean was divided by.
std::tuple<at::Tensor, at::Tensor, at::Tensor> call_loss(const at::Tensor& statistics,
                                                         const at::Tensor& targets,
                                                         c10::SymInt vocabulary,
                                                         const CrossEntropyOptions& options);
// The logits' gradient; with `inplace` over the logits.
at::Tensor call_gradient(at::Tensor logits, const CrossEntropyUpstream& in, bool inplace);

// --- what the inner ops are written with --------------------------------------------------------

// [rows, 3], or with the sum of the logits [rows, 4].
at::Tensor empty_statistics(const at::Tensor& logits, const at::Tensor& targets, bool with_sum);

// int64, of the targets' shape.
at::Tensor empty_predictions(const at::Tensor& targets);

// One number per row, of a scalar the same for all; `flat` holds it for as long as the view.
TensorView row_values(const at::Tensor& given, int64_t rows, at::ScalarType dtype,
                      at::Tensor& flat);

// Whoever saved the tensor too then gets torch's error, not what was written over it.
void bump_version(const at::Tensor& tensor);

}  // namespace redline::ops
