// As much JSON as a safetensors header holds: objects, arrays, strings and whole numbers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace json {

struct Value {
  enum class Kind { number, string, array, object } kind = Kind::number;
  int64_t number = 0;
  std::string string;
  std::vector<Value> array;
  std::map<std::string, Value> object;

  // The value as a kind, or std::runtime_error that names `what`.
  const Value& expect(Kind wanted, const char* what) const;
};

// Throws std::runtime_error at the first byte that does not fit, and on nests deeper than 8.
Value parse(std::string_view text);

// With quotes, escaped.
std::string quote(std::string_view text);

}  // namespace json
