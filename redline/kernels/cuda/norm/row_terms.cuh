// Over budget: parameters: what a block keeps in registers, beside its arguments.
//
// A thread's part of one row of norm's backward: how it comes through shared memory, and the two
// passes over it.
#pragma once

#include "redline/kernels/cuda/device/row_ring.cuh"
#include "redline/kernels/cuda/norm/plan.h"
#include "redline/kernels/cuda/norm/row_gradient.cuh"

namespace redline::cuda {
namespace {

using Ring = RowRing<most_threads>;

// A thread's pieces of a row in the ring, by the first of each tensor's.
template <typename Form>
struct RowPieces {
  using T = typename Form::T;
  using X = typename Form::X;
  static constexpr int N = vector_size<T>, x_size = sizeof(Packed<X, N>) / 16;
  static constexpr int x = 0, y_grad = x + x_size, sum_grad = y_grad + 1;

  static constexpr int count(bool has_sum_grad) { return sum_grad + (has_sum_grad ? x_size : 0); }
};

// Element `col` of a row whose stride in bytes is given.
template <typename S>
__device__ __forceinline__ S* at_row(const Matrix& of, uint32_t row, uint32_t stride, int col) {
  return reinterpret_cast<S*>(static_cast<char*>(of.data) + uint64_t{row} * stride) + col;
}

template <typename Form>
__device__ __forceinline__ void request_row(const Backward& args, const Ring& ring, int slot,
                                            uint32_t row, bool any, int col) {
  using Pieces = RowPieces<Form>;
  using T = typename Form::T;
  using X = typename Form::X;
  constexpr int N = vector_size<T>;
  constexpr bool Aligned = Form::aligned;
  const Layout& in = args.layout;
  const int left = args.cols - col;
  if (any && left > 0) {
    ring.request<Aligned, X, N>(slot, Pieces::x, at_row<const X>(args.x, row, in.x, col), left);
    ring.request<Aligned, T, N>(slot, Pieces::y_grad,
                                at_row<const T>(args.y_grad, row, in.y_grad, col), left);
    if (args.sum_grad.data != nullptr) {
      ring.request<Aligned, X, N>(slot, Pieces::sum_grad,
                                  at_row<const X>(args.sum_grad, row, in.sum_grad, col), left);
    }
  }
  ring.commit();
}

// The weight as float32 in shared memory, where all groups of the block read it: [N / 4][threads]
// quadruples, as far apart as the most threads need.
template <typename T>
struct WeightTable {
  static constexpr int N = vector_size<T>, bytes = N * 4 * most_threads;
  float4* own;

  template <bool Aligned>
  __device__ __forceinline__ void fill(const Backward& args, Columns<Aligned> at) const {
    float w[1][N];
    load_weight<T>(args, at, w);
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      own[k / 4 * most_threads] = make_float4(w[0][k], w[0][k + 1], w[0][k + 2], w[0][k + 3]);
    }
  }
  // Calls use(i, weight of element i) for each: four at a time by one load, which the compiler
  // would take apart, held no longer than they need.
  template <typename Use>
  __device__ __forceinline__ void each(Use use) const {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(own));
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      float four[4];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
                   : "r"(from + k / 4 * most_threads * 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) use(k + i, four[i]);
    }
  }
};

// A thread's part of one row, in the ring: both passes over it.
template <typename Form>
struct RowTerms {
  using T = typename Form::T;
  using X = typename Form::X;
  using Pieces = RowPieces<Form>;
  static constexpr int N = vector_size<T>;
  static constexpr bool Layer = Form::layer;
  const Ring& ring;
  const WeightTable<T>& weight;
  int slot;
  RowStatistics of;

  // Nothing for threads whose vector lies behind the row's end.
  __device__ __forceinline__ RowVector<Form> load() const {
    return {of, ring.read<X, N>(slot, Pieces::x), ring.read<T, N>(slot, Pieces::y_grad)};
  }

  // Adds to the sums over this row, g * xh and g, and to those over rows, y_grad * xh and y_grad.
  __device__ __forceinline__ void sum(float (&sums)[Layer ? 2 : 1], float (&weight_sums)[N],
                                      float (&bias_sums)[N]) const {
    const RowVector<Form> in = load();
    weight.each([&](int i, float w) {
      in.add(i, w, sums);
      weight_sums[i] = fmaf(in.y_grad(i), in.normalized(i), weight_sums[i]);
      if constexpr (Layer) bias_sums[i] += in.y_grad(i);
    });
  }

  // x_grad, and what stands behind it; the residual's gradient joins before the rounding.
  template <typename Behind>
  __device__ __forceinline__ void store(const Backward& args, uint32_t row,
                                        Columns<Form::aligned> at,
                                        const float (&sums)[Layer ? 2 : 1],
                                        const Behind& behind) const {
    const RowVector<Form> in = load();
    const RowGradient gradient = row_gradient<Layer>(in.of, sums, args.inverse_cols);
    float out[1][N];
    weight.each([&](int i, float w) { out[0][i] = gradient.value(w, in.y_grad(i), in.x(i)); });
    if (args.sum_grad.data != nullptr) {
      const auto sum_grad = ring.read<X, N>(slot, Pieces::sum_grad);
#pragma unroll
      for (int i = 0; i < N; ++i) out[0][i] += element(sum_grad, i);
    }
    store_vectors(at_row<X>(args.x_grad, row, args.layout.x_grad, 0), at, out);
    behind.template store<Form>(row, at, out);
    if (args.y.data != nullptr) store_y(args, row, at);
  }

 private:
  // With forward's bits: the same operations.
  __device__ __forceinline__ void store_y(const Backward& args, uint32_t row,
                                          Columns<Form::aligned> at) const {
    const RowVector<Form> in = load();
    T* to = at_row<T>(args.y, row, args.layout.y, 0);
    if constexpr (Form::aligned) {
      float bias[1][N] = {}, out[1][N];
      if constexpr (Layer) load_bias<T>(args, at, bias);
      weight.each([&](int i, float w) { out[0][i] = in.y(i, w, bias[0][i]); });
      store_vectors(to, at, out);
    } else {  // one by one: sm_80 has no registers for more
      weight.each([&](int i, float w) {
        const int col = at.col + i;
        if (col < at.cols) to[col] = from_float<T>(in.y(i, w, Layer ? bias_at<T>(args, col) : 0));
      });
    }
  }
};

}  // namespace
}  // namespace redline::cuda
