"""CUDA graphs of a layer or a model: forward and backward, each one launch."""

import functools

import torch


def _refusal(what, expected, found):
    return f"graphed: {what}: expected {expected}, not {found}"


def _check_sample(sample):
    for index, tensor in enumerate(sample):
        what = f"sample[{index}]"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(_refusal(what, "a tensor", type(tensor).__name__))
        if not tensor.is_cuda:
            raise ValueError(_refusal(what, "a tensor on a CUDA device", f"on {tensor.device}"))


def _check_place(layer):
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not tensor.is_cuda:
            raise ValueError(_refusal(name, "a tensor on a CUDA device", f"on {tensor.device}"))


def _check_options(layer):
    for name, part in layer.named_modules():
        # The warm-up would add to the buffers, and a replay fills no queue.
        for option in ("accumulate_main_grad", "delay_weight_grad"):
            if getattr(part, option, False):
                raise NotImplementedError(_refusal(f"{name or 'layer'}.{option}", "False", "True"))
        policy = getattr(part, "recompute", "none")  # checkpointing reads the generator's state
        if policy not in ("none", False):
            raise NotImplementedError(_refusal(f"{name or 'layer'}.recompute", "none", policy))


def graphed(layer, sample, *, warmup=3):
    """`layer`, whose forward and backward replay CUDA graphs captured on `sample`.

    sample: a tensor, or a tuple of those that forward takes, with the shapes, dtypes and
    requires_grad of every later call. In the mode (train or eval) that the layer is in now its
    forward is a copy of the inputs and one launch, and so is its backward; in the other mode, and
    with keyword arguments, it runs as before. Results live in memory that the next call writes
    over. Parameters may change their numbers, not their places. Thin over
    ``torch.cuda.make_graphed_callables``, whose other limits hold: no hooks, no autocast cache.

    >>> layer = redline.graphed(layer, torch.randn(1, 512, 4096, device="cuda"))  # doctest: +SKIP
    """
    sample = (sample,) if isinstance(sample, torch.Tensor) else tuple(sample)
    _check_options(layer)
    _check_sample(sample)
    _check_place(layer)
    signature = [(tensor.shape, tensor.dtype, tensor.device) for tensor in sample]
    mode, own = layer.training, layer.forward
    layer = torch.cuda.make_graphed_callables(layer, sample, num_warmup_iters=warmup)
    replay = layer.forward

    @functools.wraps(replay)
    def forward(*inputs, **options):
        if options:  # the graph holds none: as before
            return own(*inputs, **options)
        # A copy into the graph's input would broadcast what does not fit, or read too little of it.
        found = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        if found != signature and layer.training == mode:
            raise ValueError(_refusal("inputs", _described(signature), _described(found)))
        return replay(*inputs)

    layer.forward = forward
    return layer


def _described(signature):
    return ", ".join(f"{dtype} {list(shape)} on {device}" for shape, dtype, device in signature)
