// The old address: a notice of the move and a forward, nothing else. A message, not a warning: a
// build with -Werror passes. It is told once per translation unit; before the first include,
// #define REDLINE_OLD_ADDRESS_QUIET (or -DREDLINE_OLD_ADDRESS_QUIET) silences it.
// Over budget: columns: the text of a directive is one line.
#pragma once

#ifndef REDLINE_OLD_ADDRESS_QUIET
#pragma message( \
    "redline/transformer/custom_layers/transformer_engine.h has moved to redline/extensions/transformer_engine.h: include that. The old address will be removed in Redline 2.0; `redline move` rewrites the includes")  // NOLINT
#endif
#include "redline/extensions/transformer_engine.h"

namespace redline::transformer::custom_layers {
namespace transformer_engine = extensions::transformer_engine;
}
