// x_grad, weight_grad and bias_grad of norm in one launch: its first blocks have 64 columns each of
// the sums over rows, the others a row each, or as many narrow ones as they hold. x and y_grad are
// read twice, once from L2, and there are no partial sums. Bound by latency; times: docs/norm.md.
#include "redline/kernels/cuda/norm/few_rows.h"
#include "redline/kernels/cuda/norm/row_backward.cuh"

namespace redline::cuda {
namespace {

// Where it is faster than the kernels for many (H100, rms, this and those, us: 512 x
// 4096 7.3, 12.0; 1024 x 4096 13.2, 16.1; 1024 x 2048 10.2, 11.1; 1024 x 1024 9.4, 7.8; 2048 x
// 2048 18.7, 15.9).
constexpr int64_t most_rows = 512, most_wide_rows = 1024, wide = 2048, most_elements = 4 << 20;
constexpr int block_columns = 64;  // two a lane: 128 bytes of 16-bit rows
constexpr int least_threads = 512;

struct FewRows : Backward {
  Matrix weight_grad, bias_grad;  // [cols]
  int row_threads;                // that share a row
  uint32_t sum_blocks;
};

// The sums over a row's threads, in RowExchange's order: the same bits. Lanes: as of its Tile.
template <int Lanes, int Count>
__device__ __forceinline__ void sum_row(float (&sums)[Count], int warps) {
  if constexpr (Lanes == 16) {
#pragma unroll
    for (int k = 0; k < Count; ++k) sums[k] = warp_sum<Lanes>(sums[k]);
    return;
  }
  const WarpSums<Count> own(sums);
  if constexpr (Lanes == 32) return own.give(sums);
  __shared__ float posted[Count][32];
  if (own.lane() == 0) posted[own.value()][threadIdx.x / 32] = own.held;
  __syncthreads();
  WarpSums<Count>(posted[0], 32, warps).give(sums);
}

template <typename Form>
struct FewRow {
  using T = typename Form::T;
  using X = typename Form::X;
  static constexpr int N = vector_size<T>;
  RowVector<Form> in;
  Packed<X, N> sum_grad;
  float weight[1][N];

  __device__ __forceinline__ void load(const FewRows& args, uint32_t row,
                                       Columns<Form::aligned> at) {
    Packed<X, N> x[1], added[1] = {};
    Packed<T, N> y_grad[1];
    load_vectors(row_at<const X>(args.x, row), at, x);
    load_vectors(row_at<const T>(args.y_grad, row), at, y_grad);
    if (args.sum_grad.data != nullptr) {
      load_vectors(row_at<const X>(args.sum_grad, row), at, added);
    }
    in = {statistics_of<Form::layer>(args, row), x[0], y_grad[0]};
    sum_grad = added[0];
    load_weight<T>(args, at, weight);
  }

  __device__ __forceinline__ void store(const FewRows& args, uint32_t row,
                                        Columns<Form::aligned> at,
                                        const RowGradient& gradient) const {
    float out[1][N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[0][i] = gradient.value(weight[0][i], in.y_grad(i), in.x(i));
      if (args.sum_grad.data != nullptr) out[0][i] += element(sum_grad, i);
    }
    store_vectors(row_at<X>(args.x_grad, row), at, out);
    if (args.y.data == nullptr) return;
    float bias[1][N] = {};
    if constexpr (Form::layer) load_bias<T>(args, at, bias);
#pragma unroll
    for (int i = 0; i < N; ++i) out[0][i] = in.y(i, weight[0][i], bias[0][i]);
    store_vectors(row_at<T>(args.y, row), at, out);
  }
};

template <typename Form, int Lanes>
__device__ __forceinline__ void few_rows_x_grad(const FewRows& args, uint32_t block) {
  using T = typename Form::T;
  constexpr int N = vector_size<T>;
  const int threads = Lanes == 0 ? args.row_threads : Lanes;
  const uint32_t groups = Lanes == 0 ? 1 : blockDim.x / Lanes;
  const uint32_t group = Lanes == 0 ? 0 : threadIdx.x / Lanes, row = block * groups + group;
  // Where a block has one row, the threads behind the row's have nothing of it.
  const int thread = static_cast<int>(threadIdx.x - group * Lanes);
  const int col = thread < threads ? thread * N : args.cols;
  const Columns<Form::aligned> at = {col, threads * N, args.cols};
  if (row >= counted_rows(args)) {
    if (row < args.rows && col < args.cols) {
      store_zeros<Form::aligned, T>(args.x_grad, row, col, args);
    }
    return;
  }
  FewRow<Form> own;
  own.load(args, row, at);
  float sums[Form::layer ? 2 : 1] = {};
  if (col < args.cols) {
#pragma unroll
    for (int i = 0; i < N; ++i) own.in.add(i, own.weight[0][i], sums);
  }
  sum_row<Lanes>(sums, threads / 32);
  const auto gradient = row_gradient<Form::layer>(own.in.of, sums, args.inverse_cols);
  if (col < args.cols) own.store(args, row, at, gradient);
}

template <typename S, bool Aligned>
__device__ __forceinline__ Packed<S, 2> load_two(const Matrix& from, int row, int col, int cols) {
  const S* at = row_at<const S>(from, row);
  if constexpr (Aligned) return *reinterpret_cast<const Packed<S, 2>*>(at + col);
  return load<S, 2>(at, col, cols, false);
}

// The sums of two columns over the rows that this warp has, those that its number leaves.
template <typename Form>
__device__ __forceinline__ void sum_columns(const FewRows& args, int col, float (&weight_sums)[2],
                                            float (&bias_sums)[2]) {
  using T = typename Form::T;
  using X = typename Form::X;
  constexpr int at_once = 8;  // rows on their way
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int rows = static_cast<int>(counted_rows(args));
  if (col >= args.cols) return;
  for (int first = static_cast<int>(threadIdx.x) / 32; first < rows; first += warps * at_once) {
    Packed<X, 2> x[at_once] = {};
    Packed<T, 2> y_grad[at_once] = {};
    RowStatistics of[at_once] = {};
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int row = first + k * warps;
      if (row >= rows) continue;
      x[k] = load_two<X, Form::aligned>(args.x, row, col, args.cols);
      y_grad[k] = load_two<T, Form::aligned>(args.y_grad, row, col, args.cols);
      of[k] = statistics_of<Form::layer>(args, row);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float upstream = element(y_grad[k], i);
        const float normalized = (element(x[k], i) - of[k].mean) * of[k].inverse_std;
        weight_sums[i] = fmaf(upstream, normalized, weight_sums[i]);
        bias_sums[i] += upstream;
      }
    }
  }
}

template <typename Form>
__device__ __forceinline__ void few_rows_sums(const FewRows& args) {
  constexpr int count = Form::layer ? 2 : 1;
  __shared__ float scratch[count][32][block_columns];
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  const int first = static_cast<int>(blockIdx.x) * block_columns, own = thread % 32 * 2;
  float sums[2][2] = {};
  sum_columns<Form>(args, first + own, sums[0], sums[1]);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    *reinterpret_cast<float2*>(&scratch[k][thread / 32][own]) = make_float2(sums[k][0], sums[k][1]);
  }
  __syncthreads();
  const int which = thread / block_columns, col = thread % block_columns;
  if (which >= count || first + col >= args.cols) return;
  float total = 0.0f;
  for (int warp = 0; warp < warps; ++warp) total += scratch[which][warp][col];
  const Matrix& to = which == 0 ? args.weight_grad : args.bias_grad;
  if (to.data == nullptr) return;
  if (to.is_float32) {
    static_cast<float*>(to.data)[first + col] = total;
  } else {
    using T = typename Form::T;
    static_cast<T*>(to.data)[first + col] = from_float<T>(total);
  }
}

template <typename Form, int Lanes>
__global__ void __launch_bounds__(most_threads) few_rows_kernel(const FewRows args) {
  wait_for_previous_launch();
  if (blockIdx.x < args.sum_blocks) return few_rows_sums<Form>(args);
  few_rows_x_grad<Form, Lanes>(args, blockIdx.x - args.sum_blocks);
}

template <typename Form, int Lanes>
void launch_lanes(const FewRows& args, Stream stream) {
  const int threads = std::max(args.row_threads, least_threads);
  const int rows = Lanes == 0 ? 1 : threads / Lanes;  // of a block
  launch(few_rows_kernel<Form, Lanes>,
         {.grid = dim3(args.sum_blocks + ceil_div(args.rows, rows)),
          .block = dim3(threads),
          .overlap_previous = true,
          .stream = stream},
         args);
}

template <typename Form>
void launch_few_rows(FewRows args, Stream stream) {
  const Plan chosen = plan(ceil_div(args.cols, vector_size<typename Form::T>), stream.capability);
  args.row_threads = chosen.threads;
  note_choice(args.rows, " rows of ", args.cols,
              " columns: x_grad and the sums over rows by blocks of one launch");
  switch (chosen.sharing) {
    case Sharing::half_warp:
      return launch_lanes<Form, 16>(args, stream);
    case Sharing::warp:
      return launch_lanes<Form, 32>(args, stream);
    default:
      return launch_lanes<Form, 0>(args, stream);
  }
}

Matrix parameter(const TensorView& view) { return {view.data, 0, view.dtype == DType::float32}; }

}  // namespace

bool has_few_rows(DType y_grad, int64_t rows, int64_t cols) {
  const int64_t most = cols < wide ? most_rows : most_wide_rows;
  if (rows < 1 || rows > most || rows * cols > most_elements) return false;
  const int64_t vectors = ceil_div(cols, 16 / element_bytes(y_grad));
  return vectors >= 1 && vectors <= most_threads;  // those that a block has
}

void run_few_rows(const NormBackward& norm, Stream stream) {
  const bool sums = norm.weight_grad || norm.bias_grad;
  const FewRows args = {arguments(norm, stream), parameter(norm.weight_grad),
                        parameter(norm.bias_grad), 0,
                        sums ? static_cast<uint32_t>(ceil_div(norm.x.sizes[1], block_columns)) : 0};
  visit_dtype<float, bfloat16, float16>("norm", norm.y_grad.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    const bool is_wide = norm.x.dtype == DType::float32;
    visit_forms<T>(is_wide, norm.norm, [&]<typename X, bool Layer>() {
      visit_bool(is_aligned(norm), [&]<bool Aligned>() {
        launch_few_rows<Form<T, X, Layer, Aligned>>(args, stream);
      });
    });
  });
}

}  // namespace redline::cuda
