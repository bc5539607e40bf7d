#include "json.h"

#include <cctype>
#include <limits>
#include <stdexcept>

namespace json {
namespace {

constexpr int deepest = 8;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value whole() {
    Value value = any(0);
    skip_space();
    if (at_ != text_.size()) fail();
    return value;
  }

 private:
  [[noreturn]] void fail() const {
    throw std::runtime_error("header: not the format's JSON at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  char next() {
    if (at_ >= text_.size()) fail();
    return text_[at_++];
  }

  void skip_space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') ++at_;
  }

  bool take(char wanted) {
    skip_space();
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }

  void need(char wanted) {
    if (!take(wanted)) fail();
  }

  Value any(int depth) {
    if (depth > deepest) fail();
    skip_space();
    if (peek() == '{') return object(depth);
    if (peek() == '[') return array(depth);
    Value value;
    if (peek() == '"') {
      value.kind = Value::Kind::string;
      value.string = string();
    } else {
      value.number = number();
    }
    return value;
  }

  Value object(int depth) {
    Value value;
    value.kind = Value::Kind::object;
    need('{');
    if (take('}')) return value;
    do {
      skip_space();
      const std::string key = string();
      need(':');
      if (!value.object.emplace(key, any(depth + 1)).second) fail();  // a key twice
    } while (take(','));
    need('}');
    return value;
  }

  Value array(int depth) {
    Value value;
    value.kind = Value::Kind::array;
    need('[');
    if (take(']')) return value;
    do {
      value.array.push_back(any(depth + 1));
    } while (take(','));
    need(']');
    return value;
  }

  int64_t number() {
    if (!std::isdigit(static_cast<unsigned char>(peek()))) fail();
    int64_t value = 0;
    while (std::isdigit(static_cast<unsigned char>(peek()))) {
      const int64_t digit = next() - '0';
      if (value > (std::numeric_limits<int64_t>::max() - digit) / 10) fail();
      value = value * 10 + digit;
    }
    return value;
  }

  std::string string() {
    if (next() != '"') fail();
    std::string out;
    for (char c = next(); c != '"'; c = next()) out += c == '\\' ? escaped() : c;
    return out;
  }

  char escaped() {
    switch (next()) {
      case '"':
        return '"';
      case '\\':
        return '\\';
      case '/':
        return '/';
      case 'n':
        return '\n';
      case 't':
        return '\t';
      default:
        fail();
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Value& Value::expect(Kind wanted, const char* what) const {
  if (kind != wanted) throw std::runtime_error(std::string("header: ") + what + " is malformed");
  return *this;
}

Value parse(std::string_view text) { return Parser(text).whole(); }

std::string quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace json
