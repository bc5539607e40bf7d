#include "redline/ops/gemm_uneven.h"

#include "redline/ops/view.h"

namespace redline::ops {
namespace {

using at::Tensor;

// Below, a launch costs what the product gains: 134 million multiplications take 2.7 us element by
// element (H200, bfloat16).
constexpr int64_t least_work = int64_t{1} << 27;

bool is_row_major(const Tensor& tensor) { return matrix_layout(view(tensor))->row_major; }

bool has_aligned_lines(const Tensor& tensor) {
  const int64_t vector = 16 / tensor.element_size();
  return matrix_layout(view(tensor))->ld % vector == 0 &&
         (tensor.dim() == 2 || tensor.stride(0) % vector == 0) &&
         reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

Tensor part(const Tensor& tensor, int64_t axis, int64_t begin, int64_t end) {
  return tensor.defined() ? tensor.narrow(axis, begin, end - begin) : tensor;
}

}  // namespace

std::optional<UnevenSplit> split_uneven(const GemmOperands& o) {
  const int64_t m = o.out.size(-2), n = o.out.size(-1), k = o.a.size(-1);
  const int64_t vector = 16 / o.a.element_size();
  const auto is_uneven = [vector](int64_t size) { return size > vector && size % vector != 0; };
  if (!is_uneven(m) && !is_uneven(n) && !is_uneven(k)) return std::nullopt;
  if (o.epilogue != GemmEpilogue::none || o.bias_grad.defined() || m * n * k < least_work ||
      !has_aligned_lines(o.a) || !has_aligned_lines(o.b) || !has_aligned_lines(o.out)) {
    return std::nullopt;
  }
  // An axis matters where a matrix's neighbours in memory lie along it.
  UnevenSplit split = {.first = o, .second = o};
  auto& [first, second, sum] = split;
  if (is_uneven(n) && (is_row_major(o.b) || is_row_major(o.out))) {
    const int64_t even = n / vector * vector;
    first.b = part(o.b, -1, 0, even), second.b = part(o.b, -1, even, n);
    first.out = part(o.out, -1, 0, even), second.out = part(o.out, -1, even, n);
    first.bias = part(o.bias, 0, 0, even), second.bias = part(o.bias, 0, even, n);
  } else if (is_uneven(m) && !(is_row_major(o.a) && is_row_major(o.out))) {
    const int64_t even = m / vector * vector;
    first.a = part(o.a, -2, 0, even), second.a = part(o.a, -2, even, m);
    first.out = part(o.out, -2, 0, even), second.out = part(o.out, -2, even, m);
  } else if (is_uneven(k) && !o.bias.defined() && (is_row_major(o.a) || !is_row_major(o.b))) {
    const int64_t even = k / vector * vector;
    first.a = part(o.a, -1, 0, even), second.a = part(o.a, -1, even, k);
    first.b = part(o.b, -2, 0, even), second.b = part(o.b, -2, even, k);
    if (o.out.element_size() == 2) {
      sum = at::empty(o.out.sizes(), o.out.options().dtype(at::kFloat));
      first.out = second.out = sum;
      first.accumulate = false;
    }
    second.accumulate = true;
  } else {
    return std::nullopt;
  }
  return split;
}

}  // namespace redline::ops
