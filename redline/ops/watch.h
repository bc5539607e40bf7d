// Who watches a thread, and the threads of the backward passes that it starts: torch carries it
// there with the thread's state.
#pragma once

#include <c10/util/ThreadLocalDebugInfo.h>

#include "redline/core/watch.h"
#include "redline/ops/recorder.h"
#include "redline/ops/torch.h"

namespace redline::ops {

class Watch final : public c10::DebugInfoBase, public Watcher {
 public:
  Watch(bool strict, c10::intrusive_ptr<Recorder> recorder)
      : strict_(strict), recorder_(std::move(recorder)) {}

  // The one of this thread; null for none.
  static Watch* current();
  // Begins to watch, until the pop() on the same thread. Pairs nest.
  static void push(bool strict, c10::intrusive_ptr<Recorder> recorder);
  static void pop();

  bool strict() const { return strict_; }
  const c10::intrusive_ptr<Recorder>& recorder() const { return recorder_; }

  void choice(std::string_view why) override;
  void fallback(const Fallback& fallback, std::string_view why) override;
  void launch(const Launch& launch) override;
  void bytes(int64_t count) override;

 private:
  bool strict_;
  c10::intrusive_ptr<Recorder> recorder_;
};

}  // namespace redline::ops
