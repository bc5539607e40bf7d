// What every op family registers the same way.
#pragma once

#include <list>
#include <vector>

#include "redline/ops/torch.h"

namespace redline::ops {

// A registered op, to be called through the dispatcher: find_op<decltype(f)>("redline::f").
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline void refuse_vmap_kernel(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              ": vmap is not built for this op; give it the batch as leading dimensions");
}

// For TORCH_LIBRARY_IMPL(redline, FuncTorchBatched, m): torch would loop over the batch in silence.
inline void refuse_vmap(torch::Library& m, const std::vector<const char*>& ops) {
  for (const char* op : ops) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap_kernel>());
  }
}

// For TORCH_LIBRARY_IMPL(redline, Autograd, m): a gradient asked of an inner op is an error.
inline void refuse_autograd(torch::Library& m, const std::vector<const char*>& ops) {
  for (const char* op : ops) m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

// For TORCH_LIBRARY_IMPL(redline, AutocastCPU or AutocastCUDA, m): dtypes follow the tensors, as in
// the stock op.
inline void ignore_autocast(torch::Library& m, const std::vector<const char*>& ops) {
  for (const char* op : ops) m.impl(op, torch::CppFunction::makeFallthrough());
}

// An op family for every dispatch key. A public op calls inner ones through the dispatcher, has the
// derivative, and refuses vmap; an inner op has a kernel and refuses a gradient. Null: has none.
struct Family {
  using Implement = void (*)(torch::Library&);

  std::vector<const char*> public_ops = {}, inner_ops = {};
  Implement inner = nullptr;               // for CPU, CUDA and Meta
  Implement without_derivative = nullptr;  // the public ops below autograd
  Implement differentiable = nullptr;      // and above
  Implement autocast_cpu = nullptr;   // the public ops whose stock ones have a dtype rule there
  Implement autocast_cuda = nullptr;  // and there
};

// Registers a family for as long as it lives: one constant per file.
class Registration {
 public:
  explicit Registration(const Family& family) {
    for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta}) {
      if (family.inner) family.inner(library(key));
    }
    if (family.without_derivative) {
      family.without_derivative(library(c10::DispatchKey::CompositeExplicitAutograd));
    }
    torch::Library& autograd = library(c10::DispatchKey::Autograd);
    if (family.differentiable) family.differentiable(autograd);
    refuse_autograd(autograd, family.inner_ops);
    const auto autocast = [&](c10::DispatchKey key, Family::Implement implement) {
      torch::Library& of_key = library(key);
      if (implement) {
        implement(of_key);
      } else {
        ignore_autocast(of_key, family.public_ops);
      }
    };
    autocast(c10::DispatchKey::AutocastCPU, family.autocast_cpu);
    autocast(c10::DispatchKey::AutocastCUDA, family.autocast_cuda);
    refuse_vmap(library(c10::DispatchKey::FuncTorchBatched), family.public_ops);
  }

 private:
  torch::Library& library(c10::DispatchKey key) {
    return libraries_.emplace_back(torch::Library::IMPL, "redline", key, __FILE__, __LINE__);
  }

  std::list<torch::Library> libraries_;  // what it holds stays where it is
};

}  // namespace redline::ops
