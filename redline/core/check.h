// Errors: one exception, one macro, one function.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace redline {

// Thrown for every refused argument and failed call; torch turns it into a Python RuntimeError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The text of one piece of a message: strings as they are, numbers in decimal, others by to_text.
template <typename T>
std::string message_piece(const T& piece) {
  if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    return std::string(std::string_view(piece));
  } else if constexpr (std::is_arithmetic_v<T>) {
    return std::to_string(piece);
  } else {
    return to_text(piece);  // found by argument-dependent lookup
  }
}

// The pieces side by side.
template <typename... Pieces>
std::string message(const Pieces&... pieces) {
  return (message_piece(pieces) + ...);
}

// Throws Error with the pieces and, in brackets, the file's name and the line.
template <typename... Pieces>
[[noreturn]] void fail(const char* file, int line, const Pieces&... pieces) {
  const std::string_view path = file;
  const std::string name(path.substr(path.rfind('/') + 1));
  throw Error(message(pieces...) + " (" + name + ":" + std::to_string(line) + ")");
}

}  // namespace redline

// REDLINE_CHECK(condition, "op: tensor: expected ", value, ", not ", value);
#define REDLINE_CHECK(condition, ...)                                   \
  do {                                                                  \
    if (!(condition)) ::redline::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)
