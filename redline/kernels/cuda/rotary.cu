// (a c - b s, b c + a s) (kernels/rotary.h). A thread owns two vectors of a head, the two sides of
// its pairs or two neighbours, and turns them in several heads of one token: its part of the tables
// is read once, the heads' loads are in flight together. Memory is read once and written once.
// Bound by bytes; of the floor: bench/results.
#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/device/divisor.cuh"
#include "redline/kernels/cuda/device/vector.cuh"
#include "redline/kernels/cuda/launch.h"
#include "redline/kernels/rotary.h"

namespace redline {
namespace cuda {
namespace {

// Small blocks, so that one that ends makes room early: with 256 threads 0.82 of a copy, with 128
// 0.89, and 0.96 with streaming accesses besides (H200, 4 x 4096 x 32 x 128 bfloat16). One head per
// thread reads the tables too often (0.89 of a copy at 8 heads, two 0.92), four hold 30 registers
// more (0.89).
constexpr int threads = 128;
constexpr int heads_per_thread = 2;    // 64 bytes in flight per thread
constexpr int pair_blocks_per_sm = 8;  // 64 registers a thread; with nine it spills on sm_90a

// int64 or int32 values.
struct Index {
  const void* data;
  bool is_int64;
};

// Where the heads of a token lie.
struct Heads {
  void* data;
  int64_t outer_stride, inner_stride, head_stride;
};

// The chunks of a head, of two vectors each; those from pair_chunks on are copied. A block's
// threads are (token, head, chunk), chunks side by side.
struct Split {
  int chunks, pair_chunks;
  dim3 block;
};

struct Args {
  Heads x, y, k, v, second_x, second_y;
  const float *cos, *sin;
  int64_t cos_stride, sin_stride, table_rows;
  Index positions, cu_seqlens;
  int64_t positions_outer_stride, positions_inner_stride, boundaries;
  int64_t tokens, columns;  // columns: the size of inner
  Divisor per_column;       // by `columns`, where the tokens are fewer than 2^31
  int heads, head_dim, pairs;
  int first_heads;      // of x, or of q where q, k and v lie apart; the other tensors' follow
  Divisor per_group;    // by the heads of a group
  Divisor per_queries;  // by the q heads of a group
  int group_heads, rotated_heads, groups;
  bool all_turn;      // every head of a group
  bool outer_counts;  // the sequence is the outer axis
  float direction;    // -1 in backward
  Split split;
};

struct Token {
  int64_t outer, inner;
};

__device__ __forceinline__ Token token_at(const Args& args, int64_t index) {
  if (args.tokens <= INT32_MAX) {
    const uint32_t small = static_cast<uint32_t>(index);
    return {args.per_column.quotient(small), args.per_column.remainder(small)};
  }
  return {index / args.columns, index % args.columns};
}

struct Position {
  int64_t row;   // of the tables, perhaps outside them
  bool is_none;  // the token belongs to no sequence
};

__device__ __forceinline__ int64_t read_index(const Index& index, int64_t offset) {
  return index.is_int64 ? static_cast<const int64_t*>(index.data)[offset]
                        : static_cast<const int32_t*>(index.data)[offset];
}

// Counted from the last boundary at or before the token.
__device__ __forceinline__ Position position_in_sequence(const Args& args, int64_t token) {
  int64_t begin = 0, end = args.boundaries;  // the first boundary beyond the token is in here
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (read_index(args.cu_seqlens, middle) <= token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  if (begin == 0 || begin == args.boundaries) return {0, true};
  return {token - read_index(args.cu_seqlens, begin - 1), false};
}

__device__ __forceinline__ Position position_of(const Args& args, Token token) {
  if (args.positions.data != nullptr) {
    const int64_t offset =
        token.outer * args.positions_outer_stride + token.inner * args.positions_inner_stride;
    return {read_index(args.positions, offset), false};
  }
  if (args.cu_seqlens.data != nullptr) return position_in_sequence(args, token.inner);
  return {args.outer_counts ? token.outer : token.inner, false};
}

// cos and sin of V pairs.
template <int V>
struct Angles {
  Packed<float, V> cos, sin;
};

// NaN where the tables have no such row.
template <int V>
__device__ __forceinline__ Angles<V> load_angles(const Args& args, int64_t row, int pair) {
  Angles<V> angles;
  if (row >= 0 && row < args.table_rows) {
    const float *cos = args.cos + row * args.cos_stride, *sin = args.sin + row * args.sin_stride;
    angles.cos = *reinterpret_cast<const Packed<float, V>*>(cos + pair);
    angles.sin = *reinterpret_cast<const Packed<float, V>*>(sin + pair);
#pragma unroll
    for (int i = 0; i < V; ++i) angles.sin.values[i] *= args.direction;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) angles.cos.values[i] = angles.sin.values[i] = nanf("");
  }
  return angles;
}

// The pairs are (a[i], b[i]); or neighbours of a, then of b. A single pair is (a, b) either way.
template <typename T, int V, bool Interleaved>
__device__ __forceinline__ void turn(Packed<T, V>& a, Packed<T, V>& b, const Angles<V>& angles) {
  constexpr bool neighbours = Interleaved && V > 1;
  float values[2][V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    values[0][i] = element(a, i);
    values[1][i] = element(b, i);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float& first = neighbours ? values[2 * i / V][2 * i % V] : values[0][i];
    float& second = neighbours ? values[2 * i / V][(2 * i + 1) % V] : values[1][i];
    const float p = first, q = second, cos = angles.cos.values[i], sin = angles.sin.values[i];
    first = fmaf(p, cos, -(q * sin));
    second = fmaf(q, cos, p * sin);
  }
  a = pack<T>(values[0]);
  b = pack<T>(values[1]);
}

// Where the two vectors of a chunk lie in a head; `second` may be past the head's end in a copied
// chunk.
struct Chunk {
  int first, second;
};

template <int V, bool Interleaved>
__device__ __forceinline__ Chunk chunk_at(const Args& args, int chunk) {
  if (!Interleaved && chunk < args.split.pair_chunks) return {chunk * V, args.pairs + chunk * V};
  return {chunk * 2 * V, chunk * 2 * V + V};
}

template <typename T>
__device__ __forceinline__ T* address(const Heads& heads, Token token) {
  return static_cast<T*>(heads.data) + token.outer * heads.outer_stride +
         token.inner * heads.inner_stride;
}

// How the heads lie: in groups on both sides; with q, k and v apart on one side; in two tensors.
enum class Heading { packed, from_apart, to_apart, pair };

// Where a head of a token is read and written, and whether it turns. Where q, k and v lie apart
// the order is theirs, so that neighbours of a warp do the same.
template <typename T>
struct Head {
  const T* from;
  T* to;
  bool turns;
};

template <Heading H, typename T>
__device__ __forceinline__ Head<T> head_at(const Args& args, Token token, int head) {
  const auto at = [&](const Heads& heads, int index) {
    return address<T>(heads, token) + index * heads.head_stride;
  };
  if constexpr (H == Heading::packed) {
    const bool turns = args.all_turn || args.per_group.remainder(head) < args.rotated_heads;
    return {at(args.x, head), at(args.y, head), turns};
  } else if constexpr (H == Heading::pair) {
    const bool is_first = head < args.first_heads;
    const int index = is_first ? head : head - args.first_heads;
    return {at(is_first ? args.x : args.second_x, index),
            at(is_first ? args.y : args.second_y, index), true};
  } else {
    const Heads& whole = H == Heading::from_apart ? args.y : args.x;
    const Heads& queries = H == Heading::from_apart ? args.x : args.y;
    const bool is_query = head < args.first_heads, is_key = head < args.first_heads + args.groups;
    const int index = is_query ? head : head - args.first_heads - (is_key ? 0 : args.groups);
    const int group = is_query ? args.per_queries.quotient(index) : index;
    const int place =
        is_query ? args.per_queries.remainder(index) : args.group_heads - (is_key ? 2 : 1);
    T* apart = at(is_query ? queries : is_key ? args.k : args.v, index);
    T* packed = at(whole, group * args.group_heads + place);
    return {H == Heading::from_apart ? apart : packed, H == Heading::from_apart ? packed : apart,
            place < args.rotated_heads};
  }
}

// Heads pass by once: streaming accesses leave the caches to the tables.
template <typename Vector, typename T>
__device__ __forceinline__ Vector load_once(const T* from) {
  if constexpr (sizeof(Vector) < 16) {
    return *reinterpret_cast<const Vector*>(from);
  } else {
    const int4 words = __ldcs(reinterpret_cast<const int4*>(from));
    return reinterpret_cast<const Vector&>(words);
  }
}

template <typename T, int V, bool Interleaved, Heading H>
__global__ void __launch_bounds__(threads, H == Heading::pair ? pair_blocks_per_sm : 0)
    rotary_kernel(const Args args) {
  using Vector = Packed<T, V>;
  wait_for_previous_launch();
  allow_next_launch_of_many();
  const Split& split = args.split;
  const int chunk = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const int64_t index = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
  if (index >= args.tokens || chunk >= split.chunks) return;
  const Token token = token_at(args, index);
  const Chunk at = chunk_at<V, Interleaved>(args, chunk);
  const bool has_second = at.second < args.head_dim;

  Angles<V> angles = {};
  bool turns = chunk < split.pair_chunks;
  const int first_head = static_cast<int>(threadIdx.y), step = static_cast<int>(blockDim.y);
  for (int first = first_head; first < args.heads; first += heads_per_thread * step) {
    Vector a[heads_per_thread], b[heads_per_thread];  // b: where there is a second
    Head<T> heads[heads_per_thread];
#pragma unroll
    for (int k = 0; k < heads_per_thread; ++k) {
      if (first + k * step < args.heads) {
        heads[k] = head_at<H, T>(args, token, first + k * step);
        a[k] = load_once<Vector>(heads[k].from + at.first);
        if (has_second) b[k] = load_once<Vector>(heads[k].from + at.second);
      }
    }
    // The tables come after the heads' loads are on their way: a position is a load of its own.
    if (first == first_head && turns) {
      const Position position = position_of(args, token);
      turns = !position.is_none;
      if (turns) angles = load_angles<V>(args, position.row, chunk * V);
    }
#pragma unroll
    for (int k = 0; k < heads_per_thread; ++k) {
      if (first + k * step >= args.heads) break;
      const bool turned = turns && heads[k].turns;
      if (turned) turn<T, V, Interleaved>(a[k], b[k], angles);
      store_streaming(heads[k].to + at.first, a[k]);
      if (turned || has_second) store_streaming(heads[k].to + at.second, b[k]);
    }
  }
}

Index index_of(const TensorView& view) { return {view.data, view.dtype == DType::int64}; }

Heads heads_of(const TensorView& x) { return {x.data, x.strides[0], x.strides[1], x.strides[2]}; }

// Chunks of a head first, then heads, then tokens, until the block is full.
Split split_of(const Args& args, int vector) {
  const int pair_chunks = args.pairs / vector;
  const int rest = args.head_dim - 2 * args.pairs;
  const int chunks = pair_chunks + static_cast<int>(ceil_div(rest, 2 * vector));
  const int chunk_lanes = std::clamp(chunks, 1, threads);
  const int head_lanes = std::clamp(static_cast<int>(ceil_div(args.heads, heads_per_thread)), 1,
                                    threads / chunk_lanes);
  const int token_lanes = std::min(threads / (chunk_lanes * head_lanes), 64);  // the z limit
  return {.chunks = chunks,
          .pair_chunks = pair_chunks,
          .block = dim3(chunk_lanes, head_lanes, token_lanes)};
}

constexpr const char* explained(Heading heading) {
  if (heading == Heading::packed) return "";
  return heading == Heading::pair ? " of two tensors" : "; q, k and v lie apart";
}

template <typename T, int V, bool Interleaved, Heading H>
void launch_rotary(Args args, Stream stream) {
  args.split = split_of(args, V);
  const Split& split = args.split;
  note_choice(V, " pairs a thread of ", args.heads, " heads", explained(H));
  launch(rotary_kernel<T, V, Interleaved, H>,
         {.grid = dim3(ceil_div(args.tokens, split.block.z), ceil_div(split.chunks, split.block.x)),
          .block = split.block,
          .overlap_previous = true,
          .stream = stream},
         args);
}

Args args_of(const Rotary& rotary) {
  const TensorView& x = whole(rotary);
  const int64_t heads = all_heads(rotary);
  REDLINE_CHECK(heads < INT32_MAX / 2 && x.sizes[3] < INT32_MAX / 2,
                "rotary: x: expected fewer than 2^30 heads and elements of a head, not ", x);
  return {
      .x = heads_of(rotary.x),
      .y = heads_of(rotary.y),
      .k = heads_of(rotary.k),
      .v = heads_of(rotary.v),
      .second_x = heads_of(rotary.second_x),
      .second_y = heads_of(rotary.second_y),
      .cos = rotary.cos.as<const float>(),
      .sin = rotary.sin.as<const float>(),
      .cos_stride = rotary.cos.strides[0],
      .sin_stride = rotary.sin.strides[0],
      .table_rows = rotary.cos.sizes[0],
      .positions = index_of(rotary.positions),
      .cu_seqlens = index_of(rotary.cu_seqlens),
      .positions_outer_stride = rotary.positions.strides[0],
      .positions_inner_stride = rotary.positions.strides[1],
      .boundaries = rotary.cu_seqlens.sizes[0],
      .tokens = x.sizes[0] * x.sizes[1],
      .columns = x.sizes[1],
      .per_column = Divisor(static_cast<uint32_t>(std::min<int64_t>(x.sizes[1], INT32_MAX))),
      .heads = static_cast<int>(heads),
      .head_dim = static_cast<int>(x.sizes[3]),
      .pairs = static_cast<int>(rotary.cos.sizes[1]),
      .first_heads = static_cast<int>(
          rotary.k ? x.sizes[2] / rotary.group_heads * (rotary.group_heads - 2) : x.sizes[2]),
      .per_group = Divisor(static_cast<uint32_t>(rotary.group_heads)),
      .per_queries = Divisor(static_cast<uint32_t>(std::max<int64_t>(rotary.group_heads - 2, 1))),
      .group_heads = static_cast<int>(rotary.group_heads),
      .rotated_heads = static_cast<int>(rotary.rotated_heads),
      .groups = static_cast<int>(x.sizes[2] / rotary.group_heads),
      .all_turn = rotary.rotated_heads == rotary.group_heads,
      .outer_counts = rotary.sequence_axis == 0,
      .direction = rotary.backward ? -1.0f : 1.0f,
      .split = {}};
}

}  // namespace
}  // namespace cuda

void run(const Rotary& rotary, Stream stream) {
  using namespace cuda;
  if (is_empty(rotary)) return;
  const Args args = args_of(rotary);
  const bool aligned = are_aligned("rotary", {{rotary.second_x ? "q" : "x", &rotary.x},
                                              {"y", &rotary.y},
                                              {"k", &rotary.k},
                                              {"v", &rotary.v},
                                              {"k", &rotary.second_x},
                                              {"k", &rotary.second_y},
                                              {"cos", &rotary.cos},
                                              {"sin", &rotary.sin}});
  visit_dtype<float, bfloat16, float16>("rotary: x", rotary.x.dtype, [&]<typename T>() {
    constexpr int vector = vector_size<device_type<T>>;
    const bool fits = args.pairs % vector == 0;
    if (aligned && !fits) {
      note_fallback({"rotary", "cos", "use a rotary_dim of whole vectors of 16 bytes"},
                    "head parts of ", args.pairs,
                    " elements are no whole vectors of 16 bytes: one pair per access");
    }
    const auto choose_width = [&]<bool interleaved, Heading heading>() {
      if (aligned && fits) {
        launch_rotary<device_type<T>, vector, interleaved, heading>(args, stream);
      } else {
        launch_rotary<device_type<T>, 1, interleaved, heading>(args, stream);
      }
    };
    visit_bool(rotary.interleaved, [&]<bool interleaved>() {
      using enum Heading;
      if (rotary.second_x) return choose_width.template operator()<interleaved, pair>();
      if (!rotary.k) return choose_width.template operator()<interleaved, packed>();
      if (rotary.backward) return choose_width.template operator()<interleaved, from_apart>();
      choose_width.template operator()<interleaved, to_apart>();
    });
  });
}

}  // namespace redline
