// One pass: each block of a row is read, widened where it is 16-bit, computed and written. The
// bias's gradient is added up in a [cols] row of the workspace on the way.
#include "redline/kernels/cpu/activation.h"

#include "redline/kernels/cpu/column_sums.h"
#include "redline/kernels/cpu/elements.h"
#include "redline/kernels/cpu/nonlinearity.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

template <typename Kind, typename Acc>
void forward_elements(const ActivationForward& args, Range elements) {
  Block<Acc> x_block, bias_block, y_block;
  for_element_blocks(elements, args.x.sizes[1], [&](int64_t row, int64_t col, int count) {
    const Acc* x = RowReader<Acc>{args.x, row, x_block}(col, count);
    const Acc* bias = read_optional(args.bias, col, count, bias_block);
    RowWriter<Acc> y(args.y, row, col, y_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      Vector<Acc> v = load(x + i, n);
      if (bias) v += load(bias + i, n);
      store(y.values + i, Kind::value(v), n);
    });
    y.finish(count);
  });
}

template <typename Kind, typename Acc>
void backward_elements(const ActivationBackward& args, int64_t chunk, Range elements) {
  Block<Acc> x_block, y_grad_block, bias_block, x_grad_block;
  Acc* bias_sums = begin_chunk<Acc>(args.bias_grad, chunk);
  for_element_blocks(elements, args.x.sizes[1], [&](int64_t row, int64_t col, int count) {
    const Acc* x = RowReader<Acc>{args.x, row, x_block}(col, count);
    const Acc* y_grad = RowReader<Acc>{args.y_grad, row, y_grad_block}(col, count);
    const Acc* bias = read_optional(args.bias, col, count, bias_block);
    Acc* sums = bias_sums ? bias_sums + col : nullptr;
    RowWriter<Acc> x_grad(args.x_grad, row, col, x_grad_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      Vector<Acc> v = load(x + i, n), value, derivative;
      if (bias) v += load(bias + i, n);
      Kind::derive(v, value, derivative);
      const Vector<Acc> gradient = load(y_grad + i, n) * derivative;
      store(x_grad.values + i, gradient, n);
      if (sums) add_to(sums + i, gradient, n);
    });
    x_grad.finish(count);
  });
}

// Calls visit.operator()<Kind, Acc>().
template <typename Visit>
void visit_kind(Activation kind, DType dtype, Visit visit) {
  const auto with = [&]<typename Kind>() {
    if (dtype == DType::float64) {
      visit.template operator()<Kind, double>();
    } else {
      visit.template operator()<Kind, float>();
    }
  };
  switch (kind) {
    case Activation::gelu:
      return with.template operator()<Gelu>();
    case Activation::gelu_erf:
      return with.template operator()<GeluErf>();
    case Activation::quick_gelu:
      return with.template operator()<QuickGelu>();
    case Activation::silu:
      return with.template operator()<Silu>();
    case Activation::relu:
      return with.template operator()<Relu>();
    case Activation::squared_relu:
      return with.template operator()<SquaredRelu>();
  }
}

void forward(const ActivationForward& args, Range elements) {
  visit_kind(args.kind, args.x.dtype,
             [&]<typename Kind, typename Acc>() { forward_elements<Kind, Acc>(args, elements); });
}

void backward(const ActivationBackward& args, int64_t chunk, Range elements) {
  visit_kind(args.kind, args.x.dtype, [&]<typename Kind, typename Acc>() {
    backward_elements<Kind, Acc>(args, chunk, elements);
  });
}

void finish(const ActivationBackward& args, Range cols) { finish_columns(args.bias_grad, cols); }

}  // namespace

extern const ActivationKernels activation_kernels = {forward, backward, finish};

}  // namespace redline::cpu::REDLINE_ISA
