// The reasons of the launch that is to come, and of those behind it.
#pragma once

#include <string>
#include <string_view>

namespace redline::ops {

class Reasons {
 public:
  void add(std::string_view why) {
    if (spent_) text_.clear();
    spent_ = false;
    if (!text_.empty()) text_ += "; ";
    text_ += why;
  }

  // Launches without a new reason between them are of one choice.
  const std::string& of_launch() {
    spent_ = true;
    return text_;
  }

  // Whether a launch is still to come.
  bool pending() const { return !spent_ && !text_.empty(); }

 private:
  std::string text_;
  bool spent_ = false;
};

}  // namespace redline::ops
