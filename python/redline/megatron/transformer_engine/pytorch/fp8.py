# Over budget: parameters: the signatures are Transformer Engine's, which Megatron inspects.
"""Contexts of quantised compute: disabled they do nothing, enabled they refuse."""

from contextlib import nullcontext


def refuse_quantised(name):
    raise NotImplementedError(
        f"transformer_engine.pytorch.{name}: enabled: expected False: Redline has no FP8 or FP4 "
        "compute; leave config.fp8, fp4 and quant_recipe unset and train in bf16"
    )


def autocast(enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, **_):
    if enabled or calibrating:
        refuse_quantised("autocast")
    return nullcontext()


def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    if enabled or calibrating:
        refuse_quantised("fp8_autocast")
    return nullcontext()


def quantized_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    if enabled:
        refuse_quantised("quantized_model_init")
    return nullcontext()


def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    if enabled:
        refuse_quantised("fp8_model_init")
    return nullcontext()


class FP8GlobalStateManager:
    """What Megatron asks about the quantised state: there is none."""

    @staticmethod
    def is_fp8_enabled():
        return False

    @staticmethod
    def get_fp8_recipe():
        return None

    @staticmethod
    def get_fp8_group():
        return None
