#include "redline/ops/watch.h"

#include "redline/ops/log.h"

namespace redline::ops {
namespace {

// No kind of torch's own; torch keeps the entries in a list and compares the numbers.
constexpr auto kind = static_cast<c10::DebugInfoKind>(0x52);

Watcher* find() {
  if (Watch* watch = Watch::current()) return watch;
  return log();
}

// When the library is loaded, before anyone watches.
const bool is_found = (find_watcher.store(find), true);

}  // namespace

Watch* Watch::current() {
  if (watchers.load(std::memory_order_relaxed) == 0) return nullptr;
  return static_cast<Watch*>(c10::ThreadLocalDebugInfo::get(kind));
}

void Watch::push(bool strict, c10::intrusive_ptr<Recorder> recorder) {
  c10::ThreadLocalDebugInfo::_push(kind, std::make_shared<Watch>(strict, std::move(recorder)));
  ++watchers;
}

void Watch::pop() {
  c10::ThreadLocalDebugInfo::_pop(kind);
  --watchers;
}

void Watch::choice(std::string_view why) {
  if (recorder_) recorder_->choice(why);
  if (Watcher* logged = log()) logged->choice(why);
}

void Watch::fallback(const Fallback& fallback, std::string_view why) {
  if (recorder_) recorder_->fallback(fallback, why);
  if (Watcher* logged = log()) logged->fallback(fallback, why);
  if (strict_) throw Error(sentence(fallback, why) + " (strict mode)");
}

void Watch::launch(const Launch& launch) {
  if (recorder_) recorder_->launch(launch);
  if (Watcher* logged = log()) logged->launch(launch);
}

void Watch::bytes(int64_t count) {
  if (recorder_) recorder_->bytes(count);
}

}  // namespace redline::ops
