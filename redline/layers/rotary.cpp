#include "redline/layers/rotary.h"

namespace redline::layers {

RotaryTables::RotaryTables(const RotaryOptions& options, int64_t dim) {
  const auto exact = torch::dtype(torch::kFloat64).device(torch::kCPU);
  const Tensor exponents = torch::arange(0, dim, 2, exact) / dim;
  const Tensor frequencies = torch::pow(options.base, exponents).reciprocal();
  const Tensor angles = torch::arange(options.max_positions, exact).unsqueeze(1) * frequencies;
  cos = angles.cos().to(torch::kFloat32);
  sin = angles.sin().to(torch::kFloat32);
}

void RotaryTables::place(torch::Device device) {
  cos = cos.to(device);
  sin = sin.to(device);
}

}  // namespace redline::layers
