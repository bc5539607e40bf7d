#include "redline/ops/gradient_norm.h"

#include <vector>

#include "redline/kernels/gradient_norm.h"
#include "redline/ops/dense.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using at::TensorList;

constexpr const char* chunks_of_list = "chunk of the list";

void check_gradients(const char* op, TensorList gradients) {
  TORCH_CHECK(!gradients.empty(), op, ": gradients: expected one tensor or more, not none");
  for (size_t i = 0; i < gradients.size(); ++i) {
    TORCH_CHECK(gradients[i].device() == gradients[0].device(), op, ": gradients[", i,
                "]: expected a tensor on ", gradients[0].device(), ", not on ",
                gradients[i].device());
    TORCH_CHECK(gradients[i].layout() == at::kStrided, op, ": gradients[", i,
                "]: expected a dense tensor, not ", gradients[i].layout());
  }
}

GradientTensor flat_tensor(void* data, const Tensor& tensor) {
  return {data, tensor.numel(), dtype_from(tensor.scalar_type())};
}

Tensor norm_of(TensorList gradients) {
  check_gradients("gradient_norm", gradients);
  const Tensor& first = gradients[0];
  const Tensor norm = at::empty({}, first.options().dtype(accumulation_type(first)));
  if (first.is_meta()) return norm;
  std::vector<Tensor> copies;  // the order of a sum must not depend on strides
  std::vector<GradientTensor> tensors;
  for (const Tensor& gradient : gradients) {
    copies.push_back(contiguous("gradient_norm", "gradients", gradient));
    tensors.push_back(flat_tensor(copies.back().data_ptr(), gradient));
  }
  const GradientList list{tensors.data(), static_cast<int64_t>(tensors.size())};
  const int64_t chunks = gradient_chunks(list);
  const Tensor partial = at::empty({chunks}, first.options().dtype(at::kDouble));
  const GradientNorm args{.gradients = list, .partial = view(partial), .norm = view(norm)};
  if (run_on_cuda(first, args)) return norm;
  parallel_ranges(chunks, 1, chunks_of_list, [&](Range range) { run(args, range); });
  finish(args);
  return norm;
}

Tensor coefficient_of(const Tensor& norm, double max_norm) {
  const Tensor coefficient = at::empty({}, norm.options().dtype(at::kFloat));
  if (norm.is_meta()) return coefficient;
  const ClipCoefficient args{
      .norm = view(norm), .coefficient = view(coefficient), .max_norm = max_norm};
  if (!run_on_cuda(norm, args)) parallel_ranges(1, 1, "value", [&](Range) { run(args); });
  return coefficient;
}

void scale_all(TensorList gradients, const Tensor& coefficient) {
  constexpr const char* op = "scale_gradients";
  check_gradients(op, gradients);
  const Tensor& first = gradients[0];
  if (first.is_meta()) return;
  check_devices(op, first, {{"coefficient", coefficient}});
  DenseTensors dense(op);
  std::vector<GradientTensor> tensors;
  tensors.reserve(gradients.size());
  for (const Tensor& gradient : gradients) {
    tensors.push_back(flat_tensor(dense.write("gradients", gradient, gradient), gradient));
  }
  const ScaleGradients args{.gradients = {tensors.data(), static_cast<int64_t>(tensors.size())},
                            .coefficient = view(coefficient)};
  if (!run_on_cuda(first, args)) {
    parallel_ranges(gradient_chunks(args.gradients), 1, chunks_of_list,
                    [&](Range range) { run(args, range); });
  }
  dense.write_back();
  bump_versions(gradients);
}

void implement(torch::Library& m) {
  m.impl("gradient_norm", norm_of);
  m.impl("clip_coefficient", coefficient_of);
  m.impl("scale_gradients", scale_all);
}

}  // namespace

Tensor gradient_norm(TensorList gradients) {
  static const auto op = find_op<decltype(norm_of)>("redline::gradient_norm");
  return op.call(gradients);
}

Tensor clip_coefficient(const Tensor& norm, double max_norm) {
  static const auto op = find_op<decltype(coefficient_of)>("redline::clip_coefficient");
  return op.call(norm, max_norm);
}

void scale_gradients(TensorList gradients, const Tensor& coefficient) {
  static const auto op = find_op<decltype(scale_all)>("redline::scale_gradients");
  op.call(gradients, coefficient);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def("gradient_norm(Tensor[] gradients) -> Tensor");
  m.def("clip_coefficient(Tensor norm, float max_norm) -> Tensor");
  m.def("scale_gradients(Tensor(a!)[] gradients, Tensor coefficient) -> ()");
}

TORCH_LIBRARY_IMPL(redline, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(redline, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(redline, Meta, m) { implement(m); }
// Sparse gradients get here to be refused by name.
TORCH_LIBRARY_IMPL(redline, SparseCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(redline, SparseCUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(redline, Autograd, m) {
  refuse_autograd(m, {"gradient_norm", "clip_coefficient", "scale_gradients"});
}
TORCH_LIBRARY_IMPL(redline, AutocastCPU, m) {
  ignore_autocast(m, {"gradient_norm", "clip_coefficient", "scale_gradients"});
}
TORCH_LIBRARY_IMPL(redline, AutocastCUDA, m) {
  ignore_autocast(m, {"gradient_norm", "clip_coefficient", "scale_gradients"});
}
TORCH_LIBRARY_IMPL(redline, FuncTorchBatched, m) {
  refuse_vmap(m, {"gradient_norm", "clip_coefficient", "scale_gradients"});
}

}  // namespace redline::ops
