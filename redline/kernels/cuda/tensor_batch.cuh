// A list of tensors in one launch: the table travels by value in the kernel's parameters (32,764
// bytes of them from CUDA 12.1 on), so that there is nothing to copy and graphs capture it. A block
// works on one chunk of one tensor.
#pragma once

#include <cstdint>

#include "redline/kernels/cuda/device/vector.cuh"
#include "redline/kernels/cuda/launch.h"

namespace redline::cuda {
namespace {

// Entry has a member `count`, in elements.
template <typename Entry, int Capacity>
struct TensorBatch {
  static constexpr int capacity = Capacity;

  Entry tensors[Capacity];
  int first_chunk[Capacity + 1];  // of each tensor, and the number of chunks behind the last
  int size;

  // The tensor that a chunk of the batch lies in: never an empty one.
  __device__ __forceinline__ int find(int chunk) const {
    int low = 0, high = size;  // first_chunk[low] <= chunk < first_chunk[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};

// Where a batch lies in the list.
struct BatchStart {
  int64_t tensor, chunk;
};

// Calls launch_batch(batch, start) for the list in batches.
template <typename Batch, typename Entry, typename Launch>
void for_batches(const Entry* tensors, int64_t count, int64_t chunk_size, Launch launch_batch) {
  Batch batch;
  batch.size = 0;
  batch.first_chunk[0] = 0;
  BatchStart start = {};
  const auto flush = [&] {
    if (batch.size > 0) launch_batch(batch, start);
    start.tensor += batch.size;
    start.chunk += batch.first_chunk[batch.size];
    batch.size = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t chunks = batch.first_chunk[batch.size] + ceil_div(tensors[i].count, chunk_size);
    REDLINE_CHECK(chunks < INT32_MAX, "tensor list: expected fewer than 2^31 chunks, not ", chunks);
    batch.tensors[batch.size++] = tensors[i];
    batch.first_chunk[batch.size] = static_cast<int>(chunks);
    if (batch.size == Batch::capacity) flush();
  }
  flush();
}

// Four adjacent elements as they lie in memory, of Bytes each. Loading and converting are two
// steps: all loads of a thread are in flight before the first is used, and no branch stands between
// them.
template <int Bytes>
struct RawOf;
template <>
struct RawOf<4> {
  using type = uint4;
  using element = unsigned;
};
template <>
struct RawOf<2> {
  using type = uint2;
  using element = unsigned short;
};
template <int Bytes>
using Raw = typename RawOf<Bytes>::type;

// True when four elements may be one access.
__device__ __forceinline__ bool is_aligned4(const void* data, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % (dtype == DType::float32 ? 16 : 8) == 0;
}

// Elements [offset, offset + 4). Whole: they are aligned and there; otherwise zeros from count on.
template <int Bytes, bool Whole>
__device__ __forceinline__ Raw<Bytes> load_raw(const void* data, int64_t offset, int64_t count) {
  using Element = typename RawOf<Bytes>::element;
  const Element* from = static_cast<const Element*>(data) + offset;
  if constexpr (Whole) return *reinterpret_cast<const Raw<Bytes>*>(from);
  const int64_t left = count - offset;
  const unsigned x = left > 0 ? from[0] : 0u, y = left > 1 ? from[1] : 0u;
  const unsigned z = left > 2 ? from[2] : 0u, w = left > 3 ? from[3] : 0u;
  if constexpr (Bytes == 4) {
    return {x, y, z, w};
  } else {
    return {x | y << 16, z | w << 16};
  }
}

template <int Bytes, bool Whole>
__device__ __forceinline__ void store_raw(void* data, int64_t offset, int64_t count,
                                          Raw<Bytes> raw) {
  using Element = typename RawOf<Bytes>::element;
  Element* to = static_cast<Element*>(data) + offset;
  if constexpr (Whole) {
    store_whole(to, raw);
    return;
  }
  const Element* from = reinterpret_cast<const Element*>(&raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (offset + i < count) to[i] = from[i];
  }
}

__device__ __forceinline__ void to_floats(uint4 raw, DType, float (&values)[4]) {
  values[0] = __uint_as_float(raw.x);
  values[1] = __uint_as_float(raw.y);
  values[2] = __uint_as_float(raw.z);
  values[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ void to_floats(uint2 raw, DType dtype, float (&values)[4]) {
  if (dtype == DType::bfloat16) {
    values[0] = __uint_as_float(raw.x << 16);
    values[1] = __uint_as_float(raw.x & 0xffff0000u);
    values[2] = __uint_as_float(raw.y << 16);
    values[3] = __uint_as_float(raw.y & 0xffff0000u);
  } else {
    values[0] = to_float(__ushort_as_half(raw.x & 0xffffu));
    values[1] = to_float(__ushort_as_half(raw.x >> 16));
    values[2] = to_float(__ushort_as_half(raw.y & 0xffffu));
    values[3] = to_float(__ushort_as_half(raw.y >> 16));
  }
}

__device__ __forceinline__ unsigned round_pair(DType dtype, float low, float high) {
  const bool brain = dtype == DType::bfloat16;
  const unsigned short low_bits = brain ? __bfloat16_as_ushort(from_float<__nv_bfloat16>(low))
                                        : __half_as_ushort(from_float<__half>(low));
  const unsigned short high_bits = brain ? __bfloat16_as_ushort(from_float<__nv_bfloat16>(high))
                                         : __half_as_ushort(from_float<__half>(high));
  return low_bits | static_cast<unsigned>(high_bits) << 16;
}

// Rounds once.
template <int Bytes>
__device__ __forceinline__ Raw<Bytes> from_floats(DType dtype, const float (&values)[4]) {
  if constexpr (Bytes == 4) {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  } else {
    return {round_pair(dtype, values[0], values[1]), round_pair(dtype, values[2], values[3])};
  }
}

}  // namespace
}  // namespace redline::cuda
