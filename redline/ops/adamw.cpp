#include "redline/ops/adamw.h"

#include <vector>

#include "redline/kernels/adamw.h"
#include "redline/ops/dense.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op_name = "adamw_step";
constexpr int64_t chunks_per_task = 2;

void check_lengths(const AdamWLists& lists) {
  const size_t count = lists.parameters.size();
  const auto check_length = [&](const char* name, TensorList list) {
    TORCH_CHECK(list.size() == count, op_name, ": ", name, ": expected ", count,
                " tensors, one for each parameter, not ", list.size());
  };
  check_length("gradients", lists.gradients);
  check_length("exp_avgs", lists.exp_avgs);
  check_length("exp_avg_sqs", lists.exp_avg_sqs);
  if (!lists.masters.empty()) check_length("masters", lists.masters);
  check_length("steps", lists.steps);
}

// Each tensor of the list: on the first parameter's device, of its parameter's shape.
void check_list(const char* name, TensorList list, TensorList parameters) {
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK(list[i].device() == parameters[0].device(), op_name, ": ", name, "[", i,
                "]: expected a tensor on ", parameters[0].device(), ", not on ", list[i].device());
    TORCH_CHECK(list[i].layout() == at::kStrided, op_name, ": ", name, "[", i,
                "]: expected a dense tensor, not ", list[i].layout());
    TORCH_CHECK(list[i].sizes() == parameters[i].sizes(), op_name, ": ", name, "[", i,
                "]: expected ", parameters[i].sizes(), ", not ", list[i].sizes());
  }
}

void check_arguments(const AdamWLists& lists, const AdamWScalars& scalars) {
  check_list("parameters", lists.parameters, lists.parameters);
  check_list("gradients", lists.gradients, lists.parameters);
  check_list("exp_avgs", lists.exp_avgs, lists.parameters);
  check_list("exp_avg_sqs", lists.exp_avg_sqs, lists.parameters);
  check_list("masters", lists.masters, lists.parameters);
  for (size_t i = 0; i < lists.masters.size(); ++i) {
    TORCH_CHECK(lists.masters[i].scalar_type() == at::kFloat, op_name, ": masters[", i,
                "]: expected Float, not ", lists.masters[i].scalar_type());
  }
  for (size_t i = 0; i < lists.exp_avgs.size(); ++i) {
    TORCH_CHECK(lists.exp_avgs[i].scalar_type() == lists.exp_avg_sqs[i].scalar_type(), op_name,
                ": exp_avg_sqs[", i, "]: expected ", lists.exp_avgs[i].scalar_type(),
                " as in exp_avgs, not ", lists.exp_avg_sqs[i].scalar_type());
  }
  for (size_t i = 0; i < lists.steps.size(); ++i) {
    const Tensor& step = lists.steps[i];
    TORCH_CHECK(step.device() == lists.parameters[0].device() && step.numel() == 1 &&
                    step.scalar_type() == at::kFloat,
                op_name, ": steps[", i, "]: expected one Float on ", lists.parameters[0].device(),
                ", not ", step.sizes(), " ", step.scalar_type(), " on ", step.device());
  }
  check_devices(op_name, lists.parameters[0],
                {{"learning_rate", scalars.learning_rate},
                 {"clip_coefficient", scalars.clip_coefficient},
                 {"grad_scale", scalars.grad_scale},
                 {"found_inf", scalars.found_inf}});
}

std::vector<AdamWTensor> flat_tensors(const AdamWLists& lists, DenseTensors& dense) {
  std::vector<AdamWTensor> tensors(lists.parameters.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& like = lists.parameters[i];
    AdamWTensor& tensor = tensors[i];
    tensor.parameter = dense.write("parameters", like, like);
    tensor.gradient = dense.read("gradients", lists.gradients[i], like);
    tensor.exp_avg = dense.write("exp_avgs", lists.exp_avgs[i], like);
    tensor.exp_avg_sq = dense.write("exp_avg_sqs", lists.exp_avg_sqs[i], like);
    if (!lists.masters.empty()) {
      tensor.master = static_cast<float*>(dense.write("masters", lists.masters[i], like));
    }
    tensor.step = lists.steps[i].data_ptr<float>();
    tensor.count = like.numel();
    tensor.parameter_dtype = dtype_from(like.scalar_type());
    tensor.gradient_dtype = dtype_from(lists.gradients[i].scalar_type());
    tensor.average_dtype = dtype_from(lists.exp_avgs[i].scalar_type());
  }
  return tensors;
}

void step_lists(const AdamWLists& lists, const AdamWScalars& scalars, const AdamWOptions& options) {
  check_lengths(lists);
  if (lists.parameters.empty() || lists.parameters[0].is_meta()) return;
  check_arguments(lists, scalars);
  DenseTensors dense(op_name);
  const std::vector<AdamWTensor> tensors = flat_tensors(lists, dense);
  constexpr int64_t factor_count = sizeof(AdamWFactors) / sizeof(double);
  const Tensor factors = at::empty({static_cast<int64_t>(tensors.size()), factor_count},
                                   lists.parameters[0].options().dtype(at::kDouble));
  const AdamWStep args{.tensors = tensors.data(),
                       .tensor_count = static_cast<int64_t>(tensors.size()),
                       .learning_rate = view(scalars.learning_rate),
                       .clip_coefficient = view(scalars.clip_coefficient),
                       .grad_scale = view(scalars.grad_scale),
                       .found_inf = view(scalars.found_inf),
                       .factors = view(factors),
                       .beta1 = options.beta1,
                       .beta2 = options.beta2,
                       .epsilon = options.epsilon,
                       .weight_decay = options.weight_decay};
  if (!run_on_cuda(lists.parameters[0], args)) {
    begin(args);
    parallel_ranges(cpu::adamw_chunks(args), chunks_per_task, "chunks of the lists",
                    [&](Range chunks) { run(args, chunks); });
  }
  dense.write_back();
  bump_versions(lists.parameters);
  bump_versions(lists.exp_avgs);
  bump_versions(lists.exp_avg_sqs);
  bump_versions(lists.masters);
  bump_versions(lists.steps);
}

void step_from_schema(TensorList parameters, TensorList gradients, TensorList exp_avgs,
                      TensorList exp_avg_sqs, TensorList masters, TensorList steps,
                      const Tensor& learning_rate, double beta1, double beta2, double epsilon,
                      double weight_decay, const OptionalTensor& clip_coefficient,
                      const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  step_lists({parameters, gradients, exp_avgs, exp_avg_sqs, masters, steps},
             {learning_rate, clip_coefficient, grad_scale, found_inf},
             {beta1, beta2, epsilon, weight_decay});
}

}  // namespace

void adamw_step(const AdamWLists& lists, const AdamWScalars& scalars, const AdamWOptions& options) {
  static const auto op = find_op<decltype(step_from_schema)>("redline::adamw_step");
  op.call(lists.parameters, lists.gradients, lists.exp_avgs, lists.exp_avg_sqs, lists.masters,
          lists.steps, scalars.learning_rate, options.beta1, options.beta2, options.epsilon,
          options.weight_decay, scalars.clip_coefficient, scalars.grad_scale, scalars.found_inf);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def(
      "adamw_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor(e!)[] steps, *, "
      "Tensor learning_rate, float beta1, float beta2, float epsilon, float weight_decay, "
      "Tensor? clip_coefficient=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}

TORCH_LIBRARY_IMPL(redline, CPU, m) { m.impl("adamw_step", step_from_schema); }
TORCH_LIBRARY_IMPL(redline, CUDA, m) { m.impl("adamw_step", step_from_schema); }
TORCH_LIBRARY_IMPL(redline, Meta, m) { m.impl("adamw_step", step_from_schema); }
TORCH_LIBRARY_IMPL(redline, Autograd, m) { refuse_autograd(m, {"adamw_step"}); }
TORCH_LIBRARY_IMPL(redline, AutocastCPU, m) { ignore_autocast(m, {"adamw_step"}); }
TORCH_LIBRARY_IMPL(redline, AutocastCUDA, m) { ignore_autocast(m, {"adamw_step"}); }
TORCH_LIBRARY_IMPL(redline, FuncTorchBatched, m) { refuse_vmap(m, {"adamw_step"}); }

}  // namespace redline::ops
