// x_grad, weight_grad and bias_grad of norm (kernels/norm.h).
#include "redline/kernels/cuda/norm/dropout.h"
#include "redline/kernels/cuda/norm/few_rows.h"
#include "redline/kernels/cuda/norm/long_backward.cuh"
#include "redline/kernels/cuda/norm/row_backward.cuh"

namespace redline {
namespace cuda {
namespace {

template <typename Form>
void launch_any(const Backward& args, Stream stream) {
  if (!launch_rows<Form>(args, stream)) launch_long_backward<Form>(args, stream);
}

}  // namespace

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

}  // namespace cuda

void run(const NormBackward& norm, Stream stream) {
  using namespace cuda;
  if (norm.rng_state || norm.input_bias_grad.total) return run_dropout(norm, stream);
  if (has_few_rows(norm.y_grad.dtype, norm.x.sizes[0], norm.x.sizes[1])) {
    return run_few_rows(norm, stream);
  }
  const Backward args = arguments(norm, stream);
  visit_forms(norm.y_grad.dtype, norm.x.dtype == DType::float32, norm.norm,
              [&]<typename T, typename X, bool Layer>() {
                visit_bool(is_aligned(norm), [&]<bool Aligned>() {
                  launch_any<Form<T, X, Layer, Aligned>>(args, stream);
                });
              });
  sum_parameters(norm, stream);
}

}  // namespace redline
