// What the library says of itself: `redline doctor` and the Python package ask.
#include "redline/kernels/cpu/isa.h"
#include "redline/ops/torch.h"

namespace redline::ops {
namespace {

std::string version() { return REDLINE_VERSION; }
std::string instruction_set() { return cpu::name(cpu::isa()); }
bool has_cuda() { return REDLINE_WITH_CUDA; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def("version() -> str", version);
  m.def("instruction_set() -> str", instruction_set);
  m.def("has_cuda() -> bool", has_cuda);
}

}  // namespace redline::ops
