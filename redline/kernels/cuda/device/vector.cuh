// Over budget: parameters: scalars in registers; a struct of them would name nothing more.
// Over budget: template parameters: all but the first are deduced.
//
// 16-byte accesses within a row (columns are int: a row is shorter than 2^31). The aligned and the
// element-by-element path give a thread the same elements, so that an op's bits do not depend on
// where its tensors lie.
#pragma once

#include <cstdint>
#include <type_traits>

#include "redline/kernels/cuda/device/convert.cuh"

namespace redline::cuda {

template <typename T>
inline constexpr int vector_size = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes

// N adjacent elements as they lie in memory: 16 bytes, or 32 where float32 stands beside 16 bits.
template <typename T, int N = vector_size<T>>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Packed {
  T values[N];
};

// Two 16-bit elements, as the instructions on pairs take them.
template <typename T>
using pair_of = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;

// One of them as float32. The upper of two bfloat16 takes one instruction here, by itself two.
template <typename T, int N>
__device__ __forceinline__ float element(const Packed<T, N>& packed, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    const uint32_t two = reinterpret_cast<const uint32_t*>(packed.values)[i / 2];
    return __uint_as_float(i % 2 == 0 ? two << 16 : two & 0xffff0000u);
  } else {
    return to_float(packed.values[i]);
  }
}

// By accesses of 16 bytes (or 8) where it has as many: a store by assignment is cut into the
// elements where the compiler knows them one by one.
template <typename Vector>
__device__ __forceinline__ void store_whole(void* to, const Vector& value) {
  const size_t at = __cvta_generic_to_global(to);
  if constexpr (sizeof(Vector) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Vector)) / 16; ++i) {
      const uint4 words = reinterpret_cast<const uint4*>(&value)[i];
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at + 16 * i), "r"(words.x),
                   "r"(words.y), "r"(words.z), "r"(words.w)
                   : "memory");
    }
  } else if constexpr (sizeof(Vector) == 8) {
    const uint2 words = reinterpret_cast<const uint2&>(value);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(words.x), "r"(words.y)
                 : "memory");
  } else {
    *static_cast<Vector*>(to) = value;
  }
}

// Of 16 bytes past the caches, which are left to what is read again.
template <typename Vector>
__device__ __forceinline__ void store_streaming(void* to, const Vector& value) {
  if constexpr (sizeof(Vector) == 16) {
    __stcs(static_cast<int4*>(to), reinterpret_cast<const int4&>(value));
  } else {
    store_whole(to, value);
  }
}

// Elements [col, col + N) of a row of `cols`; zeros from cols on.
template <typename T, int N = vector_size<T>>
__device__ __forceinline__ Packed<T, N> load(const T* row, int col, int cols, bool aligned) {
  Packed<T, N> result;
  if (aligned && col + N <= cols) {
    result = *reinterpret_cast<const Packed<T, N>*>(row + col);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      result.values[i] = col + i < cols ? row[col + i] : from_float<T>(0.0f);
    }
  }
  return result;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* row, int col, int cols, bool aligned,
                                      const Packed<T, N>& packed) {
  if (aligned && col + N <= cols) {
    *reinterpret_cast<Packed<T, N>*>(row + col) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (col + i < cols) row[col + i] = packed.values[i];
    }
  }
}

// Rounds in pairs: one conversion instruction for two 16-bit values (a single one runs at a quarter
// of the rate).
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> pack(const float (&values)[N]) {
  static_assert(N == 1 || N % 2 == 0);
  Packed<T, N> packed;
  if constexpr (N == 1 || std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < N; ++i) packed.values[i] = from_float<T>(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        reinterpret_cast<__nv_bfloat162*>(packed.values)[i / 2] =
            __floats2bfloat162_rn(values[i], values[i + 1]);
      } else {
        reinterpret_cast<__half2*>(packed.values)[i / 2] =
            __floats2half2_rn(values[i], values[i + 1]);
      }
    }
  }
  return packed;
}

// Which vectors of a row a thread holds: at col, col + step, ... below cols. Aligned: each of them
// whole and at a multiple of 16 bytes. Known to the compiler, so that nothing stands between the
// loads of a thread: each would wait for the one before (H100, norm forward: 0.82 of the rate).
template <bool Aligned>
struct Columns {
  int col, step, cols;

  // The same from the k-th vector on.
  __device__ __forceinline__ Columns from(int k) const { return {col + k * step, step, cols}; }
};

// V of them; zeros past the row's end.
template <typename T, int V, int N, bool Aligned>
__device__ __forceinline__ void load_vectors(const T* row, Columns<Aligned> at,
                                             Packed<T, N> (&out)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if constexpr (Aligned) {
      out[v] = {};
      if (col < at.cols) out[v] = *reinterpret_cast<const Packed<T, N>*>(row + col);
    } else {
      out[v] = load<T, N>(row, col, at.cols, false);
    }
  }
}

template <typename T, int V, int N, bool Aligned>
__device__ __forceinline__ void store_vectors(T* row, Columns<Aligned> at,
                                              const float (&values)[V][N]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if constexpr (Aligned) {
      if (col < at.cols) *reinterpret_cast<Packed<T, N>*>(row + col) = pack<T>(values[v]);
    } else {
      store(row, col, at.cols, false, pack<T>(values[v]));
    }
  }
}

// Forgets the float32 values of 16-bit vectors: the compiler would rather hold them, in twice the
// registers, than widen them again.
template <typename T, int N, int V>
__device__ __forceinline__ void forget_wide(Packed<T, N> (&packed)[V]) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      auto& words = reinterpret_cast<uint32_t(&)[N / 2]>(packed[v]);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) asm volatile("" : "+r"(words[i]));
    }
  }
}

// A row that holds T or float32: a weight beside 16-bit data, a float32 residual.
struct MixedRow {
  const void* data;
  int64_t offset;  // elements before the row
  bool is_float32;
};

// The same as float32; take(value, loaded) says what becomes of each element.
template <typename T, int V, int N, bool Aligned, typename Take>
__device__ __forceinline__ void take_vectors(MixedRow row, Columns<Aligned> at,
                                             float (&values)[V][N], Take take) {
  const auto load_as = [&]<typename S>(const S* data) {
    Packed<S, N> raw[V];
    load_vectors(data + row.offset, at, raw);
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) take(values[v][i], element(raw[v], i));
    }
  };
  if (sizeof(T) == 4 || row.is_float32) {
    load_as(static_cast<const float*>(row.data));
  } else {
    load_as(static_cast<const T*>(row.data));
  }
}

// Into a tensor that holds T or float32; `values` are left as they read back.
template <typename T, int N = vector_size<T>>
__device__ __forceinline__ void store_mixed(void* data, bool is_float32, int64_t offset, int col,
                                            int cols, bool aligned, float (&values)[N]) {
  if (sizeof(T) == 4 || is_float32) {
    float* row = static_cast<float*>(data) + offset;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Packed<float, 4> part = {values[i], values[i + 1], values[i + 2], values[i + 3]};
      store(row, col + i, cols, aligned, part);
    }
  } else {
    const Packed<T, N> packed = pack<T>(values);
    store(static_cast<T*>(data) + offset, col, cols, aligned, packed);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = element(packed, i);
  }
}

// Elements [col, end) of row `row`, N of them or fewer. Aligned: N of them, at a multiple of 16
// bytes. Known to the compiler, so that nothing stands between the loads of a thread: with a test
// of it before each, relu ran at 0.75 of a copy (H200).
template <bool Aligned>
struct Place {
  int64_t row;
  int col, end;
};

template <typename T, bool Aligned, int N = vector_size<T>>
__device__ __forceinline__ Packed<T, N> load(const T* row, const Place<Aligned>& at) {
  if constexpr (Aligned) {
    return *reinterpret_cast<const Packed<T, N>*>(row + at.col);
  } else {
    return load<T, N>(row, at.col, at.end, false);
  }
}

template <typename T, int N, bool Aligned>
__device__ __forceinline__ void store(T* row, const Place<Aligned>& at,
                                      const Packed<T, N>& packed) {
  if constexpr (Aligned) {
    *reinterpret_cast<Packed<T, N>*>(row + at.col) = packed;
  } else {
    store(row, at.col, at.end, false, packed);
  }
}

// One vector of a mixed row.
template <typename T, bool Aligned, int N = vector_size<T>>
__device__ __forceinline__ void load_mixed(const MixedRow& row, const Place<Aligned>& at,
                                           float (&values)[N]) {
  const auto load_as = [&]<typename S>(const S* data) {
    const Packed<S, N> raw = load<S, Aligned, N>(data + row.offset, at);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = element(raw, i);
  };
  if (sizeof(T) == 4 || row.is_float32) {
    load_as(static_cast<const float*>(row.data));
  } else {
    load_as(static_cast<const T*>(row.data));
  }
}

// values = packed + that of the row, where there is one.
template <typename T, bool Aligned, int N = vector_size<T>>
__device__ __forceinline__ void add_mixed(const MixedRow& row, const Place<Aligned>& at,
                                          const Packed<T, N>& packed, float (&values)[N]) {
  if (row.data != nullptr) {
    load_mixed<T>(row, at, values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = element(packed, i) + values[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = element(packed, i);
  }
}

}  // namespace redline::cuda
