// The old address: a notice of the move and a forward, nothing else.
// Over budget: columns: the text of a directive is one line.
#pragma once

#warning \
    "redline/transformer/custom_layers/transformer_engine.h has moved to redline/extensions/transformer_engine.h: include that"  // NOLINT
#include "redline/extensions/transformer_engine.h"
