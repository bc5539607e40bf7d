// A promised upstream gradient (CrossEntropyOptions::loss_scale): what the losses that take one
// have in common, and cross_entropy's inner ops for it, called through the dispatcher.
#pragma once

#include "redline/ops/cross_entropy.h"

namespace redline::ops {

// Throws where options.loss_scale is given and can be no upstream gradient of the loss.
void check_loss_scale(const char* op, const at::Tensor& targets,
                      const CrossEntropyOptions& options);

// What a mean is divided by, before there is a loss.
at::Tensor mean_divisor(const at::Tensor& targets, int64_t ignore_index, at::ScalarType dtype);

// By what a gradient under `loss_scale` is multiplied to be that under `loss_grad`, [1]: 1 where
// they are the same to the bit. Of several numbers all must be.
at::Tensor kept_ratio(const char* op, const at::Tensor& loss_grad, const at::Tensor& loss_scale);

// Of a tensor that stands for a real one: the graph that comes of it decides where gradients live.
bool is_traced(const at::Tensor& tensor);

// In a backward: whether what forward kept may become the gradient, for no other backward comes.
bool is_given_away(const at::Tensor& kept);

// `kept` times that ratio, over itself; where it is 1 nothing is written.
void fulfil_inplace(const char* op, at::Tensor& kept, const at::Tensor& loss_grad,
                    const at::Tensor& loss_scale);

struct CrossEntropyPromised {
  at::Tensor statistics;   // as of call_statistics()
  at::Tensor logits_grad;  // under options.loss_scale
  at::Tensor predictions;  // where they were asked for
};
struct CrossEntropyPromiseForm {
  bool inplace = false;  // the gradient goes over the logits
  bool predictions = false;
};
CrossEntropyPromised call_promise(at::Tensor logits, const at::Tensor& targets,
                                  const CrossEntropyOptions& options, CrossEntropyPromiseForm form);
// That gradient under `loss_grad`; with `inplace` it is no longer what was kept.
at::Tensor call_fulfil(at::Tensor kept, const at::Tensor& loss_grad, const at::Tensor& loss_scale,
                       bool inplace);

}  // namespace redline::ops
