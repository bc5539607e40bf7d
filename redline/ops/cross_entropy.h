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
  // The upstream gradient that backward will be given, on the logits' device: a scalar, or with
  // reduction "none" also one number per row. Forward then makes the logits' gradient too (over the
  // logits with `inplace_backward`) and keeps it alone; backward gives it as it is. Another
  // upstream gradient rescales that of a mean or a sum; of "none" it is an error on CPU, and on
  // CUDA, where nothing is read back, gives NaN. A backward with create_graph is an error.
  std::optional<at::Tensor> loss_scale = {};
};

// The loss: a scalar, or the targets' shape with reduction "none".
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets,
                         const CrossEntropyOptions& options = {});

// {loss, log_sum_exp}, the second of the targets' shape, ignored rows included; differentiable.
// With `loss_scale` an error, for what comes upstream of the second is not promised.
std::tuple<at::Tensor, at::Tensor> cross_entropy_with_log_sum_exp(
    const at::Tensor& logits, const at::Tensor& targets, const CrossEntropyOptions& options = {});

struct CrossEntropyPredicted {
  at::Tensor loss;
  at::Tensor log_sum_exp;  // of no elements unless it was asked for
  at::Tensor predictions;  // int64, the targets' shape: no gradient
};

// The class of each row's largest logit too, ignored rows included, out of the read that the loss
// makes: what at::argmax(logits, -1) gives, of equal logits the first, a NaN above all. The softcap
// does not enter.
CrossEntropyPredicted cross_entropy_with_predictions(const at::Tensor& logits,
                                                     const at::Tensor& targets,
                                                     const CrossEntropyOptions& options = {},
                                                     bool with_log_sum_exp = false);

}  // namespace redline::ops
