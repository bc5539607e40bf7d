// residual + dropout(x + bias) and its gradients, element by element: bias_dropout_add's, and those
// of the norm that follows in the same pass. For the per-instruction-set sources.
#pragma once

#include "redline/kernels/bias_dropout_add.h"
#include "redline/kernels/cpu/column_sums.h"
#include "redline/kernels/cpu/elements.h"
#include "redline/kernels/cpu/philox.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

REDLINE_INLINE void store_state(const BiasDropoutAddForward& args) {
  if (!args.rng_state) return;
  args.rng_state.as<int64_t>()[0] = args.philox.seed;
  args.rng_state.as<int64_t>()[1] = args.philox.offset;
}

template <typename Acc>
void forward_elements(const BiasDropoutAddForward& args, Range elements) {
  const int64_t cols = args.x.sizes[1];
  Block<Acc> x_block, bias_block, residual_block, y_block;
  DropoutBlock<Acc> dropout;
  for_element_blocks(elements, cols, [&](int64_t row, int64_t col, int count) {
    const Acc* x = RowReader<Acc>{args.x, row, x_block}(col, count);
    const Acc* residual = RowReader<Acc>{args.residual, row, residual_block}(col, count);
    const Acc* bias = read_optional(args.bias, col, count, bias_block);
    const Acc* factors = args.rng_state
                             ? dropout.fill(args.philox, row * cols + col, count, args.probability)
                             : nullptr;
    RowWriter<Acc> y(args.y, row, col, y_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      Vector<Acc> v = load_ahead(x + i, n);
      if (bias) v += load(bias + i, n);
      if (factors) v = drop<Acc>(v, load(factors + i, n));
      store_ahead(y.values + i, load_ahead(residual + i, n) + v, n);
    });
    y.finish(count);
  });
}

// Adds x_grad, before it is rounded, to `bias_sums` where there are any.
template <typename Acc>
void backward_elements(const BiasDropoutAddBackward& args, Range elements, Acc* bias_sums) {
  const int64_t cols = args.y_grad.sizes[1];
  PhiloxState philox;
  if (args.rng_state) {
    philox.seed = args.rng_state.as<const int64_t>()[0];
    philox.offset = args.rng_state.as<const int64_t>()[1];
  }
  Block<Acc> y_grad_block, x_grad_block;
  DropoutBlock<Acc> dropout;
  for_element_blocks(elements, cols, [&](int64_t row, int64_t col, int count) {
    const Acc* y_grad = RowReader<Acc>{args.y_grad, row, y_grad_block}(col, count);
    const Acc* factors =
        args.rng_state ? dropout.fill(philox, row * cols + col, count, args.probability) : nullptr;
    Acc* sums = bias_sums ? bias_sums + col : nullptr;
    RowWriter<Acc> x_grad(args.x_grad, row, col, x_grad_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      Vector<Acc> v = load_ahead(y_grad + i, n);
      if (factors) v = drop<Acc>(v, load(factors + i, n));
      store_ahead(x_grad.values + i, v, n);
      if (sums) add_to(sums + i, v, n);
    });
    x_grad.finish(count);
  });
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
