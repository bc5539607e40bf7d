# Over budget: parameters: a layer's place and options, by name.
"""What Megatron expects of every layer with a product: attributes, initialisation, checkpoints."""

import inspect
import sys
from contextlib import nullcontext

import torch

from redline import parallel
from redline.extensions.transformer_engine.extra_state import ExtraState
from redline.extensions.transformer_engine.refusals import PRECISION, refuse
from redline.extensions.transformer_engine.table import works

TRACKERS = {"duplicated": "data-parallel-rng"}
EXPERT_TRACKER = "expert-parallel-rng"
DEFAULT_TRACKER = "model-parallel-rng"


def option(config, name, default=None):
    return getattr(config, name, default)


def factory_of(config):
    """Where a configuration wants parameters, and of which dtype."""
    if option(config, "use_cpu_initialization", False):
        device = "cpu"
    elif option(config, "init_model_with_meta_device", False):
        device = "meta"
    else:
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"device": device, "dtype": option(config, "params_dtype", torch.float32)}


@works("no arithmetic")
def condition_init_method(config, init_method):
    """init_method, or one that does nothing where config.perform_initialization is off."""
    if option(config, "perform_initialization", True):
        return init_method
    return lambda weight: None


def fork(name, like):
    """The context in which Megatron's tracker, once seeded, gives a CUDA tensor's numbers."""
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    if random is None or not like.is_cuda:
        return nullcontext()
    tracker = random.get_cuda_rng_tracker()
    return tracker.fork(name) if tracker.is_initialized() else nullcontext()


def initialise(layer, weight, bias):
    """Fills one product's parameters by the layer's init_method; a bias with zeros.

    For use_cpu_initialization in float32, as the undivided weight, and then rounded.
    """
    if weight.is_meta:
        return
    init_method = condition_init_method(layer.config, layer.init_method)
    with torch.no_grad():
        if weight.device.type == "cpu" and layer.split:
            master = torch.empty(weight.shape, dtype=torch.float32)
            master.copy_(weight)
            init_method(master)
            weight.copy_(master)
        else:
            with fork(layer.rng_tracker_name, weight):
                init_method(weight)
        if bias is not None:
            bias.zero_()


def mark(parameter, split_along=None, stride=1, sequence_parallel=False):
    """The attributes by which Megatron tells shards from replicas; split_along: None or an axis."""
    parameter.allreduce = True
    parameter.sequence_parallel = sequence_parallel
    parameter.tensor_model_parallel = split_along is not None
    if split_along is not None:
        parameter.partition_dim = split_along
        parameter.partition_stride = stride


def sharded(layer, state, axes, prefix, offsets, metadata):
    """Megatron's sharded tensors of a state dict; axes: the split axis of a name."""
    try:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint as make
    except ImportError as error:
        raise ImportError(
            f"{type(layer).__name__}: sharded_state_dict: expected megatron-core, which makes the "
            "sharded tensors, to be installed"
        ) from error
    groups = {"tp_group": layer.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
    known = inspect.signature(make).parameters
    groups = {name: group for name, group in groups.items() if name in known and group is not None}
    if "dp_cp_group" in groups and "tp_group" not in groups:
        from megatron.core import parallel_state

        groups["tp_group"] = parallel_state.get_tensor_model_parallel_group()
    return make(state, prefix, axes, offsets, **groups)


class MegatronModule(ExtraState):
    """Mixed with a layer that is a WeightGradient: Megatron's attributes and methods around it."""

    save_original_input = False  # what is kept is the input as it is
    fp8 = fp8_calibration = False

    def settle(self, config, mode, tp_group, init_method, *, bias, skip_bias_add, expert=False):
        """Before the parameters are made: what they and the forward are to be."""
        layer = type(self).__name__
        parallel.one_rank(layer, tp_group)
        self.config, self.tp_group, self._tp_group, self.tp_size = config, tp_group, tp_group, 1
        self.split = mode in ("column", "row")
        self.parallel_mode = None if mode == "duplicated" else mode
        self.init_method, self.is_expert = init_method, expert
        tracker = EXPERT_TRACKER if expert else TRACKERS.get(mode, DEFAULT_TRACKER)
        self.rng_tracker_name = tracker
        self.sequence_parallel = option(config, "sequence_parallel", False)
        self.fuse_wgrad_accumulation = option(config, "gradient_accumulation_fusion", False)
        self.use_bias, self.te_return_bias = bias, skip_bias_add and bias
        self.is_first_microbatch = True
        self.disable_parameter_transpose_cache = option(
            config, "disable_parameter_transpose_cache", False
        )
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}
        self.weight_grad_hooks = []
        self.built = False

    def gradient_options(self):
        """The layer's options for where its weights' gradients go."""
        return {
            "accumulate_main_grad": self.fuse_wgrad_accumulation,
            "delay_weight_grad": option(self.config, "delay_wgrad_compute", False),
        }

    def mark_parameters(self, weight, bias, stride=1):
        """`mark` for the parallel mode; a row's bias, and what is duplicated, is a replica."""
        axis = {"column": 0, "row": 1, None: 0}[self.parallel_mode]
        duplicated = self.rng_tracker_name == TRACKERS["duplicated"]
        mark(weight, None if duplicated else axis, stride, duplicated and self.sequence_parallel)
        if self.delay_weight_grad:
            weight.skip_backward_post_hook = True
        if bias is not None:
            column = self.parallel_mode == "column"
            mark(bias, 0 if column else None, stride, not column and self.sequence_parallel)

    def first_microbatch(self):
        """What this forward is, and the next is not: None where it does not matter."""
        first = None if self.disable_parameter_transpose_cache else self.is_first_microbatch
        self.is_first_microbatch = False
        return first

    def finish_init(self, quantization_config):
        """Takes no quantisation of this module."""
        name = type(self).__name__
        refuse(name, "quantization_config", quantization_config, (None,), PRECISION)

    def will_execute_quantized(self, is_context_quantized):
        """False: nothing is."""
        return False

    def set_tensor_parallel_group(self, tp_group):
        parallel.one_rank(type(self).__name__, tp_group)
        self.tp_group = self._tp_group = tp_group

    def need_backward_dw(self):
        return self.delay_weight_grad

    def register_wgrad_accumulation_and_reduce_hooks(self, hook):
        """Called after each backward_dw(), in place of a hook on the weight's gradient."""
        self.weight_grad_hooks.append(hook)

    def backward_dw(self):
        """The oldest weight gradient that backward left; nothing where they are not delayed."""
        if not self.delay_weight_grad:
            return
        super().backward_dw()
        for hook in self.weight_grad_hooks:
            hook()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors: split along the parallel mode's axis, or replicas."""
        axes = {"column": {"weight": 0, "bias": 0}, "row": {"weight": 1}, None: {}}
        state = self.state_dict(prefix="", keep_vars=True)
        axes = axes[self.parallel_mode]
        return sharded(self, state, axes, prefix, sharded_offsets, metadata)

    def __repr__(self):
        return (
            f"{type(self).__name__}(in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.use_bias}, TP={self.tp_size})"
        )
