// The last step of an op: nothing on meta tensors, otherwise the kernel of the tensors' device.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/watch.h"
#include "redline/ops/empty.h"
#include "redline/ops/torch.h"
#include "redline/ops/view.h"

namespace redline::ops {

inline constexpr bool with_cuda = REDLINE_WITH_CUDA;

// The current stream of the tensor's device and what kernels may know of it. Throws in a build
// without CUDA.
Stream stream_of(const at::Tensor& tensor);

// Memory of the current device for one launch on the current stream, from torch's allocator: it may
// be freed when the call ends, and belongs to the graph that captures it. Null for 0 bytes.
at::DataPtr workspace_of(int64_t bytes);

// The dtype of sums and statistics over `tensor`.
inline at::ScalarType accumulation_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor, or an undefined one; and back.
inline at::Tensor value(const std::optional<at::Tensor>& tensor) {
  return tensor ? *tensor : at::Tensor();
}
inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// What the gradient of an optional parameter is written to; undefined where it is not wanted.
inline at::Tensor empty_gradient(const char* op, const char* name,
                                 const std::optional<at::Tensor>& parameter, bool wanted) {
  if (!wanted) return {};
  TORCH_CHECK(parameter && parameter->defined(), op, ": needs_", name, ": expected ", name,
              " to be given, or false");
  return empty_contiguous(*parameter);
}

// A tensor, if there is one, and what messages call it. For the length of an expression.
struct NamedTensor {
  NamedTensor(const char* name, const at::Tensor& tensor)
      : name(name), tensor(tensor.defined() ? &tensor : nullptr) {}
  NamedTensor(const char* name, const std::optional<at::Tensor>& tensor)
      : name(name), tensor(tensor && tensor->defined() ? &*tensor : nullptr) {}

  const char* name;
  const at::Tensor* tensor;
};

// Every tensor on one device, or one sentence.
void check_devices(const char* op, const at::Tensor& first,
                   std::initializer_list<NamedTensor> others);

// Rows per task, so that a task moves about 256 KB: a function of the shape alone.
inline int64_t rows_per_task(int64_t cols) { return std::max<int64_t>(1, 65536 / (cols + 1)); }

// Tells a watcher how `count` units of work on the CPU are shared out.
void report_ranges(Watcher& watcher, int64_t count, int64_t grain, const char* unit);

// Calls body(Range) over [0, count) on torch's threads, at least `grain` at a time. For work whose
// result does not depend on where the ranges end. `unit`: what is counted, for a watcher.
template <typename Body>
void parallel_ranges(int64_t count, int64_t grain, const char* unit, Body body) {
  if (Watcher* seen = watcher(); seen && count > 0) report_ranges(*seen, count, grain, unit);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(Range{begin, end}); });
}

// Checks the arguments; on a CUDA device runs the kernel there and returns true.
template <typename Args>
bool run_on_cuda(const at::Tensor& like, const Args& args) {
  check(args);
  if (!like.is_cuda()) return false;
  const c10::OptionalDeviceGuard guard(like.device());
  const Stream stream = stream_of(like);
  if constexpr (with_cuda) run(args, stream);
  return true;
}

// What a watcher is told of sums over rows.
inline constexpr const char* unit_of_chunks = "chunk of rows, fixed by the shape,";
inline constexpr const char* unit_of_sums = "columns of the chunks' sums, added in index order,";

// Runs args' kernel on the device of `like`: on CUDA as a whole, on the CPU range by range.
template <typename Args>
void run_rows(const at::Tensor& like, const Args& args, int64_t rows, int64_t cols) {
  if (run_on_cuda(like, args)) return;
  parallel_ranges(rows, rows_per_task(cols), "rows, about 256 KB,",
                  [&](Range range) { run(args, range); });
}

// As run_rows(), for kernels whose range counts elements.
template <typename Args>
void run_elements(const at::Tensor& like, const Args& args, int64_t elements) {
  if (run_on_cuda(like, args)) return;
  parallel_ranges(elements, 32768, "elements", [&](Range range) { run(args, range); });
}

}  // namespace redline::ops
