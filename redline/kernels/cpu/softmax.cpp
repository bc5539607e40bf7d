// Forward: each block of a row, scaled and masked in L1, adds to the row's maximum and sum; a
// second pass, out of cache, writes. Backward: two passes. Keys that causal and window exclude are
// not read.
#include "redline/kernels/cpu/softmax.h"

#include "redline/kernels/cpu/block.h"
#include "redline/kernels/cpu/running_sum.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// Calls body(col, count) for each block of the keys.
template <typename Body>
REDLINE_INLINE void for_key_blocks(Range keys, Body body) {
  for_blocks(keys.end - keys.begin, [&](int64_t col, int count) { body(keys.begin + col, count); });
}

void write_zeros(const TensorView& matrix, int64_t row, Range cols) {
  const int64_t bytes = element_bytes(matrix.dtype);
  char* from = static_cast<char*>(matrix.data) + (row * matrix.strides[0] + cols.begin) * bytes;
  memset(from, 0, static_cast<size_t>((cols.end - cols.begin) * bytes));
}

// -inf where the mask is true.
template <typename Acc>
void exclude(const bool* mask, int64_t stride, Acc* x, int count) {
  if (stride == 1) {
    for (int i = 0; i < count; ++i) x[i] = mask[i] ? -infinity<Acc> : x[i];
  } else {
    for (int i = 0; i < count; ++i) x[i] = mask[i * stride] ? -infinity<Acc> : x[i];
  }
}

// Blocks of one row, scaled and masked.
template <typename Acc>
struct ScoreReader {
  const SoftmaxForward& args;
  Block<Acc> block, scaled;
  const bool* mask_row = nullptr;

  void begin_row(int64_t row) {
    if (!args.mask) return;
    const int64_t query = row % args.shape.queries, head = row / args.shape.queries;
    const int64_t* strides = args.mask.strides;
    mask_row = args.mask.as<const bool>() + head / args.shape.heads * strides[0] +
               head % args.shape.heads * strides[1] + query * strides[2];
  }
  const Acc* operator()(int64_t row, int64_t col, int count) {
    const Acc* values = RowReader<Acc>{args.scores, row, block}(col, count);
    const Acc scale = static_cast<Acc>(args.shape.scale);
    for_vectors<Acc>(
        count, [&](int i, int n) { store(scaled.values + i, load(values + i, n) * scale, n); });
    if (mask_row) {
      const int64_t stride = args.mask.strides[3];
      exclude(mask_row + col * stride, stride, scaled.values, count);
    }
    return scaled.values;
  }
};

// Adds the sink and returns the row's {maximum, 1 / sum}; all zeros where nothing is left.
template <typename Acc>
struct Normalizer {
  Acc maximum = 0, inverse_sum = 0;
};

template <typename Acc>
Normalizer<Acc> finish_row(const SoftmaxForward& args, int64_t row, const RunningSum<Acc>& found) {
  Acc maximum = found.maximum, total = found.exponentials, sink = -infinity<Acc>;
  if (args.sink) {
    sink = args.sink.as<const Acc>()[row / args.shape.queries % args.shape.heads];
    if (sink > maximum) {
      const Acc rescaled = total * exp(broadcast<Acc>(maximum - sink))[0];
      total = total != 0 ? rescaled : total;
      maximum = sink;
    }
    total += maximum == -infinity<Acc> ? 0 : exp(broadcast<Acc>(sink - maximum))[0];
  }
  Normalizer<Acc> result;
  if (total != 0) result = {maximum == -infinity<Acc> ? 0 : maximum, 1 / total};
  if (args.sink) {
    args.sink_probability.as<Acc>()[row] =
        exp(broadcast<Acc>(sink - result.maximum))[0] * result.inverse_sum;
  }
  return result;
}

template <typename Acc>
void forward_rows(const SoftmaxForward& args, Range rows) {
  const TensorView& out = args.probabilities;
  const int64_t cols = args.scores.sizes[1];
  ScoreReader<Acc> scores{args, {}, {}};
  Block<Acc> out_block;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Range keys =
        allowed_keys(row % args.shape.queries, args.shape.queries, cols, args.causal, args.window);
    scores.begin_row(row);
    RunningSum<Acc> found;
    for_key_blocks(
        keys, [&](int64_t col, int count) { add_block(found, scores(row, col, count), count); });
    const Normalizer<Acc> normalizer = finish_row(args, row, found);
    if (normalizer.inverse_sum == 0) {
      write_zeros(out, row, {0, cols});
      continue;
    }
    write_zeros(out, row, {0, keys.begin});
    write_zeros(out, row, {keys.end, cols});
    for_key_blocks(keys, [&](int64_t col, int count) {
      const Acc* x = scores(row, col, count);
      const int64_t offset = row * out.strides[0] + col;
      Acc* to = begin_write(out.data, out.dtype, offset, out_block);
      for_vectors<Acc>(count, [&](int i, int n) {
        store(to + i, exp(load(x + i, n) - normalizer.maximum) * normalizer.inverse_sum, n);
      });
      finish_write(out.data, out.dtype, offset, count, out_block);
    });
  }
}

template <typename Acc>
void backward_rows(const SoftmaxBackward& args, Range rows) {
  const TensorView& out = args.scores_grad;
  const int64_t cols = args.probabilities.sizes[1];
  const Acc scale = static_cast<Acc>(args.shape.scale);
  Block<Acc> gradient_block, probability_block, out_block;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    RowReader<Acc> gradients{args.probabilities_grad, row, gradient_block};
    RowReader<Acc> probabilities{args.probabilities, row, probability_block};
    Acc dot = 0;
    for_blocks(cols, [&](int64_t col, int count) {
      const Acc* g = gradients(col, count);
      const Acc* p = probabilities(col, count);
      dot += sum<Acc>(count, [&](int i, int n) { return load(g + i, n) * load(p + i, n); });
    });
    if (args.sink_probability) {
      args.sink_rows.as<Acc>()[row] = -dot * args.sink_probability.as<const Acc>()[row];
    }
    for_blocks(cols, [&](int64_t col, int count) {
      const Acc* g = gradients(col, count);
      const Acc* p = probabilities(col, count);
      const int64_t offset = row * out.strides[0] + col;
      Acc* to = begin_write(out.data, out.dtype, offset, out_block);
      for_vectors<Acc>(count, [&](int i, int n) {
        store(to + i, scale * load(p + i, n) * (load(g + i, n) - dot), n);
      });
      finish_write(out.data, out.dtype, offset, count, out_block);
    });
  }
}

void forward(const SoftmaxForward& args, Range rows) {
  args.scores.dtype == DType::float64 ? forward_rows<double>(args, rows)
                                      : forward_rows<float>(args, rows);
}

void backward(const SoftmaxBackward& args, Range rows) {
  args.probabilities.dtype == DType::float64 ? backward_rows<double>(args, rows)
                                             : backward_rows<float>(args, rows);
}

}  // namespace

extern const SoftmaxKernels softmax_kernels = {forward, backward};

}  // namespace redline::cpu::REDLINE_ISA
