# Over budget: parameters: torch.optim.AdamW's own signature.
"""AdamW and gradient clipping: one pass over memory, and nothing that waits for the device.

optimizer = redline.optim.AdamW(model.parameters(), lr=3e-4)
...
loss.backward()
redline.optim.clip_grad_norm(model.parameters(), 1.0, optimizer)
optimizer.step()
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from redline import ops

# What torch.optim.AdamW writes into its groups: a state dict of one loads into the other.
_TORCH_OPTIONS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class AdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW`, in one pass over memory (formula: `redline.ops.adamw_step`).

    Takes the same arguments and state dicts, with LR schedulers, GradScaler, closures and DTensor
    parameters. `foreach`, `fused` and `capturable` are accepted and mean nothing: every step is all
    three. For a CUDA graph of a step, give `lr` as a tensor on the parameters' device, and take one
    step before the capture.

    master: keep float32 masters of 16-bit parameters (state ``master``). state_dtype: of the moving
    averages, torch.float32 (the default) or torch.bfloat16; float64 parameters keep float64.
    """

    # GradScaler then leaves its scale and what it found to step(), as `grad_scale`, `found_inf`.
    _step_supports_amp_scaling = True
    _clip_coefficient: Tensor | None = None  # of the next step, from clip_grad_norm

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        master: bool = False,
        state_dtype: torch.dtype | None = None,
        **torch_options,
    ):
        unknown = sorted(set(torch_options) - set(_TORCH_OPTIONS))
        if unknown:
            raise TypeError(f"AdamW: {unknown[0]}: no such option")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= _TORCH_OPTIONS | torch_options | {"amsgrad": amsgrad}
        super().__init__(params, options | {"master": master, "state_dtype": state_dtype})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            group["decoupled_weight_decay"] = True
            _check_group(group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            beta1, beta2 = group["betas"]
            for (device, _), columns in self._lists(group).items():
                ops.adamw_step(
                    *columns,
                    learning_rate=self._learning_rate(index, group["lr"], device),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    epsilon=group["eps"],
                    weight_decay=group["weight_decay"],
                    clip_coefficient=_scalar(self._clip_coefficient, device),
                    grad_scale=_scalar(getattr(self, "grad_scale", None), device),
                    found_inf=_scalar(getattr(self, "found_inf", None), device),
                )
        self._clip_coefficient = None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            if not group.get("decoupled_weight_decay", True):
                raise ValueError(
                    "AdamW: state: expected one of an AdamW, not of torch.optim.Adam, whose weight "
                    "decay is part of its averages"
                )
        # torch casts averages to the parameter's dtype: they are taken again from what it was
        # given, after every hook.
        given: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, found: given.update(found))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for saved, group in zip(given["param_groups"], self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                if given["state"].get(key):
                    self.state[parameter] = _loaded(given["state"][key], parameter, group)

    def _lists(self, group: dict[str, Any]) -> dict[tuple, tuple[list[Tensor], ...]]:
        """The lists of adamw_step, for each device, with masters and without."""
        lists: dict[tuple, tuple[list[Tensor], ...]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            gradient = _gradient(parameter, "AdamW")
            state = self.state[parameter]
            if not state:
                _start(state, parameter, group)
            if _wants_master(parameter, group) and "master" not in state:
                state["master"] = parameter.detach().float()
            master = state.get("master")
            key = (parameter.device, master is not None)
            columns = lists.setdefault(key, ([], [], [], [], [], []))
            row = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"], master)
            for column, tensor in zip(columns, (*row, state["step"]), strict=True):
                if tensor is not None:
                    column.append(_local(tensor))
        return lists

    def _learning_rate(self, index: int, lr: float | Tensor, device: torch.device) -> Tensor:
        """The group's learning rate on a device; a number is written there when it changes."""
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return lr.to(device, non_blocking=True)
        if isinstance(lr, Tensor) and device.type == "cpu":
            return lr
        lr = float(lr)
        if _is_capturing(device):
            return torch.full((), lr, dtype=torch.float64, device=device)
        rates = self.__dict__.setdefault("_learning_rates", {})
        value, rate = rates.get((index, device), (None, None))
        if rate is None:
            rate = torch.full((), lr, dtype=torch.float64, device=device)
        elif value != lr:
            rate.fill_(lr)
        rates[index, device] = (lr, rate)
        return rate


@torch.no_grad()
def clip_grad_norm(
    parameters: Tensor | Iterable[Tensor], max_norm: float, optimizer: AdamW | None = None
) -> Tensor:
    """Limits the norm of all gradients together to `max_norm`; returns what it was, a scalar.

    With an `AdamW`, its next step multiplies by the coefficient on the way, and the gradients keep
    their values: they are read once more and never written. Without, they are scaled in place.
    DTensor gradients count over all ranks. With GradScaler, call ``scaler.unscale_`` before.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if optimizer is not None:
        _check_same(parameters, optimizer)
    if not parameters:
        return torch.tensor(0.0)
    gradients = [_gradient(parameter, "clip_grad_norm") for parameter in parameters]
    norm = _total_norm(gradients)
    coefficient = ops.clip_coefficient(norm, float(max_norm))
    if optimizer is not None:
        optimizer._clip_coefficient = coefficient
        return norm
    for device, alike in _grouped(gradients, lambda gradient: gradient.device).items():
        ops.scale_gradients([_local(gradient) for gradient in alike], coefficient.to(device))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not gradient:
            parameter.grad = gradient
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The groups of `_kind` in order of first appearance, each by gradient_norm."""
    groups = _grouped(gradients, _kind)
    norms = [(alike[0], ops.gradient_norm([_local(g) for g in alike])) for alike in groups.values()]
    if len(norms) == 1 and not _is_sharded(gradients[0]):
        return norms[0][1]
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for gradient, norm in norms:
        total += _over_ranks(norm.double().square(), gradient).to(total.device)
    return total.sqrt().float()


def _kind(gradient: Tensor) -> tuple:
    """Gradients of one kind are one call of gradient_norm and one sum over ranks."""
    placed = (gradient.device_mesh, gradient.placements) if _is_sharded(gradient) else ()
    return gradient.device, gradient.dtype == torch.float64, *placed


def _over_ranks(square: Tensor, gradient: Tensor) -> Tensor:
    """The sum over the ranks that hold different parts of `gradient`."""
    if not _is_sharded(gradient):
        return square
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if place.is_shard() else Replicate() for place in gradient.placements]
    return DTensor.from_local(
        square, gradient.device_mesh, placements, run_check=False
    ).full_tensor()


def _grouped(tensors: list[Tensor], key: Callable[[Tensor], Any]) -> dict[Any, list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return groups


def _is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor; asking its class would import torch.distributed.tensor."""
    return hasattr(tensor, "placements")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _gradient(parameter: Tensor, op: str) -> Tensor:
    """The gradient, placed over ranks as its parameter is."""
    gradient = parameter.grad
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"{op}: gradients: expected a dense tensor, not {gradient.layout}; "
            "torch.optim.SparseAdam takes sparse ones"
        )
    if _is_sharded(gradient) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def _wants_master(parameter: Tensor, group: dict[str, Any]) -> bool:
    return group["master"] and parameter.dtype in (torch.float16, torch.bfloat16)


def _state_dtype(parameter: Tensor, group: dict[str, Any]) -> torch.dtype:
    if parameter.dtype == torch.float64:
        return torch.float64
    return group["state_dtype"] or torch.float32


def _start(state: dict[str, Tensor], parameter: Tensor, group: dict[str, Any]) -> None:
    if _is_capturing(parameter.device):
        raise RuntimeError("AdamW: state: expected one step before a CUDA graph is captured")
    dtype = _state_dtype(parameter, group)
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)


def _loaded(saved: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's state from a state dict of ours or of torch.optim.AdamW."""
    missing = {"step", "exp_avg", "exp_avg_sq"} - saved.keys()
    if missing:
        raise ValueError(f"AdamW: state: expected {min(missing)}, not only {sorted(saved)}")
    device, dtype = parameter.device, _state_dtype(parameter, group)
    state = {"step": torch.tensor(float(saved["step"]), dtype=torch.float32, device=device)}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = saved[name].to(device=device, dtype=dtype)
    if "master" in saved and _wants_master(parameter, group):
        state["master"] = saved["master"].to(device=device, dtype=torch.float32)
    return state


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    """One float32 on the device, without waiting for it."""
    return None if value is None else value.to(device, torch.float32, non_blocking=True)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_same(parameters: list[Tensor], optimizer: AdamW) -> None:
    everything = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    stepped = {id(parameter) for parameter in everything if parameter.grad is not None}
    if stepped != {id(parameter) for parameter in parameters}:
        raise ValueError(
            "clip_grad_norm: parameters: expected those of the optimizer that have gradients "
            f"({len(stepped)}), not {len(parameters)} others"
        )


def _check_group(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr: expected one element, not {tuple(lr.shape)}")
    for option in ("lr", "eps", "weight_decay"):
        value = group[option]
        if not isinstance(value, (Tensor, Real)):
            raise TypeError(f"AdamW: {option}: expected a number or a tensor, not {value!r}")
        if not (isinstance(value, Tensor) or value >= 0):
            raise ValueError(f"AdamW: {option}: expected 0 or more, not {value}")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or isinstance(betas, str):
        raise TypeError(f"AdamW: betas: expected two numbers, not {betas!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"AdamW: betas: expected two values of [0, 1), not {betas}")
    for option in ("amsgrad", "maximize", "differentiable"):
        if group[option]:
            raise ValueError(f"AdamW: {option}: expected False, it is not built")
    if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            "AdamW: state_dtype: expected torch.float32 or torch.bfloat16, "
            f"not {group['state_dtype']}"
        )
