// Norm's forward by kernels of one family of forms: with amax or without.
#pragma once

#include "redline/kernels/cuda/norm/forward.cuh"
#include "redline/kernels/cuda/norm/zero_rows.cuh"

namespace redline::cuda {
namespace {

template <typename T, bool Layer, template <typename, typename, bool, bool> typename FormOf>
void choose_forward(const Forward& args, bool aligned, Stream stream) {
  if (!aligned) return launch_forward<FormOf<T, float, Layer, false>>(args, stream);
  if constexpr (sizeof(T) == 2) {
    const Matrix& normalized = args.residual.data == nullptr ? args.x : args.sum;
    if (!normalized.is_float32) {
      return launch_forward<FormOf<T, T, Layer, true>>(args, stream);
    }
  }
  launch_forward<FormOf<T, float, Layer, true>>(args, stream);
}

template <typename Host, template <typename, typename, bool, bool> typename FormOf>
void run_forms(const NormForward& norm, Stream stream) {
  const bool aligned = is_aligned(norm);
  const Forward args = arguments(norm);
  visit_bool(norm.norm == Norm::layer, [&]<bool Layer>() {
    choose_forward<device_type<Host>, Layer, FormOf>(args, aligned, stream);
  });
  if (norm.row_count) zero_rows(args, stream);
}

}  // namespace
}  // namespace redline::cuda
