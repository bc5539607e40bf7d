// What an op does, step by step: redline.explain asks (python/redline/explanation.py).
#pragma once

#include <torch/custom_class.h>

#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "redline/core/watch.h"
#include "redline/ops/reasons.h"
#include "redline/ops/torch.h"

namespace redline::ops {

// A step is the innermost op that launches, of ours or of torch.
class Recorder : public torch::CustomClassHolder {
 public:
  struct Step {
    std::string op;
    int64_t bytes;  // inputs read once, outputs written once
  };
  struct StepLaunch {
    int64_t step;
    std::string kernel;          // empty for a CPU kernel; the op's name for one of torch's
    std::vector<int64_t> shape;  // grid, block, shared bytes, cluster; empty for a library's
    std::string why;
  };

  // Between the two, what this thread does and the backward passes that it starts.
  static void start(const c10::intrusive_ptr<Recorder>& self);
  void stop();

  // In the forms of torch's registry.
  std::vector<std::tuple<std::string, int64_t>> steps() const;
  std::vector<std::tuple<int64_t, std::string, std::vector<int64_t>, std::string>> launches() const;
  std::vector<std::string> fallbacks() const { return fallbacks_; }

  void choice(std::string_view why);
  void fallback(const Fallback& fallback, std::string_view why);
  void launch(const Launch& launch);
  void bytes(int64_t count);

  void begin_op(const std::string& op, int64_t bytes_in);
  // `computes`: it is no view, no allocation and no question about a tensor.
  void end_op(int64_t bytes_out, bool computes);

 private:
  struct Frame {
    std::string op;
    int64_t bytes;
    int64_t stated_bytes = -1;
    int64_t step = -1;  // its place among the steps, once it launched
    bool has_steps = false;
    Reasons reasons;
  };

  // The ops that run on this thread, behind an entry for what is outside of any.
  std::vector<Frame>& frames();
  int64_t add_step(const std::string& op, int64_t bytes);
  // Those that an op around torch's gave for it.
  std::string pending_reasons();

  std::mutex mutex_;  // backward runs on a thread for each device
  std::map<std::thread::id, std::vector<Frame>> frames_;
  std::vector<Step> steps_;
  std::vector<StepLaunch> launches_;
  std::vector<std::string> fallbacks_;
  uint64_t callback_ = 0;
};

}  // namespace redline::ops
