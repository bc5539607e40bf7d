// p, m and v from p, g, m and v (kernels/adamw.h). A thread per tensor computes its factors; then a
// block updates one chunk of one tensor, four elements per access and eight accesses in flight per
// thread, whatever mixture of dtypes the tensors have. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/adamw.h"
#include "redline/kernels/cuda/tensor_batch.cuh"

namespace redline {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int vectors = 2;  // accesses of a tensor in flight per thread
constexpr int step_elements = threads * vectors * 4;
constexpr int chunk = step_elements * 4;  // 8,192 elements: 230 KB of float32 per block

using Batch = TensorBatch<AdamWTensor, 448>;
static_assert(sizeof(Batch) + 128 <= 32764, "kernel parameters");

// What the tensors share, on the device, and the step's options.
struct Scalars {
  const void* learning_rate;
  bool learning_rate_is_float64;
  const float* clip_coefficient;
  const float* grad_scale;
  const float* found_inf;
  double beta1, beta2, weight_decay;
};

__device__ __forceinline__ double scalar_or(const float* scalar, double otherwise) {
  return scalar != nullptr ? *scalar : otherwise;
}

// A thread per tensor.
__global__ void begin_kernel(const __grid_constant__ Batch batch, const Scalars scalars,
                             AdamWFactors* factors) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= batch.size) return;
  const double skip = scalar_or(scalars.found_inf, 0.0);
  float* const step = batch.tensors[index].step;
  if (skip == 0.0) *step += 1.0f;
  const double t = *step;
  const double rate = scalars.learning_rate_is_float64
                          ? *static_cast<const double*>(scalars.learning_rate)
                          : *static_cast<const float*>(scalars.learning_rate);
  factors[index] = {
      .gradient = scalar_or(scalars.clip_coefficient, 1.0) / scalar_or(scalars.grad_scale, 1.0),
      .step_size = rate / (1.0 - pow(scalars.beta1, t)),
      .decay = rate * scalars.weight_decay,
      .inverse_root = 1.0 / sqrt(1.0 - pow(scalars.beta2, t)),
      .skip = skip};
}

// The factors in the arithmetic's type.
struct Constants {
  float beta1_rest, beta2_rest, epsilon;
};
struct Factors : Constants {
  float gradient, step_size, decay, inverse_root;
};

// Bytes of an element of the value (the master where there is one), the gradient and the averages.
template <int Value, int Gradient, int Average>
struct Mixture {
  static constexpr int value = Value, gradient = Gradient, average = Average;
};

// Four elements of each, as they lie in memory.
template <typename Mixture>
struct Quad {
  Raw<Mixture::value> value;
  Raw<Mixture::gradient> gradient;
  Raw<Mixture::average> exp_avg, exp_avg_sq;
};

// Every rounding is spelt out: the two paths of update_chunk give the same bits.
__device__ __forceinline__ void update_element(float& p, float g, float& m, float& v,
                                               const Factors& f) {
  const float gradient = __fmul_rn(g, f.gradient);
  m = __fmaf_rn(f.beta1_rest, __fsub_rn(gradient, m), m);
  v = __fmaf_rn(f.beta2_rest, __fmaf_rn(gradient, gradient, -v), v);
  const float denominator = __fmaf_rn(__fsqrt_rn(v), f.inverse_root, f.epsilon);
  const float change = __fmul_rn(f.step_size, __fdiv_rn(m, denominator));
  p = __fsub_rn(p, __fmaf_rn(f.decay, p, change));
}

template <typename Mixture, bool Whole>
__device__ __forceinline__ void update_quad(const AdamWTensor& tensor, int64_t offset,
                                            const Quad<Mixture>& quad, const Factors& f) {
  constexpr int average = Mixture::average;
  const int64_t count = tensor.count;
  const bool has_master = tensor.master != nullptr;
  float p[4], g[4], m[4], v[4];
  to_floats(quad.value, tensor.parameter_dtype, p);
  to_floats(quad.gradient, tensor.gradient_dtype, g);
  to_floats(quad.exp_avg, DType::bfloat16, m);
  to_floats(quad.exp_avg_sq, DType::bfloat16, v);
#pragma unroll
  for (int i = 0; i < 4; ++i) update_element(p[i], g[i], m[i], v[i], f);
  store_raw<average, Whole>(tensor.exp_avg, offset, count,
                            from_floats<average>(DType::bfloat16, m));
  store_raw<average, Whole>(tensor.exp_avg_sq, offset, count,
                            from_floats<average>(DType::bfloat16, v));
  store_raw<Mixture::value, Whole>(has_master ? tensor.master : tensor.parameter, offset, count,
                                   from_floats<Mixture::value>(tensor.parameter_dtype, p));
  if (has_master) {
    store_raw<2, Whole>(tensor.parameter, offset, count, from_floats<2>(tensor.parameter_dtype, p));
  }
}

// Whole: every access of the block is aligned and inside the tensor.
template <typename Mixture, bool Whole>
__device__ __forceinline__ void update_step(const AdamWTensor& tensor, int64_t base,
                                            const Factors& f) {
  const int64_t first = base + threadIdx.x * 4, count = tensor.count;
  const void* value = tensor.master != nullptr ? tensor.master : tensor.parameter;
  Quad<Mixture> quads[vectors];
#pragma unroll
  for (int k = 0; k < vectors; ++k) {
    const int64_t offset = first + k * threads * 4;
    quads[k].value = load_raw<Mixture::value, Whole>(value, offset, count);
    quads[k].gradient = load_raw<Mixture::gradient, Whole>(tensor.gradient, offset, count);
    quads[k].exp_avg = load_raw<Mixture::average, Whole>(tensor.exp_avg, offset, count);
    quads[k].exp_avg_sq = load_raw<Mixture::average, Whole>(tensor.exp_avg_sq, offset, count);
  }
#pragma unroll
  for (int k = 0; k < vectors; ++k) {
    update_quad<Mixture, Whole>(tensor, first + k * threads * 4, quads[k], f);
  }
}

template <typename Mixture>
__device__ __forceinline__ void update_chunk(const AdamWTensor& tensor, int64_t begin,
                                             const Factors& f) {
  const bool aligned = is_aligned4(tensor.parameter, tensor.parameter_dtype) &&
                       is_aligned4(tensor.gradient, tensor.gradient_dtype) &&
                       is_aligned4(tensor.exp_avg, tensor.average_dtype) &&
                       is_aligned4(tensor.exp_avg_sq, tensor.average_dtype) &&
                       is_aligned4(tensor.master, DType::float32);
  const int64_t end = min(begin + chunk, tensor.count);
  for (int64_t base = begin; base < end; base += step_elements) {
    if (aligned && base + step_elements <= end) {
      update_step<Mixture, true>(tensor, base, f);
    } else {
      update_step<Mixture, false>(tensor, base, f);
    }
  }
}

__global__ void __launch_bounds__(threads)
    update_kernel(const __grid_constant__ Batch batch, const AdamWFactors* factors,
                  const Constants constants) {
  const int index = batch.find(blockIdx.x);
  const AdamWFactors& wide = factors[index];
  if (wide.skip != 0.0) return;
  const Factors f = {constants, static_cast<float>(wide.gradient),
                     static_cast<float>(wide.step_size), static_cast<float>(wide.decay),
                     static_cast<float>(wide.inverse_root)};
  const AdamWTensor& tensor = batch.tensors[index];
  const int64_t begin = int64_t{static_cast<int>(blockIdx.x) - batch.first_chunk[index]} * chunk;
  const bool wide_value = tensor.master != nullptr || tensor.parameter_dtype == DType::float32;
  const bool wide_gradient = tensor.gradient_dtype == DType::float32;
  const bool wide_average = tensor.average_dtype == DType::float32;
  switch (wide_value * 4 + wide_gradient * 2 + wide_average) {  // the same for the whole block
    case 0:
      return update_chunk<Mixture<2, 2, 2>>(tensor, begin, f);
    case 1:
      return update_chunk<Mixture<2, 2, 4>>(tensor, begin, f);
    case 2:
      return update_chunk<Mixture<2, 4, 2>>(tensor, begin, f);
    case 3:
      return update_chunk<Mixture<2, 4, 4>>(tensor, begin, f);
    case 4:
      return update_chunk<Mixture<4, 2, 2>>(tensor, begin, f);
    case 5:
      return update_chunk<Mixture<4, 2, 4>>(tensor, begin, f);
    case 6:
      return update_chunk<Mixture<4, 4, 2>>(tensor, begin, f);
    default:
      return update_chunk<Mixture<4, 4, 4>>(tensor, begin, f);
  }
}

void note_addresses(const AdamWStep& args) {
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    const AdamWTensor& tensor = args.tensors[i];
    note_address("adamw_step", "parameters", tensor.parameter, tensor.parameter_dtype);
    note_address("adamw_step", "gradients", tensor.gradient, tensor.gradient_dtype);
    note_address("adamw_step", "exp_avgs", tensor.exp_avg, tensor.average_dtype);
    note_address("adamw_step", "exp_avg_sqs", tensor.exp_avg_sq, tensor.average_dtype);
    note_address("adamw_step", "masters", tensor.master, DType::float32);
  }
}

}  // namespace
}  // namespace cuda

void run(const AdamWStep& args, Stream stream) {
  using namespace cuda;
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    REDLINE_CHECK(args.tensors[i].parameter_dtype != DType::float64,
                  "adamw_step: parameters: no kernel for float64");
  }
  if (watcher() != nullptr) note_addresses(args);
  note_choice("lists of tensors in chunks of ", chunk, " elements, a block each");
  const Scalars scalars = {.learning_rate = args.learning_rate.data,
                           .learning_rate_is_float64 = args.learning_rate.dtype == DType::float64,
                           .clip_coefficient = args.clip_coefficient.as<const float>(),
                           .grad_scale = args.grad_scale.as<const float>(),
                           .found_inf = args.found_inf.as<const float>(),
                           .beta1 = args.beta1,
                           .beta2 = args.beta2,
                           .weight_decay = args.weight_decay};
  const Constants constants = {static_cast<float>(1.0 - args.beta1),
                               static_cast<float>(1.0 - args.beta2),
                               static_cast<float>(args.epsilon)};
  for_batches<Batch>(
      args.tensors, args.tensor_count, chunk, [&](const Batch& batch, BatchStart start) {
        AdamWFactors* const factors = args.factors.as<AdamWFactors>() + start.tensor;
        launch(begin_kernel,
               {.grid = dim3(ceil_div(batch.size, 64)), .block = dim3(64), .stream = stream}, batch,
               scalars, factors);
        launch(
            update_kernel,
            {.grid = dim3(batch.first_chunk[batch.size]), .block = dim3(threads), .stream = stream},
            batch, factors, constants);
      });
}

}  // namespace redline
