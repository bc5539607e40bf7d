#include "redline/ops/rotary_run.h"

#include "redline/kernels/rotary.h"
#include "redline/ops/run.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_options(const RotaryInputs& in) {
  TORCH_CHECK(in.layout == "bshd" || in.layout == "sbhd" || in.layout == "thd", in.op(),
              ": layout: expected bshd, sbhd or thd, not ", in.layout);
  if (in.packed_sequences()) {
    TORCH_CHECK(in.positions || in.cu_seqlens, in.op(),
                ": cu_seqlens: expected cu_seqlens or positions with layout thd, not neither");
  } else {
    TORCH_CHECK(!in.cu_seqlens, in.op(), ": cu_seqlens: expected none with layout ", in.layout,
                ", only thd has boundaries");
  }
}

void check_rank(const Tensor& x, const char* tensor, const RotaryInputs& in, int64_t packed_axes) {
  const int64_t rank = (in.packed_sequences() ? 3 : 4) - packed_axes;
  TORCH_CHECK(x.dim() == rank, in.op(), ": ", tensor, ": expected a rank of ", rank,
              " with layout ", in.layout, ", not ", x.dim());
}

void check_inputs(const Tensor& x, const RotaryInputs& in) {
  check_options(in);
  check_rank(x, in.tensor(), in, in.packing ? 1 : 0);
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), in.op(), ": ", in.tensor(),
              ": expected a floating dtype, not ", x.scalar_type());
  check_devices(in.op(), x,
                {{"cos", in.cos},
                 {"sin", in.sin},
                 {"positions", in.positions},
                 {"cu_seqlens", in.cu_seqlens}});
}

// [outer, inner, heads, head_dim] of x or y: packed heads taken apart, thd under an outer of 1.
TensorView view_tokens(const Tensor& tensor, const RotaryInputs& in, bool packed) {
  TensorView result = view(tensor);
  if (packed) {
    const int64_t heads = in.packing.kv_heads * in.packing.group_heads();
    const int last = result.rank++ - 1;
    TORCH_CHECK(result.sizes[last] % heads == 0, in.op(), ": qkv: expected a last axis of ", heads,
                " heads, not ", result.sizes[last]);
    result.sizes[last + 1] = result.sizes[last] / heads;
    result.strides[last + 1] = result.strides[last];
    result.sizes[last] = heads;
    result.strides[last] *= result.sizes[last + 1];
  }
  if (in.packed_sequences()) {
    for (int i = result.rank++; i > 0; --i) {
      result.sizes[i] = result.sizes[i - 1];
      result.strides[i] = result.strides[i - 1];
    }
    result.sizes[0] = 1;
  }
  return result;
}

// [outer, inner] of positions [seq], [batch, seq], [1, seq] or [tokens], by strides alone.
TensorView view_positions(const RotaryInputs& in, const TensorView& x) {
  if (!in.positions) return {};
  TensorView result = view(*in.positions);
  const int sequence_axis = in.layout == "sbhd" ? 0 : 1, batch_axis = 1 - sequence_axis;
  const int64_t length = x.sizes[sequence_axis], batch = x.sizes[batch_axis];
  const int last = result.rank - 1;
  const bool one_row = result.rank == 1 || (result.rank == 2 && result.sizes[0] == 1);
  const bool fits = (one_row || (result.rank == 2 && result.sizes[0] == batch)) &&
                    result.sizes[last] == length && !(in.packed_sequences() && result.rank != 1);
  TORCH_CHECK(fits, in.op(), ": positions: expected [", length, "]",
              in.packed_sequences()
                  ? std::string()
                  : " or [" + std::to_string(batch) + ", " + std::to_string(length) + "]",
              ", not ", in.positions->sizes());
  const int64_t batch_stride = one_row ? 0 : result.strides[0], stride = result.strides[last];
  result.rank = 2;
  result.sizes[sequence_axis] = length;
  result.strides[sequence_axis] = stride;
  result.sizes[batch_axis] = batch;
  result.strides[batch_axis] = batch_stride;
  return result;
}

Tensor adjacent(const char* op, const char* name, const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : contiguous(op, name, x);
}

// From and to what is in `args`; the rest of them is `in`'s.
void run_rotary(const Tensor& like, Rotary args, const RotaryInputs& in) {
  const Tensor cos = contiguous(in.op(), "cos", in.cos), sin = contiguous(in.op(), "sin", in.sin);
  const OptionalTensor cu_seqlens = contiguous(in.op(), "cu_seqlens", in.cu_seqlens);
  args.cos = view(cos);
  args.sin = view(sin);
  args.positions = view_positions(in, args.x);
  args.cu_seqlens = view(cu_seqlens);
  args.sequence_axis = in.layout == "sbhd" ? 0 : 1;
  args.group_heads = in.packing.group_heads();
  args.rotated_heads = in.packing ? in.packing.group_heads() - 1 : 1;
  args.interleaved = in.interleaved;
  if (run_on_cuda(like, args)) return;
  check_positions(args);
  const int64_t* sizes = args.x.sizes;
  parallel_ranges(sizes[0] * sizes[1], rows_per_task(all_heads(args) * sizes[3]), "tokens",
                  [&](Range range) { run(args, range); });
}

}  // namespace

Tensor rotate(const Tensor& x, const RotaryInputs& in, bool backward) {
  check_inputs(x, in);
  Tensor y = empty_contiguous(x);
  if (x.is_meta()) return y;
  const bool packed(in.packing);
  const Tensor source = adjacent(in.op(), backward ? "y_grad" : in.tensor(), x);
  const Rotary args{
      .x = view_tokens(source, in, packed), .y = view_tokens(y, in, packed), .backward = backward};
  run_rotary(x, args, in);
  return y;
}

QueryAndKey rotate_pair(const Tensor& q, const Tensor& k, const RotaryInputs& in, bool backward) {
  const char* q_name = backward ? "q_turned_grad" : "q";
  const char* k_name = backward ? "k_turned_grad" : "k";
  check_inputs(q, in);
  check_rank(k, k_name, in, /*packed_axes=*/0);
  TORCH_CHECK(k.scalar_type() == q.scalar_type(), in.op(), ": ", k_name, ": expected ",
              q.scalar_type(), ", as q is, not ", k.scalar_type());
  check_devices(in.op(), q, {{k_name, k}});
  Tensor q_turned = empty_contiguous(q), k_turned = empty_contiguous(k);
  if (q.is_meta()) return {q_turned, k_turned};
  const Tensor q_source = adjacent(in.op(), q_name, q), k_source = adjacent(in.op(), k_name, k);
  const Rotary args{.x = view_tokens(q_source, in, /*packed=*/false),
                    .y = view_tokens(q_turned, in, /*packed=*/false),
                    .second_x = view_tokens(k_source, in, /*packed=*/false),
                    .second_y = view_tokens(k_turned, in, /*packed=*/false),
                    .backward = backward};
  run_rotary(q, args, in);
  return {q_turned, k_turned};
}

QueryKeyValue rotate_apart(const Tensor& qkv, const RotaryInputs& in) {
  check_inputs(qkv, in);
  c10::SymDimVector sizes(qkv.sym_sizes());
  const int64_t all_heads = in.packing.kv_heads * in.packing.group_heads();
  const c10::SymInt head_dim = sizes.back() / all_heads;
  sizes.push_back(head_dim);
  const auto make = [&](int64_t heads) {
    sizes[sizes.size() - 2] = heads;
    return empty_of(sizes, qkv.options());
  };
  const Tensor q = make(in.packing.heads), k = make(in.packing.kv_heads),
               v = make(in.packing.kv_heads);
  if (qkv.is_meta()) return {q, k, v};
  const Tensor source = adjacent(in.op(), in.tensor(), qkv);
  const Rotary args{.x = view_tokens(source, in, /*packed=*/true),
                    .y = view_tokens(q, in, /*packed=*/false),
                    .k = view_tokens(k, in, /*packed=*/false),
                    .v = view_tokens(v, in, /*packed=*/false)};
  run_rotary(qkv, args, in);
  return {q, k, v};
}

Tensor rotate_together(const QueryKeyValue& grads, const RotaryInputs& in) {
  const auto& [q_grad, k_grad, v_grad] = grads;
  check_options(in);
  for (const auto& [name, grad] :
       {std::pair{"q_grad", &q_grad}, std::pair{"k_grad", &k_grad}, std::pair{"v_grad", &v_grad}}) {
    check_rank(*grad, name, in, /*packed_axes=*/0);
  }
  check_devices(in.op(), q_grad, {{"k_grad", k_grad}, {"v_grad", v_grad}, {"cos", in.cos}});
  c10::SymDimVector sizes(q_grad.sym_sizes());
  const c10::SymInt head_dim = sizes.back();
  sizes.pop_back();
  sizes.back() = head_dim * (in.packing.kv_heads * in.packing.group_heads());
  Tensor qkv_grad = empty_of(sizes, q_grad.options());
  if (q_grad.is_meta()) return qkv_grad;
  const Tensor q = adjacent(in.op(), "q_grad", q_grad), k = adjacent(in.op(), "k_grad", k_grad),
               v = adjacent(in.op(), "v_grad", v_grad);
  const Rotary args{.x = view_tokens(q, in, /*packed=*/false),
                    .y = view_tokens(qkv_grad, in, /*packed=*/true),
                    .k = view_tokens(k, in, /*packed=*/false),
                    .v = view_tokens(v, in, /*packed=*/false),
                    .backward = true};
  run_rotary(q_grad, args, in);
  return qkv_grad;
}

}  // namespace redline::ops
