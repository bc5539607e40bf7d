#include "redline/kernels/softmax.h"

#include "redline/core/dispatch.h"
#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/cpu/softmax.h"
#include "redline/kernels/operands.h"

namespace redline {
namespace {

constexpr const char* op = "softmax";

const cpu::SoftmaxKernels& kernels() {
  return cpu::choose(cpu::baseline::softmax_kernels, cpu::avx2::softmax_kernels,
                     cpu::avx512::softmax_kernels);
}

template <typename Acc>
void add_sink_rows(const SoftmaxBackward& args, Range heads) {
  const int64_t rows = args.probabilities.sizes[0], queries = args.shape.queries;
  for (int64_t head = heads.begin; head < heads.end; ++head) {
    double sum = 0;
    for (int64_t row = head * queries; row < rows; row += args.shape.heads * queries) {
      for (int64_t query = 0; query < queries; ++query) {
        sum += static_cast<double>(args.sink_rows.as<const Acc>()[row + query]);
      }
    }
    args.sink_grad.as<Acc>()[head] = static_cast<Acc>(sum);
  }
}

}  // namespace

void check(const SoftmaxForward& args) {
  const TensorView& scores = args.scores;
  REDLINE_CHECK(scores.rank == 2 && is_floating(scores.dtype), op,
                ": scores: expected floating [rows, keys], not ", scores);
  check_matrix(op, "scores", scores, scores, scores.dtype);
  check_matrix(op, "probabilities", args.probabilities, scores, scores.dtype);
  REDLINE_CHECK(args.window >= 0, op, ": window: expected 1 or more keys, not ", args.window);
  if (args.mask) {
    REDLINE_CHECK(args.mask.rank == 4 && args.mask.dtype == DType::boolean &&
                      args.mask.sizes[1] == args.shape.heads &&
                      args.mask.sizes[2] == args.shape.queries &&
                      args.mask.sizes[3] == scores.sizes[1],
                  op, ": mask: expected bool [batch, heads, queries, keys], not ", args.mask);
  }
  if (args.sink) {
    const DType dtype = accumulation_dtype(scores.dtype);
    check_values(op, "sink", args.sink, args.shape.heads, dtype);
    check_values(op, "sink_probability", args.sink_probability, scores.sizes[0], dtype);
  }
}

void check(const SoftmaxBackward& args) {
  const TensorView& probabilities = args.probabilities;
  REDLINE_CHECK(probabilities.rank == 2 && is_floating(probabilities.dtype), op,
                ": probabilities: expected floating [rows, keys], not ", probabilities);
  check_matrix(op, "probabilities", probabilities, probabilities, probabilities.dtype);
  check_matrix(op, "probabilities_grad", args.probabilities_grad, probabilities,
               probabilities.dtype);
  check_matrix(op, "scores_grad", args.scores_grad, probabilities, probabilities.dtype);
  if (args.sink_probability) {
    const DType dtype = accumulation_dtype(probabilities.dtype);
    check_values(op, "sink_probability", args.sink_probability, probabilities.sizes[0], dtype);
    check_values(op, "sink_grad", args.sink_grad, args.shape.heads, dtype);
  }
}

void run(const SoftmaxForward& args, Range rows) { kernels().forward(args, rows); }
void run(const SoftmaxBackward& args, Range rows) { kernels().backward(args, rows); }

void finish(const SoftmaxBackward& args, Range heads) {
  visit_dtype<float, double>(op, args.sink_grad.dtype,
                             [&]<typename Acc>() { add_sink_rows<Acc>(args, heads); });
}

}  // namespace redline
