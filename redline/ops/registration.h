// What every op family registers the same way.
#pragma once

#include <initializer_list>

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
inline void refuse_vmap(torch::Library& m, std::initializer_list<const char*> ops) {
  for (const char* op : ops) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap_kernel>());
  }
}

// For TORCH_LIBRARY_IMPL(redline, Autograd, m): a gradient asked of an inner op is an error.
inline void refuse_autograd(torch::Library& m, std::initializer_list<const char*> ops) {
  for (const char* op : ops) m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

// For TORCH_LIBRARY_IMPL(redline, AutocastCPU or AutocastCUDA, m): dtypes follow the tensors, as in
// the stock op.
inline void ignore_autocast(torch::Library& m, std::initializer_list<const char*> ops) {
  for (const char* op : ops) m.impl(op, torch::CppFunction::makeFallthrough());
}

}  // namespace redline::ops
