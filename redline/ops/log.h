// REDLINE_LOG=kernels: the first launch of each choice, in one line on stderr.
#pragma once

#include "redline/core/watch.h"
#include "redline/ops/torch.h"

namespace redline::ops {

// Null unless the environment asked for it when the library was loaded.
Watcher* log();

// "op: tensor: why; instead"
std::string sentence(const Fallback& fallback, std::string_view why);

// A kernel's name as a reader wants it: of a mangled one, without namespaces and parameters.
std::string readable_kernel(const std::string& mangled);

}  // namespace redline::ops
