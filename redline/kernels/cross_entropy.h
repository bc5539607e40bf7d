// Cross entropy of logits x and a target class t per row, V classes, with label smoothing s and
// z-loss weight z:
//   lse  = m + log(Z),   m = max_j x_j,   Z = sum_j e^(x_j - m)
//   loss = lse - (1 - s) x_t - s / V sum_j x_j + z lse^2      (lse - x as log(Z) + (m - x))
// With a softcap c, x_j is c tanh(logit_j / c). Rows whose target is ignore_index give 0 and a zero
// gradient. Arithmetic in float32 (float64 for float64), one rounding at the end.
// Two kernels read the logits, so that a vocabulary split over ranks fits between them:
// `statistics` (m, Z, x_t per row; the sum of the logits too where smoothing asks for it; they
// merge over ranks by maximum, by rescaled sum and by sum) and `gradient`. Backward keeps the
// logits and three (four) float32 per row. A target that is no class: an error on CPU, NaN on CUDA
// (loss and gradient of that row); memory is never read at it.
// `predictions`, where they are asked for, come out of the same read: vocab_start and the column of
// the row's largest logit before any softcap, of equal ones the first, of a row with NaN that of
// the first NaN, of -inf alone the first column. Ignored rows have them too.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"

namespace redline {

enum class Reduction { none, mean, sum };

struct CrossEntropyStatistics {
  TensorView logits;      // [rows, cols]: the classes [vocab_start, vocab_start + cols)
  TensorView targets;     // [rows] int64
  TensorView statistics;  // [rows, 3 or 4] accumulation dtype, out: m, Z, x_t or 0, sum of x
  int64_t vocab_start = 0;
  int64_t ignore_index = -100;
  double softcap = 0;           // 0: none
  bool skip_ignored = false;    // ignored rows are not read and get {0, 1, 0, 0}
  TensorView predictions = {};  // [rows] int64, out, optional: not with skip_ignored
};

// The mean divides by the number of rows that are not ignored: NaN where there are none.
struct CrossEntropyLoss {
  TensorView statistics;   // [rows, 3 or 4], of the whole vocabulary
  TensorView targets;      // [rows] int64
  TensorView row_loss;     // [rows] accumulation dtype, out
  TensorView log_sum_exp;  // [rows] accumulation dtype, out
  TensorView loss;         // [1] accumulation dtype, out; absent without a reduction
  TensorView count;        // [1] accumulation dtype, out: what the mean divides by; with loss
  TensorView partial;      // [loss_chunks(rows), 2] accumulation dtype, workspace; CUDA, with loss
  int64_t vocabulary = 0;
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  double z_loss = 0;
  Reduction reduction = Reduction::none;
};

// With u the row's upstream gradient (over count, for a mean) and l that of lse:
//   x_grad_j = e^(x_j - m) / Z * (u (1 + 2 z lse) + l) - u (s / V + (1 - s) [j = t])
// times 1 - tanh^2(logit_j / c) with a softcap.
struct CrossEntropyGradient {
  TensorView logits;            // [rows, cols]
  TensorView targets;           // [rows] int64
  TensorView statistics;        // [rows, 3 or 4], of the whole vocabulary
  TensorView loss_grad;         // [rows] accumulation dtype; a stride of 0 repeats one value
  TensorView log_sum_exp_grad;  // [rows] accumulation dtype, optional
  TensorView count;             // [1] accumulation dtype, optional
  TensorView logits_grad;       // [rows, cols], out, logits' dtype; may be the logits themselves
  int64_t vocab_start = 0;
  int64_t vocabulary = 0;
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  double z_loss = 0;
  double softcap = 0;
};

// What a mean divides by: the number of targets that are not ignored.
struct CrossEntropyCount {
  TensorView targets;  // [rows] int64, at most counted_rows
  TensorView count;    // [1] float32, out
  int64_t ignore_index = -100;
};

constexpr int64_t counted_rows = 65536;  // by one block

// Statistics and gradient in one pass, under an upstream gradient that is known before the loss:
// the logits are read once where a row fits into the shared memory of a cluster. Rows that are
// ignored are not read, unless predictions are asked for.
struct CrossEntropyPromise {
  TensorView logits;       // [rows, cols], the whole vocabulary
  TensorView targets;      // [rows] int64
  TensorView loss_scale;   // [rows] accumulation dtype; a stride of 0 repeats one value
  TensorView count;        // [1] accumulation dtype, optional
  TensorView statistics;   // [rows, 3 or 4] accumulation dtype, out
  TensorView logits_grad;  // [rows, cols], out, logits' dtype; may be the logits themselves
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  double z_loss = 0;
  double softcap = 0;
  TensorView predictions = {};  // [rows] int64, out, optional
};

// The two passes that a promise stands for.
CrossEntropyStatistics statistics_of(const CrossEntropyPromise&);
CrossEntropyGradient gradient_of(const CrossEntropyPromise&);

// What was promised becomes what is: logits_grad times given / promised, and left alone where they
// are one number.
struct CrossEntropyRescale {
  TensorView logits_grad;      // [rows, cols], in and out
  TensorView given, promised;  // [1] accumulation dtype
};

void check(const CrossEntropyStatistics&);
void check(const CrossEntropyLoss&);  // on the CPU check_targets() too
void check(const CrossEntropyGradient&);
void check(const CrossEntropyCount&);
void check(const CrossEntropyPromise&);
void check(const CrossEntropyRescale&);

// Throws where a target is neither a class nor ignore_index. Reads the targets: CPU tensors alone.
void check_targets(const char* op, const TensorView& targets, int64_t vocabulary,
                   int64_t ignore_index);

// CPU. finish() adds the rows in index order. A rescale is ATen's there.
void run(const CrossEntropyStatistics&, Range rows);
void run(const CrossEntropyLoss&, Range rows);
void finish(const CrossEntropyLoss&);
void run(const CrossEntropyGradient&, Range rows);
void run(const CrossEntropyPromise&, Range rows);

// CUDA. The loss includes the sum. Counting is ATen's elsewhere.
void run(const CrossEntropyStatistics&, Stream);
void run(const CrossEntropyLoss&, Stream);
void run(const CrossEntropyGradient&, Stream);
void run(const CrossEntropyCount&, Stream);
void run(const CrossEntropyPromise&, Stream);
void run(const CrossEntropyRescale&, Stream);

// How many partial sums the rows' losses fall into on CUDA.
constexpr int64_t loss_chunks(int64_t rows) { return (rows + 1023) / 1024; }

}  // namespace redline
