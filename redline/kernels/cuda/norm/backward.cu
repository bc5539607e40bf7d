// x_grad and the partial sums of weight_grad and bias_grad (kernels/norm.h).
#include "redline/kernels/cuda/norm/backward.h"
#include "redline/kernels/cuda/norm/long_backward.cuh"
#include "redline/kernels/cuda/norm/row_backward.cuh"

namespace redline::cuda {
namespace {

template <typename Form>
void launch_any(const Backward& args, Stream stream) {
  if (!launch_rows<Form>(args, stream)) launch_long_backward<Form>(args, stream);
}

}  // namespace

template <typename Host>
void launch_backward(const NormBackward& norm, Stream stream) {
  using T = device_type<Host>;
  const Backward args = arguments(norm, stream);
  const bool is_wide = norm.x.dtype == DType::float32;
  visit_forms<T>(is_wide, norm.norm, [&]<typename X, bool Layer>() {
    visit_bool(is_aligned(norm),
               [&]<bool Aligned>() { launch_any<Form<T, X, Layer, Aligned>>(args, stream); });
  });
}

template void launch_backward<REDLINE_ELEMENT>(const NormBackward&, Stream);

}  // namespace redline::cuda
