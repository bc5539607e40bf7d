// Forward: each block of a row, scaled and masked in L1, adds to the row's maximum and sum; a
// second pass, out of cache, writes. Backward: two passes. Keys that causal and window exclude are
// not read.
#include "redline/kernels/cpu/softmax.h"

#include <stdint.h>
#include <string.h>

#include <type_traits>

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

// -inf where the mask is not zero, by the bits: a branch on a mask without a pattern is taken wrong
// too often (4 ns an element, of which the exponential is one). Bytes: a bool that came from
// another type may hold more than 0 and 1.
template <typename Acc>
void exclude(const uint8_t* mask, int64_t stride, Acc* x, int count) {
  using Bits = std::conditional_t<sizeof(Acc) == 4, uint32_t, uint64_t>;
  const Bits excluded = __builtin_bit_cast(Bits, -infinity<Acc>);
  const auto choose = [&](Acc& value, bool is_excluded) {
    const Bits all = Bits{0} - static_cast<Bits>(is_excluded);
    value = __builtin_bit_cast(Acc, (__builtin_bit_cast(Bits, value) & ~all) | (excluded & all));
  };
  if (stride == 1) {
    for (int i = 0; i < count; ++i) choose(x[i], mask[i] != 0);
  } else {
    for (int i = 0; i < count; ++i) choose(x[i], mask[i * stride] != 0);
  }
}

// Blocks of one row; the masked ones are scaled too, since -inf must stay below any scale.
template <typename Acc>
struct ScoreReader {
  const SoftmaxForward& args;
  RowReader<Acc> scores;
  Block<Acc>& masked;
  Acc scale;
  const uint8_t* mask_row = nullptr;

  ScoreReader(const SoftmaxForward& args, int64_t row, Block<Acc>& block, Block<Acc>& masked)
      : args(args), scores(args.scores, row, block), masked(masked) {
    scale = static_cast<Acc>(args.shape.scale);
    if (!args.mask) return;
    const int64_t query = row % args.shape.queries, head = row / args.shape.queries;
    const int64_t* strides = args.mask.strides;
    mask_row = args.mask.as<const uint8_t>() + head / args.shape.heads * strides[0] +
               head % args.shape.heads * strides[1] + query * strides[2];
  }
  Acc multiplier() const { return mask_row ? 1 : scale; }  // what the values still lack
  const Acc* operator()(int64_t col, int count) {
    const Acc* values = scores(col, count);
    if (!mask_row) return values;
    for_vectors<Acc>(
        count, [&](int i, int n) { store(masked.values + i, load(values + i, n) * scale, n); });
    exclude(mask_row + col * args.mask.strides[3], args.mask.strides[3], masked.values, count);
    return masked.values;
  }
};

// Exponentials of a row between the passes: the output itself where it holds the accumulation type,
// else a buffer, else (longer rows) nothing: they are computed twice.
constexpr int64_t held_keys = 8192;

template <typename Acc>
struct RowBuffers {
  Block<Acc> block, masked, out;
  alignas(64) Acc held[sizeof(Acc) == 4 ? held_keys : 1];

  Acc* place_for(const TensorView& probabilities, int64_t row, Range keys) {
    if (probabilities.dtype == dtype_of<Acc>) {
      return probabilities.as<Acc>() + row * probabilities.strides[0] + keys.begin;
    }
    return keys.end - keys.begin <= held_keys ? held : nullptr;
  }
};

// {origin, sum}: e^(x - origin) over the keys; into `place` where there is one.
template <typename Acc>
RunningSum<Acc> add_exponentials(ScoreReader<Acc>& scores, Range keys, Acc sink, Acc* place) {
  RunningSum<Acc> found{sink, 0};
  const Acc multiplier = scores.multiplier();
  for_key_blocks(keys, [&](int64_t col, int count) {
    const Acc* x = scores(col, count);
    const Acc top =
        largest<Acc>(count, [&](int i, int n) { return load_ahead(x + i, n) * multiplier; });
    if (top > found.maximum) found.maximum = top;
  });
  if (found.maximum == -infinity<Acc>) found.maximum = 0;
  for_key_blocks(keys, [&](int64_t col, int count) {
    const Acc* x = scores(col, count);
    found.exponentials += sum<Acc>(count, [&](int i, int n) {
      const Vector<Acc> e = exp(load(x + i, n) * multiplier - found.maximum);
      if (place) store_ahead(place + (col - keys.begin) + i, e, n);
      return fill_tail<Acc>(e, n, 0);
    });
  });
  return found;
}

// What the last pass knows of a row.
template <typename Acc>
struct Normalizer {
  Range keys;
  const Acc* place;
  Acc origin, inverse_sum;
};

template <typename Acc>
void write_probabilities(const TensorView& out, int64_t row, const Normalizer<Acc>& normalizer,
                         ScoreReader<Acc>& scores, Block<Acc>& block) {
  const Acc multiplier = scores.multiplier();
  const Acc* place = normalizer.place;
  for_key_blocks(normalizer.keys, [&](int64_t col, int count) {
    const Acc* x = place ? place + (col - normalizer.keys.begin) : scores(col, count);
    const int64_t offset = row * out.strides[0] + col;
    Acc* to = begin_write(out.data, out.dtype, offset, block);
    for_vectors<Acc>(count, [&](int i, int n) {
      const Vector<Acc> values = load(x + i, n);
      const Vector<Acc> e = place ? values : exp(values * multiplier - normalizer.origin);
      store(to + i, e * normalizer.inverse_sum, n);
    });
    finish_write(out.data, out.dtype, offset, count, block);
  });
}

template <typename Acc>
void forward_rows(const SoftmaxForward& args, Range rows) {
  const TensorView& out = args.probabilities;
  const int64_t cols = args.scores.sizes[1], queries = args.shape.queries;
  RowBuffers<Acc> buffers;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Range keys = allowed_keys(row % queries, queries, cols, args.causal, args.window);
    const Acc sink =
        args.sink ? args.sink.as<const Acc>()[row / queries % args.shape.heads] : -infinity<Acc>;
    ScoreReader<Acc> scores(args, row, buffers.block, buffers.masked);
    Acc* place = buffers.place_for(out, row, keys);
    const RunningSum<Acc> found = add_exponentials(scores, keys, sink, place);
    const Acc of_sink = exp(broadcast<Acc>(sink - found.maximum))[0];
    const Acc total = found.exponentials + of_sink;
    const Acc inverse_sum = total == 0 ? 0 : 1 / total;
    if (args.sink) args.sink_probability.as<Acc>()[row] = of_sink * inverse_sum;
    write_zeros(out, row, {0, keys.begin});
    write_zeros(out, row, {keys.end, cols});
    write_probabilities(out, row, {keys, place, found.maximum, inverse_sum}, scores, buffers.out);
  }
}

template <typename Acc>
void backward_rows(const SoftmaxBackward& args, Range rows) {
  const TensorView& out = args.scores_grad;
  const int64_t cols = args.probabilities.sizes[1], queries = args.shape.queries;
  const Acc scale = static_cast<Acc>(args.shape.scale);
  Block<Acc> gradient_block, probability_block, out_block;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Range keys = allowed_keys(row % queries, queries, cols, args.causal, args.window);
    write_zeros(out, row, {0, keys.begin});
    write_zeros(out, row, {keys.end, cols});
    RowReader<Acc> gradients{args.probabilities_grad, row, gradient_block};
    RowReader<Acc> probabilities{args.probabilities, row, probability_block};
    Acc dot = 0;
    for_key_blocks(keys, [&](int64_t col, int count) {
      const Acc* g = gradients(col, count);
      const Acc* p = probabilities(col, count);
      dot += sum<Acc>(count,
                      [&](int i, int n) { return load_ahead(g + i, n) * load_ahead(p + i, n); });
    });
    if (args.sink_probability) {
      args.sink_rows.as<Acc>()[row] = -dot * args.sink_probability.as<const Acc>()[row];
    }
    for_key_blocks(keys, [&](int64_t col, int count) {
      const Acc* g = gradients(col, count);
      const Acc* p = probabilities(col, count);
      const int64_t offset = row * out.strides[0] + col;
      Acc* to = begin_write(out.data, out.dtype, offset, out_block);
      for_vectors<Acc>(count, [&](int i, int n) {
        store_ahead(to + i, scale * load(p + i, n) * (load(g + i, n) - dot), n);
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
