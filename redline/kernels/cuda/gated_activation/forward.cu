// y = f(a) * b * row_scale (kernels/gated_activation.h). Every thread has one 16-byte vector of
// gate and one of linear, both loads in flight: with two of each it ran at
// 0.85 of a copy, with one at 1.00 (H200). Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/gated_activation/element.cuh"

namespace redline {
namespace cuda {
namespace {

template <typename T, typename Kind>
struct Forward : Common {
  static constexpr int size = vector_size<T>, in_flight = 1;
  struct Input {
    Packed<T> gate, linear;
  };
  Matrix y;

  template <bool Aligned>
  __device__ __forceinline__ Input load(const Place<Aligned>& at) const {
    return {cuda::load(gate.row<const T>(at.row), at), cuda::load(linear.row<const T>(at.row), at)};
  }
  template <bool Aligned>
  __device__ __forceinline__ void run(const Place<Aligned>& at, const Input& in) const {
    float a[size], b[size], result[size] = {};
    if (counts(at.row)) {
      add_bias<T>(at, in.gate, in.linear, a, b);
      const float factor = scale<T>(at.row);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        result[i] = Kind::gate(a[i], parameters) * Kind::linear(b[i], parameters) * factor;
      }
    }
    store(y.row<T>(at.row), at, pack<T>(result));
  }
};

}  // namespace
}  // namespace cuda

void run(const GatedActivationForward& args, Stream stream) {
  using namespace cuda;
  const bool aligned = are_aligned(
      "gated_activation",
      {{"gate", &args.gate}, {"linear", &args.linear}, {"bias", &args.bias}, {"y", &args.y}});
  visit_dtype<float, bfloat16, float16>("gated_activation", args.gate.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_kind<T>(args.activation.kind, [&]<typename Kind>() {
      launch_elements(Forward<T, Kind>{common(args, vector_size<T>), matrix(args.y, false)},
                      aligned, stream);
    });
  });
}

}  // namespace redline
