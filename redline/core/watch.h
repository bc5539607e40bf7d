// Who watches the library at work: an explanation that records launches and their reasons, strict
// mode that refuses slower paths, a log of choices. With nobody watching, each question here costs
// the load of one integer.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

#include "redline/core/check.h"

namespace redline {

// One launch of a CUDA kernel, one division of a CPU kernel's work over the threads, or one call of
// a library that launches its own.
struct Launch {
  std::string kernel;            // CUDA: its mangled name; CPU: empty, the op names it
  int64_t grid[3] = {1, 1, 1};   // blocks; CPU: tasks
  int64_t block[3] = {1, 1, 1};  // threads of a block; CPU: threads that share the tasks
  int64_t shared_bytes = 0;      // those asked for at the launch
  int cluster = 1;               // blocks per cluster
  bool by_library = false;       // kernel is the function called; the rest is not known
};

// A slower path than the op has; other arguments would avoid it.
struct Fallback {
  const char* op;
  const char* tensor;   // or the option
  const char* instead;  // what the caller changes: "give x.contiguous()"
};

class Watcher {
 public:
  virtual ~Watcher() = default;
  // Why the next launch is what it is.
  virtual void choice(std::string_view why) = 0;
  // May throw Error: strict mode.
  virtual void fallback(const Fallback& fallback, std::string_view why) = 0;
  virtual void launch(const Launch& launch) = 0;
  // What the op reads and writes, where that is not its tensors as a whole.
  virtual void bytes(int64_t count) = 0;
};

// How many watchers there are in the process, and what finds the one of this thread.
inline std::atomic<int> watchers{0};
inline std::atomic<Watcher* (*)()> find_watcher{nullptr};

// Null, nearly always.
inline Watcher* watcher() {
  if (watchers.load(std::memory_order_relaxed) == 0) [[likely]]
    return nullptr;
  return find_watcher.load()();
}

// The reason for the launch that follows, in pieces: put together only for a watcher.
template <typename... Pieces>
void note_choice(const Pieces&... why) {
  if (Watcher* seen = watcher()) seen->choice(message(why...));
}

// Called before the slower path does anything.
template <typename... Pieces>
void note_fallback(const Fallback& fallback, const Pieces&... why) {
  if (Watcher* seen = watcher()) seen->fallback(fallback, message(why...));
}

inline void note_bytes(int64_t count) {
  if (Watcher* seen = watcher()) seen->bytes(count);
}

}  // namespace redline
