// The old address: a notice of the move and a forward, nothing else. A message, not a warning: a
// build with -Werror passes. REDLINE_OLD_ADDRESS_QUIET silences it.
// Over budget: columns: the text of a directive is one line.
#pragma once

#ifndef REDLINE_OLD_ADDRESS_QUIET
#pragma message( \
    "redline/transformer/custom_layers/transformer_engine.h has moved to redline/extensions/transformer_engine.h: include that")  // NOLINT
#endif
#include "redline/extensions/transformer_engine.h"
