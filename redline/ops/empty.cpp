#include "redline/ops/empty.h"

#include <ATen/TensorSubclassLikeUtils.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace redline::ops {
namespace {

#if defined(__linux__)

// From here on glibc gives an allocation pages of its own and takes them back when it is freed
// (DEFAULT_MMAP_THRESHOLD_MAX of malloc): every output pays for their zeroing, one fault a page.
constexpr size_t mapped_bytes = size_t{32} << 20;
constexpr uintptr_t large_page = uintptr_t{2} << 20;

// Whole large pages alone, so that the neighbours' are left as they are. A kernel without them, or
// told "never", says so, and nothing is lost.
void ask_for_large_pages(const at::Tensor& fresh) {
  if (at::isTensorSubclassLike(fresh) || fresh.nbytes() < mapped_bytes) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t first = (begin + large_page - 1) / large_page * large_page;
  const uintptr_t end = (begin + fresh.nbytes()) / large_page * large_page;
  if (first < end) {
    (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
}

#else

void ask_for_large_pages(const at::Tensor&) {}

#endif

}  // namespace

at::Tensor empty_of(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor fresh = at::empty_symint(sizes, options);
  if (options.device().is_cpu()) ask_for_large_pages(fresh);
  return fresh;
}

}  // namespace redline::ops
