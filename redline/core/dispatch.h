// From a run-time dtype or value to a compile-time one. At most two visitors nest.
#pragma once

#include <string>

#include "redline/core/check.h"
#include "redline/core/dtype.h"

namespace redline {

// Calls visit.operator()<T>() with the element type that `dtype` names.
template <typename... Ts, typename Visit>
void visit_dtype(const char* what, DType dtype, Visit&& visit) {
  const bool found = ((dtype == dtype_of<Ts> && (visit.template operator()<Ts>(), true)) || ...);
  REDLINE_CHECK(found, what, ": no kernel for ", dtype);
}

// Calls visit.operator()<Value>() when `value` is one of the compiled Values.
template <int... Values, typename Visit>
void visit_value(const char* what, int value, Visit&& visit) {
  const bool found = ((value == Values && (visit.template operator()<Values>(), true)) || ...);
  REDLINE_CHECK(found, what, ": no kernel for ", value,
                "; built:", ((" " + std::to_string(Values)) + ...));
}

// Calls visit.operator()<bool>().
template <typename Visit>
void visit_bool(bool value, Visit&& visit) {
  if (value) {
    visit.template operator()<true>();
  } else {
    visit.template operator()<false>();
  }
}

}  // namespace redline
