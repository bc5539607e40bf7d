#include "redline/ops/fused_linear_cross_entropy_chunks.h"

#include <algorithm>

#include "redline/kernels/cross_entropy.h"
#include "redline/ops/gemm.h"
#include "redline/ops/linear.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Loss = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* op_name = "fused_linear_cross_entropy";

// --- chunks -------------------------------------------------------------------------------------

// The buffer holds a share of the logits, within bounds: products of fewer rows or columns fall
// from their rate (two CPU cores, 2048 tokens of 8192 classes: 128 rows cost 1.5 times the product
// of all, 512 the same), and more would be more memory than the rest of the op takes.
struct Share {
  int64_t parts;  // that hold all logits, unless they are too small or too large
  int64_t least_bytes, most_bytes;
};

Share quarter_of(const Tensor& x) {
  return {4, int64_t{x.is_cuda() ? 64 : 16} << 20, int64_t{512} << 20};
}

// A third on CUDA, where every chunk reads and writes the weight's gradient (1 GB of 128256 x 4096
// in 16 bits) and the products take as little time as that.
constexpr int64_t few = 3;

Share promised_share(const Tensor& x) {
  return x.is_cuda() ? Share{few, int64_t{64} << 20, int64_t{768} << 20} : quarter_of(x);
}

// Rows of cuBLAS's tiles, and a multiple of every vector: no row of the buffer is unaligned.
constexpr int64_t tile = 128;

int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

int64_t round_up(int64_t count, int64_t multiple) { return divide_up(count, multiple) * multiple; }

// How many of `count` lines of `width` logits a chunk holds: equal chunks but for the last. A
// function of shape, dtype and kind of device.
int64_t chunk_of(int64_t count, int64_t width, const Tensor& x, Share share) {
  const int64_t line_bytes = std::max<int64_t>(1, width * x.element_size());
  const int64_t bytes =
      std::clamp(divide_up(count * line_bytes, share.parts), share.least_bytes, share.most_bytes);
  const int64_t chunks = std::max<int64_t>(1, divide_up(count * line_bytes, bytes));
  const int64_t chunk = divide_up(count, chunks);
  if (chunk < tile) return chunk;
  const bool fits = round_up(chunk, tile) * line_bytes <= share.most_bytes;
  return std::min(count, fits ? round_up(chunk, tile) : chunk / tile * tile);
}

// True only where a promise's tokens are known to make `few` chunks at most: by a product that a
// symbol may be in, so with room for the rounding to tiles, and without a guard on the symbol,
// which would bound what an exported program takes.
bool has_few_chunks(const LossHead& head) {
  const Share share = promised_share(head.x);
  const int64_t bytes = share.parts <= few ? share.most_bytes : share.least_bytes;
  const int64_t element = static_cast<int64_t>(head.x.element_size());
  const c10::SymInt lines = head.targets.sym_numel() + few * tile;
  return (lines * head.weight.sym_size(0) * element)
      .sym_le(few * bytes)
      .statically_known_true(__FILE__, __LINE__);
}

// In which a promise sums the weight's gradient over its chunks. In 16 bits three parts of equal
// size, each sum rounded, are off by sqrt(1/3 + 2/3 + 1) = 1.41 of one rounding; the library rounds
// the second and third product before it adds them, sqrt(2/3) more: 1.63, of which stock has one
// and the law allows two. The memory and the traffic are half of float32's. Scales of a token each
// may have two signs, and chunks that cancel leave their roundings: those are summed in float32.
at::ScalarType kept_dtype(const LossHead& head, bool with_main_grad) {
  const at::ScalarType dtype = head.x.scalar_type(), wide = accumulation_type(head.x);
  const bool narrow = dtype != wide && !with_main_grad && head.options.loss_scale->dim() == 0;
  return narrow && has_few_chunks(head) ? dtype : wide;
}

template <typename Body>
void for_chunks(int64_t count, int64_t chunk, Body body) {
  for (int64_t begin = 0; begin < count; begin += chunk) {
    body(Range{begin, std::min(count, begin + chunk)});
  }
}

Tensor part(const Tensor& tensor, Range range) {
  return tensor.narrow(0, range.begin, range.end - range.begin);
}

// --- the head below the dispatcher --------------------------------------------------------------

// Sizes that need no symbols, rows as [tokens, hidden] and [tokens].
struct Rows {
  explicit Rows(const LossHead& head)
      : x(rows_of(head.x)),
        weight(head.weight),
        bias(head.bias),
        targets(flat_targets(op_name, head.targets)),
        tokens(x.size(0)),
        vocabulary(weight.size(0)) {
    TORCH_CHECK(vocabulary > 0, op_name, ": weight: expected at least one class, not ",
                weight.sizes());
    if (!x.is_cuda()) {
      check_targets(op_name, view(targets), vocabulary, head.options.ignore_index);
    }
  }

  // Room for the logits of so many tokens and classes, with rows of whole tiles.
  Tensor buffer(int64_t rows, int64_t classes) const {
    return empty_of({rows, round_up(classes, tile)}, x.options());
  }

  // x W^T + bias of a part, in the buffer.
  Tensor logits(const Tensor& buffer, Range rows, Range classes) const {
    Tensor out =
        buffer.narrow(0, 0, rows.end - rows.begin).narrow(1, 0, classes.end - classes.begin);
    gemm_out({.a = part(x, rows),
              .b = part(weight, classes).t(),
              .out = out,
              .bias = bias ? part(*bias, classes) : Tensor()});
    return out;
  }

  Tensor x, weight;
  OptionalTensor bias;
  Tensor targets;
  int64_t tokens, vocabulary;
};

bool is_mean(const CrossEntropyOptions& options) { return options.reduction == "mean"; }

Tensor empty_statistics(const LossHead& head) {
  return at::empty_symint({head.targets.sym_numel(), head.options.label_smoothing != 0 ? 4 : 3},
                          head.x.options().dtype(accumulation_type(head.x)));
}

Tensor empty_if(bool wanted, const Tensor& like, at::ScalarType dtype) {
  return wanted ? empty_contiguous(like, dtype) : no_output(like);
}

CrossEntropyUpstream upstream(const LossHead& head, const Tensor& statistics,
                              const Tensor& loss_grad, const Tensor& count) {
  return {.targets = head.targets,
          .statistics = statistics,
          .loss_grad = loss_grad,
          .log_sum_exp_grad = {},
          .count = is_mean(head.options) ? OptionalTensor(count) : std::nullopt,
          .vocab_start = 0,
          .vocabulary = head.weight.size(0),
          .options = head.options};
}

// --- inner ops ----------------------------------------------------------------------------------

CrossEntropyOptions formula(std::string_view reduction, int64_t ignore_index,
                            double label_smoothing, double z_loss,
                            std::optional<double> logit_softcap) {
  return {std::string(reduction), ignore_index, label_smoothing, z_loss, logit_softcap};
}

// Chunks of the tokens: a row's statistics need the whole vocabulary.
Loss forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const Tensor& targets, std::string_view reduction, int64_t ignore_index,
             double label_smoothing, double z_loss, std::optional<double> logit_softcap) {
  const LossHead head = {x, weight, bias, targets,
                         formula(reduction, ignore_index, label_smoothing, z_loss, logit_softcap)};
  const Tensor statistics = empty_statistics(head);
  if (!x.is_meta()) {
    const Rows rows(head);
    const int64_t chunk = chunk_of(rows.tokens, rows.vocabulary, x, quarter_of(x));
    const Tensor buffer = rows.buffer(chunk, rows.vocabulary);
    for_chunks(rows.tokens, chunk, [&](Range tokens) {
      const Tensor logits = rows.logits(buffer, tokens, {0, rows.vocabulary});
      part(statistics, tokens)
          .copy_(call_statistics(logits, part(rows.targets, tokens), head.options, false));
    });
  }
  const auto [loss, log_sum_exp, count] =
      call_loss(statistics, targets, weight.sym_size(0), head.options);
  return {loss, statistics, count};
}

// Slices of the vocabulary: each is a whole of the weight's and the bias's gradient, and a part of
// the sum that is x's.
Gradients backward(const Tensor& loss_grad, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& bias, const Tensor& targets, std::string_view reduction,
                   int64_t ignore_index, double label_smoothing, double z_loss,
                   std::optional<double> logit_softcap, const Tensor& statistics,
                   const Tensor& count, WantedGradients wanted, const OptionalTensor& main_grad,
                   bool accumulate) {
  const LossHead head = {x, weight, bias, targets,
                         formula(reduction, ignore_index, label_smoothing, z_loss, logit_softcap)};
  const auto dtype = x.scalar_type();
  const Tensor x_grad = empty_if(wanted[0], x, dtype);
  const Tensor weight_grad = empty_if(wanted[1] && !main_grad, weight, dtype);
  const Tensor bias_grad = empty_if(wanted[2], bias.value_or(x), dtype);
  if (wanted[1] && main_grad && !main_grad->is_inference()) {
    torch::autograd::impl::bump_version(*main_grad);
  }
  if (x.is_meta()) return {x_grad, weight_grad, bias_grad};
  const Rows rows(head);
  const int64_t slice = chunk_of(rows.vocabulary, rows.tokens, x, quarter_of(x));
  // One slice is no sum, and is rounded by its product.
  const bool is_sum = slice < rows.vocabulary && dtype != accumulation_type(x);
  const Tensor x_rows = wanted[0] ? x_grad.view(rows.x.sizes()) : x_grad;
  const Tensor x_sum = is_sum ? empty_if(wanted[0], rows.x, at::kFloat) : x_rows;
  CrossEntropyUpstream gradient = upstream(head, statistics, loss_grad, count);
  gradient.targets = rows.targets;
  const Tensor buffer = rows.buffer(rows.tokens, slice);
  for_chunks(rows.vocabulary, slice, [&](Range classes) {
    const Tensor logits = rows.logits(buffer, {0, rows.tokens}, classes);
    gradient.vocab_start = classes.begin;
    call_gradient(logits, gradient, true);
    if (wanted[0]) {
      gemm_out(
          {.a = logits, .b = part(weight, classes), .out = x_sum, .accumulate = classes.begin > 0});
    }
    if (wanted[2]) {
      Tensor out = part(bias_grad, classes);
      at::sum_out(out, logits, at::IntArrayRef{0});
    }
    if (wanted[1]) {  // last: the first slice has then taken what the others may want of memory
      gemm_out({.a = logits.t(),
                .b = rows.x,
                .out = part(main_grad.value_or(weight_grad), classes),
                .accumulate = main_grad && accumulate});
    }
  });
  if (is_sum) x_rows.copy_(x_sum);
  return {x_grad, weight_grad, bias_grad};
}

// {loss, x_grad, weight_grad, bias_grad}, the last two in the dtype of sums, or the weight's in
// another.
std::tuple<Tensor, Tensor, Tensor, Tensor> promise(
    const Tensor& loss_scale, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& targets, std::string_view reduction, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> logit_softcap, WantedGradients wanted,
    std::optional<at::ScalarType> weight_grad_dtype) {
  const LossHead head = {x, weight, bias, targets,
                         formula(reduction, ignore_index, label_smoothing, z_loss, logit_softcap)};
  const auto wide = accumulation_type(x);
  const Tensor statistics = empty_statistics(head);
  const Tensor x_grad = empty_if(wanted[0], x, x.scalar_type());
  const Tensor weight_grad = empty_if(wanted[1], weight, weight_grad_dtype.value_or(wide));
  const Tensor bias_grad = empty_if(wanted[2], bias.value_or(x), wide);
  if (!x.is_meta()) {
    const Rows rows(head);
    const Tensor x_rows = wanted[0] ? x_grad.view(rows.x.sizes()) : Tensor();
    if (rows.tokens == 0) {
      weight_grad.zero_();
      bias_grad.zero_();
    }
    const Tensor count = mean_divisor(rows.targets, ignore_index, wide);
    const int64_t chunk = chunk_of(rows.tokens, rows.vocabulary, x, promised_share(x));
    const Tensor buffer = rows.buffer(chunk, rows.vocabulary);
    for_chunks(rows.tokens, chunk, [&](Range tokens) {
      const Tensor logits = rows.logits(buffer, tokens, {0, rows.vocabulary});
      const Tensor chunk_targets = part(rows.targets, tokens);
      const Tensor found = call_statistics(logits, chunk_targets, head.options, false);
      part(statistics, tokens).copy_(found);
      const Tensor scale =
          loss_scale.dim() == 0 ? loss_scale : part(loss_scale.reshape({-1}), tokens);
      CrossEntropyUpstream gradient = upstream(head, found, scale, count);
      gradient.targets = chunk_targets;
      call_gradient(logits, gradient, true);
      const bool later = tokens.begin > 0;
      if (wanted[0]) gemm_out({.a = logits, .b = weight, .out = part(x_rows, tokens)});
      if (wanted[1]) {
        gemm_out(
            {.a = logits.t(), .b = part(rows.x, tokens), .out = weight_grad, .accumulate = later});
      }
      if (wanted[2]) {
        const Tensor sum = logits.sum(at::IntArrayRef{0}, false, wide);
        later ? bias_grad.add_(sum) : bias_grad.copy_(sum);
      }
    });
  }
  const Tensor loss = std::get<0>(call_loss(statistics, targets, weight.sym_size(0), head.options));
  return {loss, x_grad, weight_grad, bias_grad};
}

Tensor fulfil(const Tensor& kept, const Tensor& loss_grad, const Tensor& loss_scale,
              at::ScalarType dtype, const OptionalTensor& main_grad, bool accumulate) {
  Tensor out = empty_if(!main_grad, kept, dtype);
  if (main_grad && !main_grad->is_inference()) torch::autograd::impl::bump_version(*main_grad);
  if (kept.is_meta()) return out;
  const Tensor ratio = kept_ratio(op_name, loss_grad, loss_scale);
  if (!main_grad) {
    at::mul_out(out, kept, ratio);
    return out;
  }
  Tensor buffer = *main_grad;
  accumulate ? buffer.addcmul_(kept, ratio) : at::mul_out(buffer, kept, ratio);
  return out;
}

void fulfil_over_kept(Tensor& kept, const Tensor& loss_grad, const Tensor& loss_scale) {
  fulfil_inplace(op_name, kept, loss_grad, loss_scale);
}

void implement(torch::Library& m) {
  m.impl("fused_linear_cross_entropy_forward", forward);
  m.impl("fused_linear_cross_entropy_backward", backward);
  m.impl("fused_linear_cross_entropy_promise", promise);
  m.impl("fused_linear_cross_entropy_fulfil", fulfil);
  m.impl("fused_linear_cross_entropy_fulfil_inplace", fulfil_over_kept);
}

}  // namespace

// --- through the dispatcher ---------------------------------------------------------------------

HeadLoss head_loss(const LossHead& head) {
  static const auto op = find_op<decltype(forward)>("redline::fused_linear_cross_entropy_forward");
  const auto& o = head.options;
  const auto [loss, statistics, count] =
      op.call(head.x, head.weight, head.bias, head.targets, o.reduction, o.ignore_index,
              o.label_smoothing, o.z_loss, o.logit_softcap);
  return {loss, statistics, count};
}

HeadGradients head_gradients(const LossHead& head, const HeadLoss& forward, const Tensor& loss_grad,
                             WantedGradients wanted, const MainGrad& main_grad) {
  static const auto op =
      find_op<decltype(backward)>("redline::fused_linear_cross_entropy_backward");
  const auto& o = head.options;
  const auto [x, weight, bias] =
      op.call(loss_grad, head.x, head.weight, head.bias, head.targets, o.reduction, o.ignore_index,
              o.label_smoothing, o.z_loss, o.logit_softcap, forward.statistics, forward.count,
              wanted, main_grad.buffer, main_grad.accumulate);
  return {x, weight, bias};
}

std::pair<Tensor, HeadGradients> promised_gradients(const LossHead& head, WantedGradients wanted,
                                                    bool with_main_grad) {
  static const auto op = find_op<decltype(promise)>("redline::fused_linear_cross_entropy_promise");
  const auto& o = head.options;
  const auto [loss, x, weight, bias] = op.call(
      *o.loss_scale, head.x, head.weight, head.bias, head.targets, o.reduction, o.ignore_index,
      o.label_smoothing, o.z_loss, o.logit_softcap, wanted, kept_dtype(head, with_main_grad));
  return {loss, {x, weight, bias}};
}

Tensor fulfilled_gradient(Tensor kept, const Tensor& loss_grad, const Tensor& loss_scale,
                          at::ScalarType dtype, const MainGrad& main_grad) {
  if (!main_grad.buffer && kept.scalar_type() == dtype && is_given_away(kept)) {
    static const auto inplace =
        find_op<decltype(fulfil_over_kept)>("redline::fused_linear_cross_entropy_fulfil_inplace");
    inplace.call(kept, loss_grad, loss_scale);
    return kept.detach();
  }
  static const auto op = find_op<decltype(fulfil)>("redline::fused_linear_cross_entropy_fulfil");
  return op.call(kept, loss_grad, loss_scale, dtype, main_grad.buffer, main_grad.accumulate);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  const std::string head =
      "Tensor x, Tensor weight, Tensor? bias, Tensor targets, str reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float? logit_softcap";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("fused_linear_cross_entropy_forward(" + head +
         ") -> (Tensor loss, Tensor statistics, Tensor count)");
  define("fused_linear_cross_entropy_backward(Tensor loss_grad, " + head +
         ", Tensor statistics, Tensor count, bool[3] wanted, Tensor(a!)? main_grad=None, "
         "bool accumulate=True) -> (Tensor x_grad, Tensor weight_grad, Tensor bias_grad)");
  define("fused_linear_cross_entropy_promise(Tensor loss_scale, " + head +
         ", bool[3] wanted, *, ScalarType? weight_grad_dtype=None) "
         "-> (Tensor loss, Tensor x_grad, Tensor weight_grad, Tensor bias_grad)");
  m.def(
      "fused_linear_cross_entropy_fulfil(Tensor kept, Tensor loss_grad, Tensor loss_scale, "
      "ScalarType dtype, Tensor(a!)? main_grad=None, bool accumulate=True) -> Tensor");
  m.def(
      "fused_linear_cross_entropy_fulfil_inplace(Tensor(a!) kept, Tensor loss_grad, "
      "Tensor loss_scale) -> ()");
}

const Registration registration({
    .inner_ops = {"fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward",
                  "fused_linear_cross_entropy_promise", "fused_linear_cross_entropy_fulfil",
                  "fused_linear_cross_entropy_fulfil_inplace"},
    .inner = implement,
});

}  // namespace redline::ops
