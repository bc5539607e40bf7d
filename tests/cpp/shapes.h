// The dtypes and shapes that every kernel is run on.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "redline/core/dtype.h"

namespace redline::test {

struct Shape {
  DType dtype;
  int64_t rows, cols;
};

// Calls test(Shape) with each floating dtype and with matrices that are empty, tiny, odd, one over
// a vector, a chunk and a block.
template <typename Test>
void for_shapes(Test test) {
  for (DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16}) {
    for (int64_t rows : {0, 1, 3, 130}) {
      for (int64_t cols : {1, 3, 16, 33, 1025}) {
        SCOPED_TRACE(std::string(name(dtype)) + ", rows " + std::to_string(rows) + ", cols " +
                     std::to_string(cols));
        test(Shape{dtype, rows, cols});
      }
    }
  }
}

}  // namespace redline::test
