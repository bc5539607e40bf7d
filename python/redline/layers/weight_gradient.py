"""Where the gradient of a product's weight goes: to autograd, into main_grad, or later."""

import torch

from redline import ops


def main_grad_of(layer, weight, name="weight"):
    """The buffer of a weight whose gradients are accumulated outside of autograd.

    Megatron-FSDP gives it through get_main_grad().
    """
    if hasattr(weight, "__fsdp_param__"):
        return weight.get_main_grad()
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise RuntimeError(
            f"{type(layer).__name__}: {name}.main_grad: expected a buffer of the weight's shape, "
            "not none; accumulate_main_grad is on"
        )
    return main_grad


def into_main_grad(layer, weight, first_microbatch, name="weight"):
    """ops.linear's options that send the gradient into weight.main_grad.

    The first micro-batch overwrites; None always accumulates. A weight that has the attribute
    grad_added_to_main_grad is told, and gets a gradient that says nothing, for hooks that count
    on one: zeros where weight.zero_out_wgrad asks for them.
    """
    options = {"main_grad": main_grad_of(layer, weight, name)}
    overwrite = getattr(weight, "overwrite_main_grad", False)
    options["accumulate"] = not (first_microbatch or overwrite)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
        zero = getattr(weight, "zero_out_wgrad", False)
        options["dummy_grad"] = "zeros" if zero else "empty"
    return options


class WeightGradient:
    """The part of a layer that multiplies by weights, for torch.nn.Module to be mixed with.

    accumulate_main_grad: gradients go into weight.main_grad and not into weight.grad.
    delay_weight_grad: backward leaves them to backward_dw().
    """

    accumulate_main_grad = False
    delay_weight_grad = False

    def set_weight_gradient(self, accumulate_main_grad, delay_weight_grad):
        self.accumulate_main_grad = accumulate_main_grad
        self.delay_weight_grad = delay_weight_grad
        self.delayed = ops.WeightGradientQueue() if delay_weight_grad else None

    def product(self, x, weight, bias=None, first_microbatch=None, queue=None):
        """x W^T + bias; the weight's gradient goes where the layer's options say."""
        return ops.linear(x, weight, bias, **self.destination(weight, first_microbatch, queue))

    def destination(self, weight, first_microbatch=None, queue=None, name="weight"):
        """An op's options that send the gradient of `weight` where the layer's options say."""
        asked = self.accumulate_main_grad or self.delay_weight_grad
        if not (asked and weight.requires_grad and torch.is_grad_enabled()):
            return {}
        options = {}
        if self.accumulate_main_grad:
            options = into_main_grad(self, weight, first_microbatch, name)
        if self.delay_weight_grad:
            options["delayed"] = self.delayed if queue is None else queue
        return options

    def backward_dw(self):
        """The oldest weight gradient that backward left, into main_grad or weight.grad."""
        if self.delay_weight_grad:
            add_gradient(self.weight, self.delayed.pop())


def add_gradient(weight, gradient):
    """What autograd does at the end: weight.grad += gradient. None: it is where it belongs."""
    if gradient is None:
        return
    if weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad += gradient
