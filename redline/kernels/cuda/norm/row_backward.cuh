// Over budget: parameters: what a block keeps in registers, beside its arguments.
//
// Norm's backward by rows that blocks hold. One block a multiprocessor; its groups of threads take
// rows in turn, the loads of the next rows in flight through shared memory, from which a row is
// read twice: for the sums over it and for x_grad. Registers hold the group's part of the weight's
// gradient until the rows end; a second launch adds the blocks' parts in order. Bound by bytes; of
// the floor: bench/results.
#pragma once

#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/device/row_exchange.cuh"
#include "redline/kernels/cuda/norm/plan.h"
#include "redline/kernels/cuda/norm/row_terms.cuh"

namespace redline::cuda {
namespace {

// Lanes: threads of a row within a warp, or 0: whole warps of a block, of each of Cluster blocks. A
// thread has one vector of the row: two of them for rms, whose sums are half of layer's, ran at
// 0.88 of a copy where layer with one ran at 0.93 (H100, 16384 x 4096 bfloat16).
template <int Lanes, int Cluster = 1, bool Early = false>
struct Tile {
  static constexpr int lanes = Lanes, cluster = Cluster;
  // A row's statistics are asked for two rows before it, not one.
  static constexpr bool early = Early;
};

// The block's sums, group after group, into its chunk's row of `partial`. `exchange` is the ring's
// memory, which nothing is on its way to any more.
template <int N, bool Aligned>
__device__ __forceinline__ void store_partial(float* partial, const Backward& args, int64_t chunk,
                                              const float (&sums)[N], Columns<Aligned> at,
                                              float* exchange) {
  if (partial == nullptr) return;
  const int width = at.step, group = static_cast<int>(threadIdx.x) * N / width;
  const int place = static_cast<int>(threadIdx.x) * N % width;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    *reinterpret_cast<float4*>(exchange + group * width + place + i) =
        make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  }
  __syncthreads();
  const int first = at.col - place;  // this block's first column
  float* row = partial + chunk * args.cols + first;
  for (int col = threadIdx.x; col < min(width, args.cols - first); col += blockDim.x) {
    float total = 0.0f;
    for (int g = 0; g < args.layout.groups; ++g) total += exchange[g * width + col];
    row[col] = total;
  }
}

// How many of the rows row, row + stride, ... lie below `end`.
__device__ __forceinline__ int rows_from(int64_t row, int64_t end, int stride) {
  return row < end ? static_cast<int>((end - row - 1) / stride) + 1 : 0;
}

template <typename Form, typename Tile>
__global__ void __launch_bounds__(most_threads, 1)
    backward_kernel(const typename Form::BackwardArgs args) {
  using T = typename Form::T;
  constexpr bool Layer = Form::layer;
  constexpr int N = vector_size<T>, sum_count = Layer ? 2 : 1, L = Tile::lanes;
  constexpr int most_warps = L == 0 ? most_threads / 32 : 1;  // that exchange sums
  using Exchange = RowExchange<L, Tile::cluster, sum_count, most_warps>;
  extern __shared__ __align__(128) int4 ring_memory[];
  __shared__ typename Exchange::Memory exchange_memory;
  allow_next_launch();
  const Layout& layout = args.layout;
  const int threads = L == 0 ? layout.threads : L;
  const int groups = Tile::cluster > 1 ? 1 : layout.groups;
  if constexpr (L == 0) Exchange::init(exchange_memory, groups, threads / 32);
  if constexpr (Tile::cluster > 1) cluster_arrive();
  const int group = Tile::cluster > 1 ? 0 : static_cast<int>(threadIdx.x) / threads;
  const int thread = static_cast<int>(threadIdx.x) - group * threads;
  const int first = static_cast<int>(cluster_rank()) * threads + thread;  // of the row's vectors
  const Columns<Form::aligned> at = {first * N, threads * N, args.cols};
  const int64_t chunk = blockIdx.x / Tile::cluster;
  const int stride = static_cast<int>(args.chunks) * groups;
  uint32_t row = static_cast<uint32_t>(chunk * groups + group);
  int left = rows_from(row, counted_rows(args), stride);  // of this group, from `row` on

  char* memory = reinterpret_cast<char*>(ring_memory);
  const Ring ring(memory, layout.pieces, layout.slots);
  int slot = 0;
  for (int k = 0; k < layout.slots; ++k) {
    request_row<Form>(args, ring, slot, row + k * stride, k < left, at.col);
    slot = ring.after(slot);
  }
  const WeightTable<T> weight = {reinterpret_cast<float4*>(memory + layout.ring_bytes) + thread};
  if (group == 0) weight.fill(args, at);
  float weight_sums[N] = {}, bias_sums[N] = {};
  Exchange exchange(exchange_memory, group * threads / 32, threads / 32);
  __syncthreads();
  if constexpr (Tile::cluster > 1) cluster_wait();
  const auto behind = args.behind();
  RowStatistics next = {}, after = {};
  const auto receive_and_post = [&](int slot, uint32_t turn) {
    ring.receive();
    float sums[sum_count] = {};
    const RowTerms<Form> terms = {ring, weight, slot, next};
    if (at.col < at.cols) terms.sum(sums, weight_sums, bias_sums);
    exchange.post(sums, turn);
  };
  if (left > 0) {
    next = statistics_of<Layer>(args, row);
    if (Tile::early && left > 1) after = statistics_of<Layer>(args, row + stride);
    receive_and_post(slot, 0);  // all slots are taken: the first is next again
  }
  // The first pass over the next row stands between a row's sums and their use: no one waits.
  for (uint32_t turn = 0; left > 0; row += stride, --left, ++turn) {
    const RowStatistics current = next;
    float sums[sum_count];
    if constexpr (Tile::early) {
      next = after;
      if (left > 2) after = statistics_of<Layer>(args, row + 2 * stride);
    } else if (left > 1) {
      next = statistics_of<Layer>(args, row + stride);
    }
    if constexpr (L != 0) exchange.collect(sums, turn);
    if (left > 1) receive_and_post(ring.after(slot), turn + 1);
    if constexpr (L == 0) exchange.collect(sums, turn);
    const RowTerms<Form> terms = {ring, weight, slot, current};
    if (at.col < at.cols) terms.store(args, row, at, sums, behind);
    request_row<Form>(args, ring, slot, row + layout.slots * stride, left > layout.slots, at.col);
    slot = ring.after(slot);
  }
  for (; row < args.rows; row += stride) {
    if (at.col < at.cols) store_zeros<Form::aligned, T>(args.x_grad, row, at.col, args);
  }
  float* partial = reinterpret_cast<float*>(ring_memory);
  store_partial(args.weight_partial, args, chunk, weight_sums, at, partial);
  if constexpr (Layer) store_partial(args.bias_partial, args, chunk, bias_sums, at, partial);
}

// --- choice -------------------------------------------------------------------------------------

template <typename S>
uint32_t row_bytes(const Matrix& of) {
  return static_cast<uint32_t>(of.stride * static_cast<int64_t>(sizeof(S)));
}

// All of a block's threads at once ask for more than memory gives at its best (H100, bfloat16, of a
// copy, with all groups and with these, rms and layer: 131072 x 512 0.89, 0.96 and 0.91, 0.92;
// 65536 x 1024 0.90, 0.96 and 0.92, 0.94; 32768 x 2048 0.90, 0.95 and 0.92, 0.90, so not there). A
// group takes rows in turn: where these are few, one turn more costs more than that.
template <typename Form>
int groups_of(const Plan& plan, int64_t rows, int64_t chunks) {
  const bool takes_all = plan.groups * plan.threads == most_threads;
  const bool faster = plan.groups > 4 || (plan.groups == 4 && !Form::layer);
  const bool has_turns = rows >= 16 * chunks * plan.groups;
  if (plan.sharing != Sharing::block || !takes_all || !faster || !has_turns) return plan.groups;
  return plan.groups - static_cast<int>(ceil_div(plan.groups, 8));
}

// Where a block has so few threads that they wait for a row's statistics (H100, of a copy: 16384 x
// 5120 rms 0.92 -> 0.95, layer 0.86 -> 0.94; layer x 6144 and, of two groups, 32768 x 3072 0.92 ->
// 0.95). With more it is slower, 16384 x 4096 by 0.03 and 0.09, and by 0.02 for rms with the
// residual's gradient. Only for the forms that were measured: compile time.
template <typename Form>
constexpr bool has_early = Form::aligned && sizeof(typename Form::T) == sizeof(typename Form::X) &&
                           std::is_same_v<typename Form::BackwardArgs, Backward>;

template <typename Form>
bool asks_early(const Plan& plan, bool has_sum_grad) {
  const int threads = plan.groups * plan.threads;
  if (!Form::layer) return threads <= 640 && !has_sum_grad;
  return threads <= (has_sum_grad ? 640 : 768);
}

template <typename Form, typename Tile>
bool launch_tile(typename Form::BackwardArgs args, const Plan& plan, Stream stream) {
  using Pieces = RowPieces<Form>;
  using X = typename Form::X;
  Layout& layout = args.layout;
  constexpr int table = WeightTable<typename Form::T>::bytes;
  const int limit = (shared_kib(stream.capability) - 2) * 1024;  // without the block's arrays
  const bool has_sum_grad = args.sum_grad.data != nullptr;
  const int groups = groups_of<Form>(plan, args.rows, args.chunks);
  layout = {.threads = plan.threads,
            .groups = groups,
            .slots = 2,
            .pieces = Pieces::count(has_sum_grad),
            .ring_bytes = 0,
            .x = row_bytes<X>(args.x),
            .y_grad = row_bytes<typename Form::T>(args.y_grad),
            .sum_grad = has_sum_grad ? row_bytes<X>(args.sum_grad) : 0,
            .x_grad = row_bytes<X>(args.x_grad),
            .y = row_bytes<typename Form::T>(args.y)};
  const int slot_bytes = Ring::slot_bytes(layout.pieces);
  // Two rows at once for narrow ones, of which a block has many: more ran slower (H100, 1M x 128:
  // 0.93 of a copy, with three 0.90); three for wide ones (16384 x 4096: 0.89, with two 0.84).
  if (Tile::lanes == 0 && 3 * slot_bytes + table <= limit) layout.slots = 3;
  layout.ring_bytes = layout.slots * slot_bytes;
  // Float32 beside 16 bits with the residual's gradient outgrows sm_80.
  const bool wide = args.rows > INT32_MAX || args.x.stride >> 29 != 0 ||
                    args.y_grad.stride >> 29 != 0 || args.sum_grad.stride >> 29 != 0 ||
                    args.y.stride >> 29 != 0;
  if (wide || layout.ring_bytes + table > limit) return false;
  note_sharing(args.cols, Tile::lanes, Tile::cluster);
  launch(backward_kernel<Form, Tile>,
         {.grid = dim3(args.chunks * Tile::cluster),
          .block = dim3(plan.threads * groups),
          .shared_bytes = layout.ring_bytes + table,
          .cluster = Tile::cluster,
          .stream = stream},
         args);
  return true;
}

// False, and nothing launched, where a row outgrows what blocks hold.
template <typename Form>
bool launch_rows(const typename Form::BackwardArgs& args, Stream stream) {
  using T = typename Form::T;
  const Plan chosen = plan(ceil_div(args.cols, vector_size<T>), stream.capability);
  switch (chosen.sharing) {
    case Sharing::half_warp:
      return launch_tile<Form, Tile<16>>(args, chosen, stream);
    case Sharing::warp:
      return launch_tile<Form, Tile<32>>(args, chosen, stream);
    case Sharing::block:
      if constexpr (has_early<Form>) {
        if (asks_early<Form>(chosen, args.sum_grad.data != nullptr)) {
          return launch_tile<Form, Tile<0, 1, true>>(args, chosen, stream);
        }
      }
      return launch_tile<Form, Tile<0>>(args, chosen, stream);
    case Sharing::pair:
      return launch_tile<Form, Tile<0, 2>>(args, chosen, stream);
    case Sharing::eight:
      return launch_tile<Form, Tile<0, 8>>(args, chosen, stream);
    case Sharing::walk:
      break;
  }
  return false;
}

inline bool is_aligned(const NormBackward& norm) {
  return are_aligned(name(norm.norm), {{"x", &norm.x},
                                       {"y_grad", &norm.y_grad},
                                       {"weight", &norm.weight},
                                       {"sum_grad", &norm.sum_grad},
                                       {"x_grad", &norm.x_grad},
                                       {"bias", &norm.bias},
                                       {"y", &norm.y},
                                       {"input_grad", &norm.input_grad}});
}

inline Backward arguments(const NormBackward& norm, Stream stream) {
  const TensorView& partial = norm.weight_partial ? norm.weight_partial : norm.bias_partial;
  const int64_t chunks =
      partial ? partial.sizes[0]
              : norm_chunks(norm.y_grad.dtype, norm.x.sizes[0], norm.x.sizes[1], stream.capability);
  return {common(norm, norm.x),
          matrix(norm.y_grad),
          matrix(norm.sum_grad),
          matrix(norm.x_grad),
          matrix(norm.bias),
          matrix(norm.y),
          norm.weight_partial.as<float>(),
          norm.bias_partial.as<float>(),
          chunks,
          1.0f / static_cast<float>(norm.x.sizes[1]),
          {}};
}

}  // namespace
}  // namespace redline::cuda
