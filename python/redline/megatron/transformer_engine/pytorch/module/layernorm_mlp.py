"""The name of Transformer Engine's LayerNormMLP: others ask `isinstance` of it, PEFT for one."""

from torch import nn


class LayerNormMLP(nn.Module):
    """Not built: Megatron-Core makes its MLP of two linears and has no use for it."""

    def __init__(self, *_, **__):
        raise NotImplementedError(
            "LayerNormMLP: not in the stand-in for Transformer Engine; "
            "redline.layers.LayerNormMLP has its parameters"
        )
