// Forward: the row is read once from memory and again from L1/L2 for the output. Backward: two
// passes over y_grad and x, the second out of cache; partial sums of the weight's gradient stay in
// a [cols] row of the workspace.
#include "redline/kernels/cpu/norm.h"

#include "redline/kernels/cpu/dropout.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// weight and bias of one block; 1 + weight when zero_centered; absent ones read as 1 and 0.
template <typename Acc>
struct Affine {
  const TensorView& weight;
  const TensorView& bias;
  Vector<Acc> offset;  // 1 when zero_centered
  Block<Acc> weight_block, bias_block;
  const Acc* weights = nullptr;
  const Acc* biases = nullptr;

  Affine(const TensorView& weight, const TensorView& bias, bool zero_centered)
      : weight(weight), bias(bias), offset(broadcast<Acc>(zero_centered ? 1 : 0)) {}

  int64_t held_col = -1;

  // Rows of one block read the parameters once for all rows.
  void read_block(int64_t col, int count) {
    if (col == held_col) return;
    held_col = col;
    if (weight) weights = read<Acc>(weight.data, weight.dtype, col, count, weight_block);
    if (bias) biases = read<Acc>(bias.data, bias.dtype, col, count, bias_block);
  }
  REDLINE_INLINE Vector<Acc> scale(int i, int n) const {
    return weights ? load(weights + i, n) + offset : broadcast<Acc>(1);
  }
  REDLINE_INLINE Vector<Acc> shift(int i, int n) const {
    return biases ? load(biases + i, n) : Vector<Acc>{};
  }
};

// x + residual of one row, rounded to the residual's dtype, into `sum`.
template <typename Acc>
void add_row(const NormForward& args, int64_t row) {
  Block<Acc> x_block, residual_block, sum_block;
  RowReader<Acc> x(args.x, row, x_block), residual(args.residual, row, residual_block);
  for_blocks(args.x.sizes[1], [&](int64_t col, int count) {
    const Acc* a = x(col, count);
    const Acc* b = residual(col, count);
    const int64_t offset = row * args.sum.strides[0] + col;
    Acc* out = begin_write(args.sum.data, args.sum.dtype, offset, sum_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      store_ahead(out + i, load_ahead(a + i, n) + load_ahead(b + i, n), n);
    });
    finish_write(args.sum.data, args.sum.dtype, offset, count, sum_block);
  });
}

// Zero in the lanes past n, whatever the vector holds there.
template <typename Acc>
REDLINE_INLINE Vector<Acc> first(Vector<Acc> v, int n) {
  for (int i = n; i < lanes<Acc>; ++i) v[i] = 0;
  return v;
}

template <typename Acc>
struct Statistics {
  Acc mean, inverse_std;
};

// Those that an earlier pass stored.
template <typename Acc, typename Args>
Statistics<Acc> statistics_of(const Args& args, int64_t row) {
  return {args.mean ? args.mean.template as<const Acc>()[row] : 0,
          args.inverse_std.template as<const Acc>()[row]};
}

template <typename Acc>
void store_statistics(const NormForward& args, int64_t row, Statistics<Acc> found) {
  args.inverse_std.as<Acc>()[row] = found.inverse_std;
  if (args.mean) args.mean.as<Acc>()[row] = found.mean;
}

// Two passes for layer: the sum of (x - mean)^2 loses nothing to cancellation.
template <typename Acc>
Statistics<Acc> row_statistics(RowReader<Acc>& x, int64_t cols, Norm norm, double epsilon) {
  Acc mean = 0;
  if (norm == Norm::layer) {
    for_blocks(cols, [&](int64_t col, int count) {
      const Acc* values = x(col, count);
      mean += sum<Acc>(count, [&](int i, int n) { return load_ahead(values + i, n); });
    });
    mean /= static_cast<Acc>(cols);
  }
  Acc squares = 0;
  for_blocks(cols, [&](int64_t col, int count) {
    const Acc* values = x(col, count);
    squares += sum<Acc>(count, [&](int i, int n) {
      const Vector<Acc> centered = first<Acc>(load_ahead(values + i, n) - mean, n);
      return centered * centered;
    });
  });
  const Acc variance = squares / static_cast<Acc>(cols);
  return {mean, 1 / static_cast<Acc>(::sqrt(variance + static_cast<Acc>(epsilon)))};
}

// The largest magnitude of a row of y as it was stored, NaN above all.
template <typename Acc>
Acc row_amax(const TensorView& y, int64_t row) {
  Block<Acc> block;
  RowReader<Acc> reader(y, row, block);
  Vector<Acc> largest{};
  for_blocks(y.sizes[1], [&](int64_t col, int count) {
    const Acc* values = reader(col, count);
    for_vectors<Acc>(count, [&](int i, int n) {
      Vector<Acc> magnitude = first<Acc>(load(values + i, n), n);
      magnitude = magnitude < 0 ? -magnitude : magnitude;
      const auto more = (magnitude > largest) | (magnitude != magnitude);
      largest = more ? magnitude : largest;
    });
  });
  Acc amax = 0;
  for (int i = 0; i < lanes<Acc>; ++i) {
    if (largest[i] > amax || largest[i] != largest[i]) amax = largest[i];
  }
  return amax;
}

template <typename Acc>
void forward_rows(const NormForward& args, Range rows) {
  const int64_t cols = args.x.sizes[1];
  const int64_t counted = counted_rows(args.row_count, args.x.sizes[0]);
  const TensorView& source = args.residual ? args.sum : args.x;
  const bool drops = args.input_bias || args.rng_state;
  const BiasDropoutAddForward dropped = drops ? input_sum(args) : BiasDropoutAddForward{};
  if (rows.begin == 0) store_state(dropped);
  Affine<Acc> affine(args.weight, args.bias, args.zero_centered);
  Block<Acc> x_block, y_block;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (row >= counted) {
      write_zeros(args.y, row);
      if (args.residual) write_zeros(args.sum, row);
      if (!args.statistics_given) store_statistics<Acc>(args, row, {});
      if (args.quantized.amax) args.quantized.amax.as<Acc>()[row] = 0;
      continue;
    }
    if (drops) {
      forward_elements<Acc>(dropped, {row * cols, (row + 1) * cols});
    } else if (args.residual) {
      add_row<Acc>(args, row);
    }
    RowReader<Acc> x(source, row, x_block);
    const Statistics<Acc> found = args.statistics_given
                                      ? statistics_of<Acc>(args, row)
                                      : row_statistics<Acc>(x, cols, args.norm, args.epsilon);
    if (!args.statistics_given) store_statistics<Acc>(args, row, found);
    for_blocks(cols, [&](int64_t col, int count) {
      const Acc* values = x(col, count);
      affine.read_block(col, count);
      const int64_t offset = row * args.y.strides[0] + col;
      Acc* out = begin_write(args.y.data, args.y.dtype, offset, y_block);
      for_vectors<Acc>(count, [&](int i, int n) {
        const Vector<Acc> normalized = (load(values + i, n) - found.mean) * found.inverse_std;
        store_ahead(out + i, normalized * affine.scale(i, n) + affine.shift(i, n), n);
      });
      finish_write(args.y.data, args.y.dtype, offset, count, y_block);
    });
    if (args.quantized.amax) args.quantized.amax.as<Acc>()[row] = row_amax<Acc>(args.y, row);
  }
}

// One row of backward: reads what it needs, block by block.
template <typename Acc>
struct BackwardRow {
  const NormBackward& args;
  int64_t row;
  Affine<Acc>& affine;
  Block<Acc> x_block, y_grad_block, sum_grad_block, x_grad_block, y_block;
  const Acc* x = nullptr;
  const Acc* y_grad = nullptr;
  int64_t held_col = -1;

  void begin(int64_t next_row) {
    row = next_row;
    held_col = -1;
  }
  void read_block(int64_t col, int count) {
    affine.read_block(col, count);
    if (col == held_col) return;
    held_col = col;
    x = RowReader<Acc>(args.x, row, x_block)(col, count);
    y_grad = RowReader<Acc>(args.y_grad, row, y_grad_block)(col, count);
  }
};

// mean(g) and mean(g * xh) of the row; the partial sums of the columns on the way.
template <typename Acc>
struct RowMeans {
  Acc gradient = 0, product = 0;
};

// Two running vectors for each sum: one loop reads everything once.
template <typename Acc>
RowMeans<Acc> accumulate_block(const BackwardRow<Acc>& at, int count, Statistics<Acc> row,
                               Acc* weight_sums, Acc* bias_sums) {
  constexpr int n = lanes<Acc>;
  Vector<Acc> gradient_a{}, gradient_b{}, product_a{}, product_b{};
  const auto add = [&](int i, int n, Vector<Acc>& gradients, Vector<Acc>& products) {
    const Vector<Acc> y_grad = load_ahead(at.y_grad + i, n);
    const Vector<Acc> product =
        first<Acc>(y_grad * (load_ahead(at.x + i, n) - row.mean) * row.inverse_std, n);
    const Vector<Acc> scale = at.affine.scale(i, n);
    if (weight_sums) store(weight_sums + i, load(weight_sums + i, n) + product, n);
    if (bias_sums) store(bias_sums + i, load(bias_sums + i, n) + y_grad, n);
    gradients += y_grad * scale;
    products += product * scale;
  };
  int i = 0;
  for (; i + 2 * n <= count; i += 2 * n) {
    add(i, n, gradient_a, product_a);
    add(i + n, n, gradient_b, product_b);
  }
  for (; i + n <= count; i += n) add(i, n, gradient_a, product_a);
  if (i < count) add(i, count - i, gradient_b, product_b);
  return {sum_lanes<Acc>(gradient_a + gradient_b), sum_lanes<Acc>(product_a + product_b)};
}

template <typename Acc>
RowMeans<Acc> accumulate_row(BackwardRow<Acc>& at, Statistics<Acc> row, Acc* weight_sums,
                             Acc* bias_sums) {
  RowMeans<Acc> means;
  const int64_t cols = at.args.x.sizes[1];
  for_blocks(cols, [&](int64_t col, int count) {
    at.read_block(col, count);
    const RowMeans<Acc> more =
        accumulate_block(at, count, row, weight_sums ? weight_sums + col : nullptr,
                         bias_sums ? bias_sums + col : nullptr);
    means.gradient += more.gradient;
    means.product += more.product;
  });
  means.gradient /= static_cast<Acc>(cols);
  means.product /= static_cast<Acc>(cols);
  return means;
}

template <typename Acc>
void write_x_grad(BackwardRow<Acc>& at, RowMeans<Acc> means, Statistics<Acc> of) {
  const NormBackward& args = at.args;
  const Acc gradient_mean = args.norm == Norm::layer ? means.gradient : 0;
  for_blocks(args.x.sizes[1], [&](int64_t col, int count) {
    at.read_block(col, count);
    const Acc* sum_grad = args.sum_grad
                              ? RowReader<Acc>(args.sum_grad, at.row, at.sum_grad_block)(col, count)
                              : nullptr;
    const int64_t offset = at.row * args.x_grad.strides[0] + col;
    Acc* out = begin_write(args.x_grad.data, args.x_grad.dtype, offset, at.x_grad_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      const Vector<Acc> g = load(at.y_grad + i, n) * at.affine.scale(i, n);
      const Vector<Acc> normalized = (load(at.x + i, n) - of.mean) * of.inverse_std;
      Vector<Acc> result = of.inverse_std * (g - normalized * means.product - gradient_mean);
      if (sum_grad) result += load_ahead(sum_grad + i, n);
      store_ahead(out + i, result, n);
    });
    finish_write(args.x_grad.data, args.x_grad.dtype, offset, count, at.x_grad_block);
  });
}

// As forward writes it.
template <typename Acc>
void write_y(BackwardRow<Acc>& at, Statistics<Acc> of) {
  const TensorView& y = at.args.y;
  for_blocks(y.sizes[1], [&](int64_t col, int count) {
    at.read_block(col, count);
    const int64_t offset = at.row * y.strides[0] + col;
    Acc* out = begin_write(y.data, y.dtype, offset, at.y_block);
    for_vectors<Acc>(count, [&](int i, int n) {
      const Vector<Acc> normalized = (load(at.x + i, n) - of.mean) * of.inverse_std;
      store_ahead(out + i, normalized * at.affine.scale(i, n) + at.affine.shift(i, n), n);
    });
    finish_write(y.data, y.dtype, offset, count, at.y_block);
  });
}

template <typename Acc>
void backward_rows(const NormBackward& args, int64_t chunk, Range rows) {
  const int64_t counted = counted_rows(args.row_count, args.x.sizes[0]);
  Affine<Acc> affine(args.weight, args.bias, args.zero_centered);
  Acc* weight_sums = begin_chunk<Acc>({args.weight_partial, args.weight_grad}, chunk);
  Acc* bias_sums = begin_chunk<Acc>({args.bias_partial, args.bias_grad}, chunk);
  const BiasDropoutAddBackward input = input_gradient(args);
  Acc* input_bias_sums = begin_chunk<Acc>(args.input_bias_grad, chunk);
  const int64_t cols = args.x.sizes[1];
  BackwardRow<Acc> at{args, 0, affine, {}, {}, {}, {}, {}};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (row >= counted) {
      write_zeros(args.x_grad, row);
      continue;
    }
    at.begin(row);
    const Statistics<Acc> of = statistics_of<Acc>(args, row);
    write_x_grad(at, accumulate_row(at, of, weight_sums, bias_sums), of);
    if (args.y) write_y(at, of);
    if (args.input_grad || input_bias_sums) {
      backward_elements(input, {row * cols, (row + 1) * cols}, input_bias_sums);
    }
  }
}

void forward(const NormForward& args, Range rows) {
  if (args.x.dtype == DType::float64) {
    forward_rows<double>(args, rows);
  } else {
    forward_rows<float>(args, rows);
  }
}

void backward(const NormBackward& args, int64_t chunk, Range rows) {
  if (args.x.dtype == DType::float64) {
    backward_rows<double>(args, chunk, rows);
  } else {
    backward_rows<float>(args, chunk, rows);
  }
}

void finish(const NormBackward& args, Range cols) {
  finish_columns({args.weight_partial, args.weight_grad}, cols);
  finish_columns({args.bias_partial, args.bias_grad}, cols);
  finish_columns(args.input_bias_grad, cols);
}

}  // namespace

extern const NormKernels norm_kernels = {forward, backward, finish};

}  // namespace redline::cpu::REDLINE_ISA
