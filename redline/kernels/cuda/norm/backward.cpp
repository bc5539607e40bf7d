#include "redline/kernels/cuda/norm/backward.h"

#include <algorithm>

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/norm/dropout.h"
#include "redline/kernels/cuda/norm/few_rows.h"
#include "redline/kernels/cuda/norm/plan.h"
#include "redline/kernels/cuda/sum_chunks.h"

namespace redline {
namespace cuda {

// A block for each of the 132 multiprocessors of an H100, or as many clusters as it runs at once
// (of eight blocks, 15: with 16, two rounds, 1024 x 65536 took 271 us and with 15 176); constants,
// not questions to the device: the order of the sum over rows must not change from one GPU to the
// next.
int64_t norm_chunks(DType y_grad, int64_t rows, int64_t cols, int capability) {
  if (has_few_rows(y_grad, rows, cols)) return 0;
  const Plan chosen = plan(ceil_div(cols, 16 / element_bytes(y_grad)), capability);
  const int64_t most = chosen.cluster == 8 ? 15 : 132 / chosen.cluster;
  return std::clamp<int64_t>(ceil_div(rows, chosen.groups), 1, most);
}

void sum_parameters(const NormBackward& norm, Stream stream) {
  sum_chunks({norm.weight_partial, norm.weight_grad}, {norm.bias_partial, norm.bias_grad}, stream);
}

}  // namespace cuda

void run(const NormBackward& norm, Stream stream) {
  using namespace cuda;
  if (norm.rng_state || norm.input_bias_grad.total) return run_dropout(norm, stream);
  if (has_few_rows(norm.y_grad.dtype, norm.x.sizes[0], norm.x.sizes[1])) {
    return run_few_rows(norm, stream);
  }
  visit_dtype<float, bfloat16, float16>("norm", norm.y_grad.dtype,
                                        [&]<typename T>() { launch_backward<T>(norm, stream); });
  sum_parameters(norm, stream);
}

}  // namespace redline
