// Statistics: one read of the logits from memory; each block of 4 KB is searched for its maximum
// and then, out of L1, its exponentials are added. Gradient: one read and one write.
#include "redline/kernels/cpu/cross_entropy.h"

#include <string.h>

#include "redline/kernels/cpu/block.h"
#include "redline/kernels/cpu/running_sum.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// Blocks of one row of logits, softcapped where asked.
template <typename Acc>
struct LogitReader {
  const TensorView& logits;
  Acc softcap;
  Block<Acc> block, capped;
  const Acc* raw = nullptr;  // the last block as the logits are

  const Acc* operator()(int64_t row, int64_t col, int count) {
    raw = RowReader<Acc>{logits, row, block}(col, count);
    if (softcap == 0) return raw;
    for_vectors<Acc>(count, [&](int i, int n) {
      store(capped.values + i, softcap * tanh(load(raw + i, n) / softcap), n);
    });
    return capped.values;
  }
};

// The largest logit of a row and the column that has it first; NaN is above all.
template <typename Acc>
struct Prediction {
  Acc maximum = -infinity<Acc>;
  int64_t column = 0;

  // Blocks come in order; only one that raises the maximum is searched. `exponentials` is the row's
  // sum so far, NaN where a logit is (or is +inf).
  void add(const Acc* x, int64_t col, int count, Acc exponentials) {
    if (maximum != maximum) return;
    Acc found = largest<Acc>(count, [&](int i, int n) { return load(x + i, n); });
    if (exponentials != exponentials) {
      for (int i = count - 1; i >= 0; --i) {
        if (x[i] != x[i]) found = x[i];
      }
    }
    if (found <= maximum) return;
    maximum = found;
    int i = 0;
    while (found == found ? x[i] != found : x[i] == x[i]) ++i;
    column = col + i;
  }
};

template <typename Acc>
void statistics_rows(const CrossEntropyStatistics& args, Range rows) {
  const int64_t cols = args.logits.sizes[1];
  const bool with_sum = args.statistics.sizes[1] == 4;
  LogitReader<Acc> logits{args.logits, static_cast<Acc>(args.softcap), {}, {}};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    Acc* out = args.statistics.as<Acc>() + row * args.statistics.strides[0];
    const int64_t target = args.targets.as<const int64_t>()[row];
    RunningSum<Acc> found;
    Prediction<Acc> prediction;
    Acc target_logit = 0, logit_sum = 0;
    if (args.skip_ignored && target == args.ignore_index) {
      found.maximum = 0;
      found.exponentials = 1;
    } else {
      const int64_t target_col = target - args.vocab_start;
      for_blocks(cols, [&](int64_t col, int count) {
        const Acc* x = logits(row, col, count);
        add_block(found, x, count);
        if (args.predictions) prediction.add(logits.raw, col, count, found.exponentials);
        if (target_col >= col && target_col < col + count) target_logit = x[target_col - col];
        if (with_sum) logit_sum += sum<Acc>(count, [&](int i, int n) { return load(x + i, n); });
      });
    }
    out[0] = found.maximum;
    out[1] = found.exponentials;
    out[2] = target_logit;
    if (with_sum) out[3] = logit_sum;
    if (args.predictions) {
      args.predictions.as<int64_t>()[row] = args.vocab_start + prediction.column;
    }
  }
}

// lse - x as log(Z) + (m - x): what m and x have in common cancels without rounding.
template <typename Acc>
Acc row_loss(const CrossEntropyLoss& args, const Acc* statistics, Acc log_sum, Acc lse) {
  const Acc smoothing = static_cast<Acc>(args.label_smoothing);
  Acc loss = log_sum + (statistics[0] - statistics[2]);
  if (smoothing != 0) {
    const Acc mean = statistics[3] / static_cast<Acc>(args.vocabulary);
    loss = (1 - smoothing) * loss + smoothing * (log_sum + (statistics[0] - mean));
  }
  return args.z_loss != 0 ? loss + static_cast<Acc>(args.z_loss) * lse * lse : loss;
}

template <typename Acc>
void loss_rows(const CrossEntropyLoss& args, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Acc* statistics = args.statistics.as<const Acc>() + row * args.statistics.strides[0];
    const Acc log_sum = static_cast<Acc>(log(statistics[1])), lse = statistics[0] + log_sum;
    const bool ignored = args.targets.as<const int64_t>()[row] == args.ignore_index;
    args.log_sum_exp.as<Acc>()[row] = lse;
    args.row_loss.as<Acc>()[row] = ignored ? 0 : row_loss(args, statistics, log_sum, lse);
  }
}

// What one row's gradient is made of: e^(x - maximum) * scale - shift, less `hot` at the target.
template <typename Acc>
struct RowGradient {
  Acc maximum, scale, shift, hot;
};

template <typename Acc>
RowGradient<Acc> row_gradient(const CrossEntropyGradient& args, int64_t row, bool ignored) {
  const Acc* statistics = args.statistics.as<const Acc>() + row * args.statistics.strides[0];
  Acc upstream = 0;
  if (!ignored) {
    upstream = args.loss_grad.as<const Acc>()[row * args.loss_grad.strides[0]];
    if (args.count) upstream /= *args.count.as<const Acc>();
  }
  Acc through_lse = upstream;
  if (args.z_loss != 0) {
    const Acc lse = statistics[0] + static_cast<Acc>(log(statistics[1]));
    through_lse *= 1 + 2 * static_cast<Acc>(args.z_loss) * lse;
  }
  if (args.log_sum_exp_grad) through_lse += args.log_sum_exp_grad.as<const Acc>()[row];
  const Acc smoothing = static_cast<Acc>(args.label_smoothing);
  return {statistics[0], through_lse / statistics[1],
          upstream * smoothing / static_cast<Acc>(args.vocabulary), upstream * (1 - smoothing)};
}

template <typename Acc>
void write_gradient(const RowGradient<Acc>& row, const Acc* x, Acc* out, int count) {
  for_vectors<Acc>(count, [&](int i, int n) {
    store_ahead(out + i, exp(load_ahead(x + i, n) - row.maximum) * row.scale - row.shift, n);
  });
}

// d/dx c tanh(x / c) = 1 - (capped / c)^2.
template <typename Acc>
void multiply_by_softcap_slope(const Acc* capped, Acc softcap, Acc* out, int count) {
  for_vectors<Acc>(count, [&](int i, int n) {
    const Vector<Acc> ratio = load(capped + i, n) / softcap;
    store(out + i, load(out + i, n) * (1 - ratio * ratio), n);
  });
}

template <typename Acc>
void gradient_rows(const CrossEntropyGradient& args, Range rows) {
  const int64_t cols = args.logits.sizes[1];
  const TensorView& grad = args.logits_grad;
  LogitReader<Acc> logits{args.logits, static_cast<Acc>(args.softcap), {}, {}};
  Block<Acc> grad_block;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t target = args.targets.as<const int64_t>()[row];
    const bool ignored = target == args.ignore_index;
    if (ignored && !args.log_sum_exp_grad) {
      const int64_t bytes = element_bytes(grad.dtype);
      memset(static_cast<char*>(grad.data) + row * grad.strides[0] * bytes, 0,
             static_cast<size_t>(cols * bytes));
      continue;
    }
    const RowGradient<Acc> found = row_gradient<Acc>(args, row, ignored);
    const int64_t target_col = target - args.vocab_start;
    for_blocks(cols, [&](int64_t col, int count) {
      const Acc* x = logits(row, col, count);
      const int64_t offset = row * grad.strides[0] + col;
      Acc* out = begin_write(grad.data, grad.dtype, offset, grad_block);
      write_gradient(found, x, out, count);
      if (target_col >= col && target_col < col + count && !ignored) {
        out[target_col - col] -= found.hot;
      }
      if (logits.softcap != 0) multiply_by_softcap_slope(x, logits.softcap, out, count);
      finish_write(grad.data, grad.dtype, offset, count, grad_block);
    });
  }
}

void statistics(const CrossEntropyStatistics& args, Range rows) {
  args.logits.dtype == DType::float64 ? statistics_rows<double>(args, rows)
                                      : statistics_rows<float>(args, rows);
}

void loss(const CrossEntropyLoss& args, Range rows) {
  args.statistics.dtype == DType::float64 ? loss_rows<double>(args, rows)
                                          : loss_rows<float>(args, rows);
}

void gradient(const CrossEntropyGradient& args, Range rows) {
  args.logits.dtype == DType::float64 ? gradient_rows<double>(args, rows)
                                      : gradient_rows<float>(args, rows);
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels = {statistics, loss, gradient};

}  // namespace redline::cpu::REDLINE_ISA
