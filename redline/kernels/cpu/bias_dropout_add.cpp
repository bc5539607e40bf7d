// One pass: each block of a row draws its numbers into L1, then is read, computed and written.
#include "redline/kernels/cpu/bias_dropout_add.h"

#include "redline/kernels/cpu/dropout.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

void forward(const BiasDropoutAddForward& args, Range elements) {
  if (elements.begin == 0) store_state(args);
  if (args.x.dtype == DType::float64) {
    forward_elements<double>(args, elements);
  } else {
    forward_elements<float>(args, elements);
  }
}

void backward(const BiasDropoutAddBackward& args, int64_t chunk, Range elements) {
  if (args.x_grad.dtype == DType::float64) {
    backward_elements(args, elements, begin_chunk<double>(args.bias_grad, chunk));
  } else {
    backward_elements(args, elements, begin_chunk<float>(args.bias_grad, chunk));
  }
}

void finish(const BiasDropoutAddBackward& args, Range cols) {
  finish_columns(args.bias_grad, cols);
}

}  // namespace

extern const BiasDropoutAddKernels bias_dropout_add_kernels = {forward, backward, finish};

}  // namespace redline::cpu::REDLINE_ISA
