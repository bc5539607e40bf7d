// Cross entropy with z-loss, label smoothing and a logit softcap (formulas:
// kernels/cross_entropy.h). logits are [..., vocabulary], of any floating dtype and read as they
// are (under autocast too); targets are [...] int64 or int32. Kept for backward: the logits and
// three float32 per row, four with label smoothing. The result is float32, float64 for float64
// logits. A target that is neither a class nor ignore_index: an error on CPU; on CUDA, where
// nothing is read back, NaN as that row's loss and gradient.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

struct CrossEntropyOptions {
  std::string reduction = "mean";  // over the rows that are not ignored; or "sum", "none"
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  double z_loss = 0;  // adds z_loss * log_sum_exp^2
  std::optional<double> logit_softcap = {};
  // Backward writes the gradient over the logits, which then no longer hold them: refused on leaf
  // tensors, and an error in any other backward that wanted the logits. Without effect under
  // tracing, where the compiler places buffers.
  bool inplace_backward = false;
};

// The loss: a scalar, or the targets' shape with reduction "none".
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets,
                         const CrossEntropyOptions& options = {});

// {loss, log_sum_exp}, the second of the targets' shape, ignored rows included; differentiable.
std::tuple<at::Tensor, at::Tensor> cross_entropy_with_log_sum_exp(
    const at::Tensor& logits, const at::Tensor& targets, const CrossEntropyOptions& options = {});

// --- for nodes that hold the logits in parts ----------------------------------------------------

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
// {loss, log_sum_exp, count}; count is what a mean was divided by.
std::tuple<at::Tensor, at::Tensor, at::Tensor> call_loss(const at::Tensor& statistics,
                                                         const at::Tensor& targets,
                                                         c10::SymInt vocabulary,
                                                         const CrossEntropyOptions& options);
// The logits' gradient; with `inplace` over the logits.
at::Tensor call_gradient(at::Tensor logits, const CrossEntropyUpstream& in, bool inplace);

}  // namespace redline::ops
