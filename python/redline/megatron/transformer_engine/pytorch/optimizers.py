# Over budget: parameters: the signatures are Transformer Engine's.
"""FusedAdam and the functions over lists of tensors, on `redline.ops`."""

import torch
from torch.optim import SGD as FusedSGD  # noqa: N811  (Redline has no SGD of its own)

from redline import ops

__all__ = [
    "FusedAdam",
    "FusedSGD",
    "multi_tensor_applier",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
]

CHUNK = 65536  # an argument of every op of this form; Redline's choose for themselves


def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(CHUNK, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    """(norm [1] of all tensors of the one list together, norm of each or nothing)."""
    (tensors,) = tensor_lists
    norm = ops.gradient_norm(tensors).reshape(1)
    each = [ops.gradient_norm([tensor]) for tensor in tensors] if per_tensor else []
    return norm, torch.stack(each) if each else norm.new_empty(0)


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    """Writes source * scale for the lists (sources, targets); the flag is not written."""
    sources, targets = tensor_lists
    if all(source is target for source, target in zip(sources, targets)) and sources:
        coefficient = torch.full((), float(scale), device=sources[0].device)
        ops.scale_gradients(sources, coefficient)
        return
    for source, target in zip(sources, targets):
        target.copy_(source if scale == 1.0 else source * scale)


def multi_tensor_scale_tensor(chunk_size, noop_flag, tensor_lists, scale):
    """`multi_tensor_scale` by a scalar on the device, which is not waited for."""
    sources, targets = tensor_lists
    for source, target in zip(sources, targets):
        if source is not target:
            target.copy_(source)
    if targets:
        ops.scale_gradients(targets, scale.reshape(()).float())


class FusedAdam(torch.optim.Optimizer):
    """AdamW by `ops.adamw_step`: group["step"] counts, state holds exp_avg and exp_avg_sq.

    adam_w_mode=False adds weight_decay * parameter to the gradient first. master_weights keeps a
    float32 "master_param" of 16-bit parameters (store_param_remainders: the same numbers, whole).
    use_decoupled_grad reads parameter.decoupled_grad. State is float32, or bfloat16 where asked.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        for name, value, built in (
            ("amsgrad", amsgrad, (False,)),
            ("bias_correction", bias_correction, (True,)),
            ("capturable", capturable, (False,)),
            ("master_weight_dtype", master_weight_dtype, (torch.float32,)),
            ("exp_avg_dtype", exp_avg_dtype, (torch.float32, torch.bfloat16)),
            ("exp_avg_sq_dtype", exp_avg_sq_dtype, (exp_avg_dtype,)),
        ):
            if value not in built:
                expected = " or ".join(str(choice) for choice in built)
                raise NotImplementedError(
                    f"transformer_engine.pytorch.FusedAdam: {name}: expected {expected}, "
                    f"not {value}"
                )
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode, self.master_weights = adam_w_mode, master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.state_dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def initialize_state(self, param, store_param_remainders=False):
        """Zero averages, and the master where one is kept."""
        state = self.state[param]
        for name, dtype in self.state_dtypes.items():
            state[name] = torch.zeros_like(param, dtype=dtype)
        if self._has_master(param):
            state["master_param"] = param.detach().float()

    def get_unscaled_state(self, param, state_name):
        return self.state[param][state_name].float()

    def set_scaled_state(self, param, state_name, unscaled_state):
        if state_name in self.state[param]:
            self.state[param][state_name].copy_(unscaled_state)
        else:
            dtype = self.state_dtypes.get(state_name, torch.float32)
            self.state[param][state_name] = unscaled_state.to(dtype)

    def _has_master(self, param):
        return self.master_weights and param.dtype in (torch.float16, torch.bfloat16)

    def _gradient(self, param):
        return getattr(param, "decoupled_grad" if self.use_decoupled_grad else "grad", None)

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        if grad_scaler is not None:
            raise NotImplementedError(
                "transformer_engine.pytorch.FusedAdam: grad_scaler: expected None: Megatron "
                "unscales before the step"
            )
        for group in self.param_groups:
            params = [p for p in group["params"] if self._gradient(p) is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for has_master in (False, True):
                alike = [p for p in params if self._has_master(p) == has_master]
                self._step_alike(alike, group, has_master)
        return loss

    def _step_alike(self, params, group, has_master):
        if not params:
            return
        for param in params:
            if not self.state[param]:
                self.initialize_state(param)
        states = [self.state[param] for param in params]
        gradients = [self._gradient(param) for param in params]
        decay = group["weight_decay"]
        if not self.adam_w_mode and decay:
            gradients = [g.float() + decay * p.float() for g, p in zip(gradients, params)]
            decay = 0.0
        device = params[0].device
        steps = torch.full((len(params),), float(group["step"] - 1), device=device)
        beta1, beta2 = group["betas"]
        ops.adamw_step(
            params,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["master_param"] for state in states] if has_master else [],
            list(steps.unbind()),
            learning_rate=torch.full((), float(group["lr"]), dtype=torch.float64, device=device),
            beta1=beta1,
            beta2=beta2,
            epsilon=group["eps"],
            weight_decay=decay,
        )

    def load_state_dict(self, state_dict):
        """torch casts averages to the parameter's dtype: they are taken again as they were."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params):
            for name, value in state_dict["state"].get(key, {}).items():
                dtype = self.state_dtypes.get(name, torch.float32)
                self.state[param][name] = value.to(param.device, dtype, copy=True)
