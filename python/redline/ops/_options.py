"""What an op is told. A keyword costs a call 0.3 us to parse: those that say nothing stay away."""


def stated(**options):
    """The options that are neither None nor False, which are the schemas' defaults for them."""
    return {name: value for name, value in options.items() if not (value is None or value is False)}


def norm_kind(norm, epsilon):
    """Which norm; none where it is the schemas' own."""
    options = {} if norm == "rms_norm" else {"norm": norm}
    if epsilon != 1e-5:
        options["epsilon"] = epsilon
    return options


def weight_gradient(main_grad, accumulate, dummy_grad, delayed, prefix=""):
    """The options of a weight's gradient; none where it goes to autograd."""
    if main_grad is None and delayed is None and dummy_grad == "none":
        return {}
    return {
        f"{prefix}main_grad": main_grad,
        f"{prefix}accumulate": accumulate,
        f"{prefix}dummy_grad": dummy_grad,
        f"{prefix}delayed": None if delayed is None else delayed.queue,
    }
