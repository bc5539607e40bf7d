#include "redline/ops/strict.h"

#include <atomic>

#include "redline/ops/watch.h"

namespace redline::ops {
namespace {

// Whether any node keeps it: before, no node is asked.
std::atomic<bool> is_kept{false};

void enter_strict(bool strict) {
  const Watch* outer = Watch::current();
  Watch::push(strict, outer ? outer->recorder() : c10::intrusive_ptr<Recorder>());
}

}  // namespace

StrictGuard::StrictGuard(bool strict) { enter_strict(strict); }

StrictGuard::~StrictGuard() { Watch::pop(); }

bool is_strict() {
  const Watch* watch = Watch::current();
  return watch != nullptr && watch->strict();
}

void KeptStrict::keep(torch::autograd::AutogradContext* ctx) {
  if (!is_strict()) return;
  ctx->saved_data["strict"] = true;
  is_kept.store(true, std::memory_order_relaxed);
}

KeptStrict::KeptStrict(torch::autograd::AutogradContext* ctx) {
  if (!is_kept.load(std::memory_order_relaxed)) return;
  if (ctx->saved_data.find("strict") != ctx->saved_data.end()) guard_.emplace(true);
}

// What redline.strict() of Python enters and leaves.
TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def("enter_strict(bool strict) -> ()", enter_strict);
  m.def("leave_strict() -> ()", [] { Watch::pop(); });
  m.def("is_strict() -> bool", is_strict);
}

}  // namespace redline::ops
