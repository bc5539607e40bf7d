"""Refusals of what is not built: the name, what was expected, what came and what works."""

from redline.extensions.transformer_engine.table import ENTRIES, Entry


class NotBuilt(NotImplementedError, ValueError):
    """A value that Transformer Engine takes and Redline does not build."""


# For each name of a configuration that is not built: the values that are, and what to do instead.
# A missing attribute counts as the first value.
ONE_RANK = "more ranks are not built; one rank works"
PRECISION = "quantised products are not built; bfloat16 works: leave it unset"
OVERLAP = "overlap of communication and products is not built; leave it off"
LAYERS = {
    "tensor_model_parallel_size": ((1,), ONE_RANK),
    "context_parallel_size": ((1,), ONE_RANK),
    "expert_model_parallel_size": ((1,), ONE_RANK),
    "expert_tensor_parallel_size": ((1, None), ONE_RANK),
    "tp_comm_overlap": ((False,), OVERLAP),
    "symmetric_ar_type": ((None,), ONE_RANK),
    "fp8": ((None, False), PRECISION),
    "fp4": ((None, False), PRECISION),
    "quant_recipe": ((None,), PRECISION),
    "use_kitchen": ((False,), PRECISION),
}


def refuse(layer, name, value, built, instead=None):
    """Raises where `value` is none of `built`: NotBuilt with what to do instead, or ValueError."""
    if any(value is choice or value == choice for choice in built):
        return
    expected = " or ".join(str(choice) for choice in built)
    sentence = f"{layer}: {name}: expected {expected}, not {value}"
    if instead is None:
        raise ValueError(sentence)
    raise NotBuilt(f"{sentence}; {instead}")


def check(layer, config, **options):
    """Refuses what `config` asks for and is not built; options: name=(value, the one built)."""
    for name, (values, instead) in LAYERS.items():
        refuse(layer, name, getattr(config, name, values[0]), values, instead)
    for name, (value, expected) in options.items():
        refuse(layer, name, value, (expected,))


def not_built(name, why, instead):
    """A callable that only refuses, for a name whose every use needs what is not built."""

    def refusing(*args, **kwargs):
        raise NotBuilt(refusing.__doc__)

    refusing.__name__ = refusing.__qualname__ = name
    refusing.__doc__ = f"{name}: {why}; {instead}"
    ENTRIES[name] = Entry("refused", why, f"everything: {instead}")
    return refusing
