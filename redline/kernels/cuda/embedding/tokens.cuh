// What both directions of embedding know of the tokens.
#pragma once

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/vector.cuh"
#include "redline/kernels/cuda/launch.h"
#include "redline/kernels/embedding.h"

namespace redline::cuda {
namespace {

struct Tokens {
  const void* data;
  bool is_int64;
  int64_t count;
  int64_t vocabulary;
};

Tokens tokens_of(const TensorView& tokens, int64_t vocabulary) {
  return {tokens.data, tokens.dtype == DType::int64, tokens.sizes[0], vocabulary};
}

// -1 for a token outside the vocabulary.
__device__ __forceinline__ int64_t read_token(const Tokens& tokens, int64_t i) {
  const int64_t token = tokens.is_int64 ? static_cast<const int64_t*>(tokens.data)[i]
                                        : static_cast<const int32_t*>(tokens.data)[i];
  return token >= 0 && token < tokens.vocabulary ? token : -1;
}

template <typename T, int V>
__device__ __forceinline__ Packed<T, V> load_at(const T* from) {
  return *reinterpret_cast<const Packed<T, V>*>(from);
}

}  // namespace
}  // namespace redline::cuda
