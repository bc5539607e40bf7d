// The row of the table that each instruction set's copy of embedding.cpp fills.
#pragma once

#include "redline/kernels/embedding.h"

namespace redline::cpu {

struct EmbeddingKernels {
  void (*forward)(const EmbeddingForward&, Range tokens);
  void (*backward)(const EmbeddingBackward&, Range vocabulary);
};

namespace baseline {
extern const EmbeddingKernels embedding_kernels;
}
namespace avx2 {
extern const EmbeddingKernels embedding_kernels;
}
namespace avx512 {
extern const EmbeddingKernels embedding_kernels;
}

}  // namespace redline::cpu
