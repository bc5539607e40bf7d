#include "redline/kernels/rotary.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/cpu/rotary.h"

namespace redline {
namespace {

const char* name(const Rotary& args) {
  if (args.second_x) return "rotary_pair";
  if (args.k) return "qkv_rotary_split";
  return args.group_heads > 1 ? "qkv_rotary" : "rotary";
}

void check_heads(const char* op, const char* tensor, const TensorView& x) {
  REDLINE_CHECK(x.rank == 4 && is_floating(x.dtype), op, ": ", tensor,
                ": expected [outer, inner, heads, head_dim] of a floating dtype, not ", x);
  REDLINE_CHECK(x.strides[3] == 1 || x.sizes[3] <= 1 || x.numel() == 0, op, ": ", tensor,
                ": expected an adjacent head_dim, not a stride of ", x.strides[3]);
}

void check_result(const char* op, const char* tensor, const TensorView& x, const TensorView& y) {
  REDLINE_CHECK(y.rank == 4 && y.dtype == x.dtype && std::equal(x.sizes, x.sizes + 4, y.sizes), op,
                ": ", tensor, ": expected ", x, ", not ", y);
}

// The second tensor against the first.
void check_pair(const char* op, const Rotary& args) {
  const TensorView &x = args.x, &second = args.second_x;
  REDLINE_CHECK(!args.k && args.group_heads == 1, op, ": q: expected heads apart, not groups of ",
                args.group_heads);
  check_heads(op, "k", second);
  REDLINE_CHECK(second.dtype == x.dtype && second.sizes[0] == x.sizes[0] &&
                    second.sizes[1] == x.sizes[1] && second.sizes[3] == x.sizes[3],
                op, ": k: expected [", x.sizes[0], ", ", x.sizes[1], ", heads, ", x.sizes[3], "] ",
                x.dtype, ", not ", second);
  check_result(op, "k's result", second, args.second_y);
}

// q's, k's and v's heads against those of the whole.
void check_apart(const char* op, const Rotary& args) {
  const TensorView& all = whole(args);
  const int64_t groups = all.sizes[2] / args.group_heads;
  REDLINE_CHECK(args.group_heads > 2 && args.rotated_heads == args.group_heads - 1, op,
                ": heads: expected groups of q heads, k and v, not of ", args.group_heads);
  for (const auto& [tensor, part, heads] :
       {std::tuple{"q", args.backward ? &args.x : &args.y, groups * (args.group_heads - 2)},
        std::tuple{"k", &args.k, groups}, std::tuple{"v", &args.v, groups}}) {
    REDLINE_CHECK(part->rank == 4 && part->dtype == all.dtype && part->sizes[0] == all.sizes[0] &&
                      part->sizes[1] == all.sizes[1] && part->sizes[2] == heads &&
                      part->sizes[3] == all.sizes[3],
                  op, ": ", tensor, args.backward ? "_grad" : "", ": expected [", all.sizes[0],
                  ", ", all.sizes[1], ", ", heads, ", ", all.sizes[3], "] ", all.dtype, ", not ",
                  *part);
    REDLINE_CHECK(part->strides[3] == 1 || part->sizes[3] <= 1 || part->numel() == 0, op, ": ",
                  tensor, ": expected an adjacent head_dim, not a stride of ", part->strides[3]);
  }
}

void check_tables(const char* op, const Rotary& args) {
  for (const auto& [tensor, table] : {std::pair{"cos", &args.cos}, std::pair{"sin", &args.sin}}) {
    REDLINE_CHECK(table->present && table->rank == 2 && table->dtype == DType::float32, op, ": ",
                  tensor, ": expected [positions, rotary_dim / 2] float32, not ", *table);
    REDLINE_CHECK(table->numel() == 0 || (table->strides[1] == 1 || table->sizes[1] == 1), op, ": ",
                  tensor, ": expected contiguous, not a stride of ", table->strides[1]);
  }
  REDLINE_CHECK(args.sin.sizes[0] == args.cos.sizes[0] && args.sin.sizes[1] == args.cos.sizes[1],
                op, ": sin: expected the shape of cos, ", args.cos, ", not ", args.sin);
  REDLINE_CHECK(2 * args.cos.sizes[1] <= args.x.sizes[3], op, ": cos: expected at most ",
                args.x.sizes[3] / 2, " columns for a head_dim of ", args.x.sizes[3], ", not ",
                args.cos.sizes[1]);
}

void check_index(const char* op, const char* tensor, const TensorView& index) {
  REDLINE_CHECK(index.dtype == DType::int64 || index.dtype == DType::int32, op, ": ", tensor,
                ": expected int64 or int32, not ", index.dtype);
}

int64_t read_index(const TensorView& index, int64_t offset) {
  return index.dtype == DType::int64 ? index.as<const int64_t>()[offset]
                                     : index.as<const int32_t>()[offset];
}

// The last boundary at or before `token`; -1 where there is none, or where it is the last of all.
int64_t sequence_start(const TensorView& cu_seqlens, int64_t token) {
  int64_t begin = 0, end = cu_seqlens.sizes[0];  // the first boundary beyond `token` is in here
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (read_index(cu_seqlens, middle) <= token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  if (begin == 0 || begin == cu_seqlens.sizes[0]) return -1;
  return read_index(cu_seqlens, begin - 1);
}

// The token's row of the tables, or no_position.
int64_t position_of(const Rotary& args, int64_t outer, int64_t inner) {
  const char* tensor = "positions";
  int64_t position = args.sequence_axis == 0 ? outer : inner;
  if (args.positions) {
    const int64_t* strides = args.positions.strides;
    position = read_index(args.positions, outer * strides[0] + inner * strides[1]);
  } else if (args.cu_seqlens) {
    const int64_t start = sequence_start(args.cu_seqlens, inner);
    if (start < 0) return cpu::no_position;
    tensor = "cu_seqlens";
    position = inner - start;
  }
  REDLINE_CHECK(position >= 0 && position < args.cos.sizes[0], name(args), ": ", tensor,
                ": expected positions from 0 to ", args.cos.sizes[0] - 1, ", not ", position);
  return position;
}

const cpu::RotaryKernels& kernels() {
  return cpu::choose(cpu::baseline::rotary_kernels, cpu::avx2::rotary_kernels,
                     cpu::avx512::rotary_kernels);
}

// Calls body(outer, inner, position) for each token of the range.
template <typename Body>
void for_tokens(const Rotary& args, Range tokens, Body body) {
  const int64_t columns = args.x.sizes[1];
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    const int64_t outer = token / columns, inner = token % columns;
    body(outer, inner, position_of(args, outer, inner));
  }
}

void check_boundaries(const Rotary& args) {
  const int64_t tokens = args.x.sizes[1];
  int64_t last = 0;
  for (int64_t i = 0; i < args.cu_seqlens.sizes[0]; ++i) {
    const int64_t boundary = read_index(args.cu_seqlens, i);
    REDLINE_CHECK(boundary >= last && boundary <= tokens, name(args),
                  ": cu_seqlens: expected rising boundaries from 0 to ", tokens, ", not ", boundary,
                  " at ", i);
    last = boundary;
  }
}

}  // namespace

void check(const Rotary& args) {
  const char* op = name(args);
  const TensorView& x = args.x;
  check_heads(op, args.second_x ? "q" : "x", x);
  const int64_t heads = whole(args).sizes[2];
  REDLINE_CHECK(args.group_heads >= 1 && heads % args.group_heads == 0, op,
                ": x: expected heads in groups of ", args.group_heads, ", not ", heads);
  if (args.k) {
    check_apart(op, args);
  } else {
    check_result(op, args.second_x ? "q's result" : "y", x, args.y);
  }
  if (args.second_x) check_pair(op, args);
  check_tables(op, args);
  if (args.positions) {
    check_index(op, "positions", args.positions);
    REDLINE_CHECK(args.positions.rank == 2 && args.positions.sizes[0] == x.sizes[0] &&
                      args.positions.sizes[1] == x.sizes[1],
                  op, ": positions: expected [", x.sizes[0], ", ", x.sizes[1], "], not ",
                  args.positions);
  }
  if (args.cu_seqlens) {
    check_index(op, "cu_seqlens", args.cu_seqlens);
    REDLINE_CHECK(args.cu_seqlens.rank == 1 && args.cu_seqlens.sizes[0] >= 1, op,
                  ": cu_seqlens: expected [sequences + 1], not ", args.cu_seqlens);
  }
  const int64_t length = x.sizes[args.sequence_axis];
  REDLINE_CHECK(args.positions || args.cu_seqlens || length <= args.cos.sizes[0] || is_empty(args),
                op, ": cos: expected at least ", length, " positions, not ", args.cos.sizes[0]);
}

void check_positions(const Rotary& args) {
  if (args.cu_seqlens) check_boundaries(args);
  if (!args.positions && !args.cu_seqlens) return;
  for_tokens(args, {0, args.x.sizes[0] * args.x.sizes[1]}, [](int64_t, int64_t, int64_t) {});
}

void run(const Rotary& args, Range tokens) {
  const cpu::RotaryKernels& table = kernels();
  Rotary second = args;
  second.x = args.second_x;
  second.y = args.second_y;
  for_tokens(args, tokens, [&](int64_t outer, int64_t inner, int64_t position) {
    table.rotate(args, outer, inner, position);
    if (args.second_x) table.rotate(second, outer, inner, position);
  });
}

}  // namespace redline
