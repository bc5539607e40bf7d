# Over budget: parameters: the signature is Transformer Engine's.
"""Activations kept in the CPU's memory between forward and backward."""

from contextlib import nullcontext

import torch

from redline.extensions.transformer_engine.refusals import refuse
from redline.extensions.transformer_engine.table import composed


class _Offload(torch.autograd.graph.saved_tensors_hooks):
    """Saved activations of the first num_layers of every model_layers layers go to the CPU."""

    inside_context = False  # Megatron's output layer asks

    def __init__(self, num_layers, model_layers):
        self.num_layers, self.model_layers, self.layer = num_layers, model_layers, 0
        super().__init__(self.pack, self.unpack)

    def __enter__(self):
        self.inside_context = True
        super().__enter__()

    def __exit__(self, *error):
        self.inside_context = False
        super().__exit__(*error)

    def pack(self, tensor):
        owner = tensor if tensor._base is None else tensor._base
        if isinstance(owner, torch.nn.Parameter) or self.layer >= self.num_layers:
            return tensor
        kept = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda, layout=tensor.layout
        )
        return tensor.device, kept.copy_(tensor)

    def unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        device, kept = packed
        return kept.to(device)

    def next_layer(self, x):
        self.layer = (self.layer + 1) % self.model_layers
        return x


@composed(
    "torch's saved tensor hooks; copies in order with the computation", "offloading of weights"
)
def get_cpu_offload_context(
    enabled,
    num_layers,
    model_layers,
    activation_offloading=True,
    weight_offloading=False,
    double_buffering=False,
    retain_pinned_cpu_buffers=False,
):
    """(context, sync): run each layer inside the context, then x = sync(x).

    The activations of the first num_layers layers wait for backward in the CPU's memory. Copies are
    in order with the computation: double_buffering and retain_pinned_cpu_buffers have no effect.
    """
    if not enabled:
        return nullcontext(), lambda x: x
    refuse(
        "get_cpu_offload_context",
        "weight_offloading",
        weight_offloading,
        (False,),
        "offloading of weights is not built; that of activations works",
    )
    if not activation_offloading:
        return nullcontext(), lambda x: x
    offload = _Offload(num_layers, model_layers)
    return offload, offload.next_layer
