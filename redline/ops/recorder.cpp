#include "redline/ops/recorder.h"

#include <ATen/record_function.h>

#include <algorithm>

#include "redline/ops/log.h"
#include "redline/ops/watch.h"

namespace redline::ops {
namespace {

// Bytes that the tensor reaches: an expanded axis once.
int64_t bytes_of(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.layout() != at::kStrided) return 0;
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) == 0 || tensor.stride(i) != 0) bytes *= tensor.size(i);
  }
  return bytes;
}

int64_t bytes_of(const c10::IValue& value) {
  int64_t bytes = 0;
  if (value.isTensor()) return bytes_of(value.toTensor());
  if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) bytes += bytes_of(tensor);
  }
  return bytes;
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Whether what is written is not read first: out= arguments, and these.
bool only_written(const c10::FunctionSchema& schema, size_t argument) {
  const std::string& op = schema.name();
  return schema.arguments()[argument].is_out() || op == "aten::copy_" || op == "aten::fill_" ||
         op == "aten::zero_";
}

// Whether what is written is added to: where an op has the choice, as the call says.
bool accumulates(const at::RecordFunction& function, const c10::FunctionSchema& schema) {
  const auto index = schema.argumentIndexWithName("accumulate");
  const auto inputs = function.inputs();
  if (!index || static_cast<size_t>(*index) >= inputs.size()) return true;
  return !inputs[*index].isBool() || inputs[*index].toBool();
}

int64_t input_bytes(const at::RecordFunction& function, const c10::FunctionSchema& schema) {
  const auto inputs = function.inputs();
  const bool adds = accumulates(function, schema);
  int64_t bytes = 0;
  for (size_t i = 0; i < std::min(inputs.size(), schema.arguments().size()); ++i) {
    const bool twice = is_written(schema.arguments()[i]) && !only_written(schema, i) && adds;
    bytes += bytes_of(inputs[i]) * (twice ? 2 : 1);
  }
  return bytes;
}

// Outputs that are no argument.
int64_t output_bytes(const at::RecordFunction& function, const c10::FunctionSchema& schema) {
  const auto& outputs = function.outputs();
  int64_t bytes = 0;
  for (size_t i = 0; i < std::min(outputs.size(), schema.returns().size()); ++i) {
    if (schema.returns()[i].alias_info() == nullptr) bytes += bytes_of(outputs[i]);
  }
  return bytes;
}

// Ops of torch that move nothing: they allocate, or give the same memory another shape.
bool computes(const c10::FunctionSchema& schema) {
  const std::string& op = schema.name();
  for (const char* none : {"aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::resize",
                           "aten::set_", "aten::_local_scalar_dense", "aten::_has_compatible",
                           "aten::_fused_sdp_choice", "aten::result_type", "aten::is_"}) {
    if (op.starts_with(none)) return false;
  }
  if (!op.starts_with("aten::") || schema.returns().empty()) return false;
  return std::none_of(schema.returns().begin(), schema.returns().end(), [](const auto& returned) {
    return returned.alias_info() != nullptr && !returned.alias_info()->isWrite();
  });
}

// Ops of torch whose inner ops are their own business: products, which copy their bias, fused
// kernels, and allocations that fill.
bool is_closed(const std::string& op) {
  if (op.starts_with("aten::empty")) return true;
  for (const char* product : {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}) {
    if (op == product) return true;
  }
  return op.starts_with("aten::_scaled_dot_product_") && op.find("math") == std::string::npos;
}

struct Recorded : at::ObserverContext {
  explicit Recorded(c10::intrusive_ptr<Recorder> by) : recorder(std::move(by)) {}
  c10::intrusive_ptr<Recorder> recorder;
};

std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction& function) {
  const Watch* watch = Watch::current();
  const auto schema = function.operator_schema();
  if (watch == nullptr || !watch->recorder() || !schema) return nullptr;
  watch->recorder()->begin_op(schema->name(), input_bytes(function, *schema));
  return std::make_unique<Recorded>(watch->recorder());
}

void end(const at::RecordFunction& function, at::ObserverContext* context) {
  if (context == nullptr) return;
  const auto schema = function.operator_schema();
  static_cast<Recorded*>(context)->recorder->end_op(output_bytes(function, *schema),
                                                    computes(*schema));
}

}  // namespace

void Recorder::start(const c10::intrusive_ptr<Recorder>& self) {
  TORCH_CHECK(self->callback_ == 0, "Recorder: start: expected one that is not running");
  Watch::push(/*strict=*/false, self);
  self->callback_ = at::addThreadLocalCallback(at::RecordFunctionCallback(begin, end)
                                                   .needsInputs(true)
                                                   .needsOutputs(true)
                                                   .scopes({at::RecordScope::FUNCTION}));
}

void Recorder::stop() {
  TORCH_CHECK(callback_ != 0, "Recorder: stop: expected one that is running");
  at::removeCallback(callback_);
  callback_ = 0;
  Watch::pop();
}

std::vector<std::tuple<std::string, int64_t>> Recorder::steps() const {
  std::vector<std::tuple<std::string, int64_t>> result;
  for (const Step& step : steps_) result.emplace_back(step.op, step.bytes);
  return result;
}

std::vector<std::tuple<int64_t, std::string, std::vector<int64_t>, std::string>>
Recorder::launches() const {
  std::vector<std::tuple<int64_t, std::string, std::vector<int64_t>, std::string>> result;
  for (const StepLaunch& launch : launches_) {
    result.emplace_back(launch.step, launch.kernel, launch.shape, launch.why);
  }
  return result;
}

void Recorder::choice(std::string_view why) {
  const std::lock_guard lock(mutex_);
  frames().back().reasons.add(why);
}

void Recorder::fallback(const Fallback& fallback, std::string_view why) {
  choice(message(fallback.tensor, ": ", why));
  const std::lock_guard lock(mutex_);
  std::string found = sentence(fallback, why);
  if (std::find(fallbacks_.begin(), fallbacks_.end(), found) == fallbacks_.end()) {
    fallbacks_.push_back(std::move(found));
  }
}

void Recorder::launch(const Launch& launch) {
  const std::lock_guard lock(mutex_);
  Frame& frame = frames().back();
  if (frame.step < 0) frame.step = add_step(frame.op, 0);
  std::vector<int64_t> shape;
  if (!launch.by_library) {
    shape.assign(launch.grid, launch.grid + 3);
    shape.insert(shape.end(), launch.block, launch.block + 3);
    shape.insert(shape.end(), {launch.shared_bytes, launch.cluster});
  }
  launches_.push_back({frame.step, launch.kernel.empty() ? "" : readable_kernel(launch.kernel),
                       std::move(shape), frame.reasons.of_launch()});
}

void Recorder::bytes(int64_t count) {
  const std::lock_guard lock(mutex_);
  frames().back().stated_bytes = count;
}

void Recorder::begin_op(const std::string& op, int64_t bytes_in) {
  const std::lock_guard lock(mutex_);
  frames().push_back({.op = op, .bytes = bytes_in, .reasons = {}});
}

void Recorder::end_op(int64_t bytes_out, bool computes) {
  const std::lock_guard lock(mutex_);
  const Frame frame = std::move(frames().back());
  frames().pop_back();
  const bool inside = std::any_of(frames().begin(), frames().end(),
                                  [](const Frame& outer) { return is_closed(outer.op); });
  const int64_t bytes = frame.stated_bytes >= 0 ? frame.stated_bytes : frame.bytes + bytes_out;
  bool has_steps = frame.has_steps;
  if (frame.step >= 0) {
    steps_[frame.step].bytes = bytes;
  } else if (computes && !has_steps && !inside) {
    const int64_t step = add_step(frame.op, bytes);
    launches_.push_back({step, frame.op, {}, pending_reasons()});
    has_steps = true;
  }
  frames().back().has_steps |= has_steps;
}

std::vector<Recorder::Frame>& Recorder::frames() {
  std::vector<Frame>& found = frames_[std::this_thread::get_id()];
  if (found.empty()) found.push_back({.op = "redline", .bytes = 0, .reasons = {}});
  return found;
}

int64_t Recorder::add_step(const std::string& op, int64_t bytes) {
  steps_.push_back({op, bytes});
  return static_cast<int64_t>(steps_.size()) - 1;
}

std::string Recorder::pending_reasons() {
  for (auto frame = frames().rbegin(); frame != frames().rend(); ++frame) {
    if (frame->reasons.pending()) return frame->reasons.of_launch();
  }
  return {};
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.class_<Recorder>("Recorder")
      .def(torch::init<>())
      .def("start", &Recorder::start)
      .def("stop", &Recorder::stop)
      .def("steps", &Recorder::steps)
      .def("launches", &Recorder::launches)
      .def("fallbacks", &Recorder::fallbacks);
}

}  // namespace redline::ops
