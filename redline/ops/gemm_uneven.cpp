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

std::optional<std::pair<GemmOperands, GemmOperands>> split_uneven(const GemmOperands& o) {
  const int64_t m = o.out.size(-2), n = o.out.size(-1), k = o.a.size(-1);
  const int64_t vector = 16 / o.a.element_size();
  const auto is_uneven = [vector](int64_t size) { return size > vector && size % vector != 0; };
  if (!is_uneven(m) && !is_uneven(n) && !is_uneven(k)) return std::nullopt;
  if (o.epilogue != GemmEpilogue::none || o.bias_grad.defined() || m * n * k < least_work ||
      !has_aligned_lines(o.a) || !has_aligned_lines(o.b) || !has_aligned_lines(o.out)) {
    return std::nullopt;
  }
  // An axis matters where a matrix's neighbours in memory lie along it.
  GemmOperands first = o, second = o;
  if (is_uneven(n) && (is_row_major(o.b) || is_row_major(o.out))) {
    const int64_t even = n / vector * vector;
    first.b = part(o.b, -1, 0, even), second.b = part(o.b, -1, even, n);
    first.out = part(o.out, -1, 0, even), second.out = part(o.out, -1, even, n);
    first.bias = part(o.bias, 0, 0, even), second.bias = part(o.bias, 0, even, n);
  } else if (is_uneven(m) && !(is_row_major(o.a) && is_row_major(o.out))) {
    const int64_t even = m / vector * vector;
    first.a = part(o.a, -2, 0, even), second.a = part(o.a, -2, even, m);
    first.out = part(o.out, -2, 0, even), second.out = part(o.out, -2, even, m);
  } else if (is_uneven(k) && (is_row_major(o.a) || !is_row_major(o.b)) &&
             !(o.accumulate && o.out.element_size() == 2)) {  // which would be rounded once more
    // The small part first: what is rounded on the way is the smaller sum.
    const int64_t even = k / vector * vector;
    first.a = part(o.a, -1, even, k), second.a = part(o.a, -1, 0, even);
    first.b = part(o.b, -2, even, k), second.b = part(o.b, -2, 0, even);
    second.bias = Tensor();
    second.accumulate = true;
  } else {
    return std::nullopt;
  }
  return std::pair(first, second);
}

}  // namespace redline::ops
