// One token: its row of the tables is laid out once, as the pair convention wants it, and stays in
// L1 while every head is read and written once.
#include "redline/kernels/cpu/rotary.h"

#include "redline/kernels/cpu/elements.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

using UInt64s __attribute__((vector_size(vector_bytes))) = uint64_t;

// Lanes 2 i and 2 i + 1 change places.
REDLINE_INLINE Float32s swap_neighbours(Float32s v) {
  const UInt64s pairs = reinterpret_cast<UInt64s>(v);
  return reinterpret_cast<Float32s>((pairs << 32) | (pairs >> 32));
}
REDLINE_INLINE Float64s swap_neighbours(Float64s v) {
  Float64s result;
  for (int i = 0; i < lanes<double>; ++i) result[i] = v[i ^ 1];
  return result;
}

constexpr int pairs_per_block = block_size / 2;

// cos and sin of a block of pairs: one per pair, or one per element when interleaved. Backward
// turns the other way.
template <typename Acc>
struct Tables {
  Block<Acc> cos, sin;

  void read_halves(const float* cos_row, const float* sin_row, int pairs, Acc direction) {
    for (int i = 0; i < pairs; ++i) {
      cos.values[i] = cos_row[i];
      sin.values[i] = direction * sin_row[i];
    }
  }
  void read_neighbours(const float* cos_row, const float* sin_row, int pairs, Acc direction) {
    for (int i = 0; i < pairs; ++i) {
      cos.values[2 * i] = cos.values[2 * i + 1] = cos_row[i];
      sin.values[2 * i] = -direction * sin_row[i];
      sin.values[2 * i + 1] = direction * sin_row[i];
    }
  }
};

// Pairs (x[i], x[i + half]), `pairs` of them.
template <typename T>
REDLINE_INLINE void rotate_halves(const T* x, T* y, int64_t half, int pairs,
                                  const Tables<arithmetic<T>>& tables) {
  for_vectors<arithmetic<T>>(pairs, [&](int i, int n) {
    const auto a = load_wide(x + i, n), b = load_wide(x + half + i, n);
    const auto c = load(tables.cos.values + i, n), s = load(tables.sin.values + i, n);
    store_narrow(y + i, a * c - b * s, n);
    store_narrow(y + half + i, b * c + a * s, n);
  });
}

// Pairs (x[2 i], x[2 i + 1]).
template <typename T>
REDLINE_INLINE void rotate_neighbours(const T* x, T* y, int pairs,
                                      const Tables<arithmetic<T>>& tables) {
  for_vectors<arithmetic<T>>(2 * pairs, [&](int i, int n) {
    const auto v = load_wide(x + i, n);
    const auto c = load(tables.cos.values + i, n), s = load(tables.sin.values + i, n);
    store_narrow(y + i, v * c + swap_neighbours(v) * s, n);
  });
}

template <typename T>
T* token_of(const TensorView& tensor, int64_t outer, int64_t inner) {
  return tensor.as<T>() + outer * tensor.strides[0] + inner * tensor.strides[1];
}

// A token's heads on one side: of all, or q's with k's and v's apart.
template <typename T>
struct Heads {
  T* data;
  int64_t stride, per_group;
  T *k = nullptr, *v = nullptr;
  int64_t k_stride = 0, v_stride = 0;

  Heads(const Rotary& args, const TensorView& side, int64_t outer, int64_t inner)
      : data(token_of<T>(side, outer, inner)),
        stride(side.strides[2]),
        per_group(args.group_heads) {
    if (!args.k || &side == &whole(args)) return;
    per_group -= 2;
    k = token_of<T>(args.k, outer, inner);
    v = token_of<T>(args.v, outer, inner);
    k_stride = args.k.strides[2];
    v_stride = args.v.strides[2];
  }

  REDLINE_INLINE T* at(int64_t group, int64_t place) const {
    if (k == nullptr || place < per_group) return data + (group * per_group + place) * stride;
    return place == per_group ? k + group * k_stride : v + group * v_stride;
  }
};

template <typename T>
struct Token {
  const Rotary& args;
  Heads<const T> x;
  Heads<T> y;

  Token(const Rotary& args, int64_t outer, int64_t inner)
      : args(args), x(args, args.x, outer, inner), y(args, args.y, outer, inner) {}

  // Calls body(x, y, rotated) for each head.
  template <typename Body>
  REDLINE_INLINE void for_heads(Body body) const {
    const int64_t groups = whole(args).sizes[2] / args.group_heads;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t place = 0; place < args.group_heads; ++place) {
        body(x.at(group, place), y.at(group, place), place < args.rotated_heads);
      }
    }
  }
};

template <typename T>
void rotate_block(const Token<T>& token, const float* cos, const float* sin, int64_t first,
                  int pairs) {
  using Acc = arithmetic<T>;
  const Rotary& args = token.args;
  const int64_t half = args.cos.sizes[1];
  const Acc direction = args.backward ? -1 : 1;
  Tables<Acc> tables;
  if (args.interleaved) {
    tables.read_neighbours(cos + first, sin + first, pairs, direction);
    token.for_heads([&](const T* x, T* y, bool rotated) {
      if (rotated) rotate_neighbours(x + 2 * first, y + 2 * first, pairs, tables);
    });
  } else {
    tables.read_halves(cos + first, sin + first, pairs, direction);
    token.for_heads([&](const T* x, T* y, bool rotated) {
      if (rotated) rotate_halves(x + first, y + first, half, pairs, tables);
    });
  }
}

template <typename T>
void rotate_token(const Rotary& args, int64_t outer, int64_t inner, int64_t position) {
  const Token<T> token(args, outer, inner);
  const int64_t row = position == no_position ? 0 : position;
  const int64_t pairs = position == no_position ? 0 : args.cos.sizes[1];
  const float* cos = args.cos.as<const float>() + row * args.cos.strides[0];
  const float* sin = args.sin.as<const float>() + row * args.sin.strides[0];
  for (int64_t first = 0; first < pairs; first += pairs_per_block) {
    const int64_t left = pairs - first;
    rotate_block(token, cos, sin, first,
                 static_cast<int>(left < pairs_per_block ? left : pairs_per_block));
  }
  const int64_t head_dim = args.x.sizes[3];
  token.for_heads([&](const T* x, T* y, bool rotated) {
    const int64_t copied_from = rotated ? 2 * pairs : 0;
    if (copied_from == head_dim) return;
    memcpy(y + copied_from, x + copied_from,
           static_cast<size_t>(head_dim - copied_from) * sizeof(T));
  });
}

void rotate(const Rotary& args, int64_t outer, int64_t inner, int64_t position) {
  visit_storage(args.x.dtype, [&]<typename T>() { rotate_token<T>(args, outer, inner, position); });
}

}  // namespace

extern const RotaryKernels rotary_kernels = {rotate};

}  // namespace redline::cpu::REDLINE_ISA
