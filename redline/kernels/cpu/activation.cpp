// One pass: each vector is read, widened where it is 16-bit, computed and written. The bias's
// gradient is added up in a [cols] row of the workspace on the way.
#include "redline/kernels/cpu/activation.h"

#include "redline/kernels/cpu/column_sums.h"
#include "redline/kernels/cpu/elements.h"
#include "redline/kernels/cpu/nonlinearity.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

template <typename Kind, typename T>
void forward_elements(const ActivationForward& args, Range elements) {
  using Acc = arithmetic<T>;
  Block<Acc> bias_block;
  for_element_blocks(elements, args.x.sizes[1], [&](int64_t row, int64_t col, int count) {
    const T* x = at<const T>(args.x, row, col);
    T* y = at<T>(args.y, row, col);
    const Acc* bias = read_optional(args.bias, col, count, bias_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      Vector<Acc> v = load_wide(x + i, n);
      if (bias) v += load(bias + i, n);
      store_narrow(y + i, Kind::value(v), n);
    });
  });
}

template <typename Kind, typename T>
void backward_elements(const ActivationBackward& args, int64_t chunk, Range elements) {
  using Acc = arithmetic<T>;
  Block<Acc> bias_block;
  Acc* bias_sums = begin_chunk<Acc>(args.bias_grad, chunk);
  for_element_blocks(elements, args.x.sizes[1], [&](int64_t row, int64_t col, int count) {
    const T* x = at<const T>(args.x, row, col);
    const T* y_grad = at<const T>(args.y_grad, row, col);
    T* x_grad = at<T>(args.x_grad, row, col);
    T* y = args.y ? at<T>(args.y, row, col) : nullptr;
    const Acc* bias = read_optional(args.bias, col, count, bias_block);
    Acc* sums = bias_sums ? bias_sums + col : nullptr;
    for_vectors<Acc>(count, [&](int i, int n) {
      Vector<Acc> v = load_wide(x + i, n), value, derivative;
      if (bias) v += load(bias + i, n);
      Kind::derive(v, value, derivative);
      const Vector<Acc> gradient = load_wide(y_grad + i, n) * derivative;
      store_narrow(x_grad + i, gradient, n);
      if (y) store_narrow(y + i, value, n);
      if (sums) add_to(sums + i, gradient, n);
    });
  });
}

// Calls visit.operator()<Kind, T>() with the storage type.
template <typename Visit>
void visit_kind(Activation kind, DType dtype, Visit visit) {
  const auto with = [&]<typename Kind>() {
    visit_storage(dtype, [&]<typename T>() { visit.template operator()<Kind, T>(); });
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
             [&]<typename Kind, typename T>() { forward_elements<Kind, T>(args, elements); });
}

void backward(const ActivationBackward& args, int64_t chunk, Range elements) {
  visit_kind(args.kind, args.x.dtype, [&]<typename Kind, typename T>() {
    backward_elements<Kind, T>(args, chunk, elements);
  });
}

void finish(const ActivationBackward& args, Range cols) { finish_columns(args.bias_grad, cols); }

}  // namespace

extern const ActivationKernels activation_kernels = {forward, backward, finish};

}  // namespace redline::cpu::REDLINE_ISA
