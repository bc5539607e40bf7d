# Over budget: parameters: the signatures are Transformer Engine's.
"""What the modules share: their place among ranks, their parameters' start, refusals."""

from contextlib import nullcontext

import torch

from redline import parallel
from redline.extensions.transformer_engine.module import MegatronModule

_dummy_gradients = {}


def get_dummy_wgrad(shape, dtype, zero=False):
    """A gradient that says nothing, for hooks that count on one: one buffer for each shape."""
    key = (tuple(shape), dtype)
    if key not in _dummy_gradients:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        _dummy_gradients[key] = torch.empty(key[0], dtype=dtype, device=device)
    if zero:
        _dummy_gradients[key].zero_()
    return _dummy_gradients[key].detach()


def get_workspace():
    """What Megatron hands to general_gemm, which needs none."""
    return torch.empty(0, dtype=torch.uint8)


def initialize_ub(*args, **kwargs):
    refuse("initialize_ub", "tp_comm_overlap", False, True, "leave it off")


def refuse(name, argument, expected, value, instead):
    raise NotImplementedError(
        f"transformer_engine.pytorch.{name}: {argument}: expected {expected}, not {value}: "
        f"{instead}"
    )


def normal_init(tensor):
    """What Transformer Engine fills a weight with where no init_method is given."""
    torch.nn.init.normal_(tensor, 0.0, 0.023)


def factory_of(device, dtype):
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device, "dtype": dtype or torch.get_default_dtype()}


class TransformerEngineBaseModule(MegatronModule):
    """`MegatronModule` without a configuration: built from Transformer Engine's own arguments."""

    def take(self, options):
        """The arguments that the layers share, by name, before the parameters are made."""
        layer = type(self).__name__
        for flag in [name for name in options if name.startswith("ub_") and name != "ub_name"]:
            if options[flag]:
                refuse(layer, flag, False, True, "overlapped communication is not built")
        mode = options["parallel_mode"]
        if mode not in (None, "column", "row"):
            raise ValueError(
                f"transformer_engine.pytorch.{layer}: parallel_mode: "
                f"expected None, column or row, not {mode}"
            )
        parallel.one_rank(layer, options["tp_group"], options["tp_size"])
        self.parallel_mode, self.tp_group, self.tp_size = mode, options["tp_group"], 1
        self.sequence_parallel = False  # of one rank there is nothing to gather
        self.use_bias, self.return_bias = options["bias"], options["return_bias"]
        self.get_rng_state_tracker = options["get_rng_state_tracker"]
        self.rng_tracker_name = options.get("rng_tracker_name")
        self.init_method = options["init_method"] or normal_init
        self.ub_name = options["ub_name"]
        self.fuse_wgrad_accumulation = options["fuse_wgrad_accumulation"]
        self.delay_weight_grad = options["delay_wgrad_compute"]
        self.save_original_input = options.get("save_original_input", False)
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}
        self.weight_grad_hooks = []

    def gradient_options(self):
        return {
            "accumulate_main_grad": self.fuse_wgrad_accumulation,
            "delay_weight_grad": self.delay_weight_grad,
        }

    def fork(self, tensor):
        """The context in which Megatron's tracker gives the numbers for a tensor on the GPU."""
        if self.get_rng_state_tracker is None or not tensor.is_cuda:
            return nullcontext()
        names = () if self.rng_tracker_name is None else (self.rng_tracker_name,)
        return self.get_rng_state_tracker().fork(*names)

    def start(self, weight, bias):
        """Fills one product's parameters and marks them."""
        if not weight.is_meta:
            with torch.no_grad(), self.fork(weight):
                self.init_method(weight)
        if bias is not None:
            torch.nn.init.zeros_(bias)
        self.mark_parameters(weight, bias)

    def init_fp8_metadata(self, num_gemms=1):
        """Nothing: products are not quantised."""
