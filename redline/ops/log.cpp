#include "redline/ops/log.h"

#include <ATen/record_function.h>
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "redline/ops/reasons.h"

namespace redline::ops {
namespace {

// Of this thread: the ops of ours that are running, and the reasons for the next launch.
thread_local std::vector<std::string> running;
thread_local Reasons reasons;

struct Pushed : at::ObserverContext {};

std::unique_ptr<at::ObserverContext> begin_op(const at::RecordFunction& function) {
  const std::string_view name = function.name();
  if (!name.starts_with("redline::")) return nullptr;
  running.emplace_back(name.substr(9));
  reasons = {};
  return std::make_unique<Pushed>();
}

void end_op(const at::RecordFunction&, at::ObserverContext* context) {
  if (context == nullptr) return;
  running.pop_back();
  reasons = {};
}

class Log final : public Watcher {
 public:
  Log() {
    at::addGlobalCallback(at::RecordFunctionCallback(begin_op, end_op)
                              .scopes({
                                  at::RecordScope::FUNCTION,
                              }));
    ++watchers;
  }

  // Outside of our ops it is of a kernel of torch's, which is not logged.
  void choice(std::string_view why) override {
    if (!running.empty()) reasons.add(why);
  }

  void fallback(const Fallback& fallback, std::string_view why) override {
    choice(message(fallback.tensor, ": ", why));
    const std::string line = "fallback: " + sentence(fallback, why);
    once(line, line);
  }

  // The grid and the number of tasks follow from the shape: they are no choice of their own.
  void launch(const Launch& launch) override {
    const auto dims = [](const int64_t(&sizes)[3]) {
      return message(sizes[0], " x ", sizes[1], " x ", sizes[2]);
    };
    const std::string op = running.empty() ? "redline" : running.back();
    const std::string why = ": " + reasons.of_launch();
    if (launch.kernel.empty()) {
      return once(op + why, message(op, ": cpu kernel, ", launch.grid[0], " tasks, ",
                                    launch.block[0], " threads", why));
    }
    if (launch.by_library) {
      const std::string line = message(op, ": ", launch.kernel, why);
      return once(line, line);
    }
    const std::string chosen = message(", block ", dims(launch.block), ", ", launch.shared_bytes,
                                       " bytes shared, cluster of ", launch.cluster, why);
    once(op + launch.kernel + chosen,
         message(op, ": ", readable_kernel(launch.kernel), ", grid ", dims(launch.grid), chosen));
  }

  void bytes(int64_t) override {}

 private:
  void once(const std::string& choice, const std::string& line) {
    const std::lock_guard lock(mutex_);
    if (seen_.insert(choice).second) std::fputs(("redline: " + line + "\n").c_str(), stderr);
  }

  std::mutex mutex_;
  std::unordered_set<std::string> seen_;
};

// The one place that reads the environment. It is never destroyed: threads may outlive main.
Log* const wanted = [] {
  const char* asked = std::getenv("REDLINE_LOG");
  return asked != nullptr && std::string_view(asked) == "kernels" ? new Log : nullptr;
}();

// Without every occurrence of `part`.
std::string without(std::string text, std::string_view part) {
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part)) {
    text.erase(at, part.size());
  }
  return text;
}

}  // namespace

Watcher* log() { return wanted; }

std::string sentence(const Fallback& fallback, std::string_view why) {
  return message(fallback.op, ": ", fallback.tensor, ": ", why, "; ", fallback.instead);
}

std::string readable_kernel(const std::string& mangled) {
  int status = 0;
  char* const demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  if (demangled == nullptr) return mangled;
  std::string text = demangled;
  std::free(demangled);
  text = without(std::move(text), "(anonymous namespace)::");
  text = without(std::move(text), "redline::cuda::");
  if (text.starts_with("void ")) text.erase(0, 5);
  // The parameters: what the last brackets of the outermost level hold.
  int depth = 0;
  for (size_t at = text.size(); at-- > 0;) {
    if (text[at] == ')') ++depth;
    if (text[at] == '(' && --depth == 0) return text.substr(0, at);
  }
  return text;
}

}  // namespace redline::ops
