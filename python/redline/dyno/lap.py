"""The lap: one GPT trained twice on the same batches, with stock parts and with tuned parts."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from . import stock
from .layer_parts import make_adamw
from .machine import Ceilings
from .measure import DynoError, Profiled, profiled, quiet_profiler
from .part import Unavailable, tuned_name
from .quiet import Watch
from .stock import Shape
from .text import Batches

# The largest loss difference that rounding explains, as docs/numerics.md states it.
# float32, CPU, 40 steps at the full learning rate: stock against itself with every weight moved by
# one rounding differs by at most 6.4e-5 (4 seeds, batches of 1 and 4); a fault in one layer's
# rotary by 3.4e-2, no weight decay by 6.1e-2.
# bfloat16, H200, 40 steps at 3e-4: two runs of stock differ by 5.8e-3 to 9.5e-3 (torch's attention
# backward gives other bits each run), stock and tuned by 6.1e-3, both from float32 by 0.426; a
# fault in one layer's rotary by 0.27. No weight decay, 9.0e-3, is not seen: too few steps. At 1e-3
# this size overshoots at step 5 and two runs of stock differ by up to 6.8e-2.
# float32, CPU, 500 steps of a smaller model (hidden 128): at 1e-3 stock against itself moved by one
# rounding differs by 2.4e-4 at step 100, 1.5e-3 at 200 and 1.9e-2 at 500, stock and tuned by
# 1.1e-3, 7.9e-3 and 6.6e-2; at 3e-4 stock and tuned by 1.6e-5 (bfloat16: 2.2e-3).
# bfloat16, H200, 500 steps at 3e-4: at one step stock differs from itself by up to 0.18, moved by
# one rounding by 0.19, from tuned by 0.19, and the means of 25 steps by 0.023, 0.020 and 0.015. So
# it is means that a long lap compares: what rounding moves up and down is gone, a drift is not.
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
MAX_NORM = 1.0
# Steps in which the learning rate rises to its value. Without them Adam's first steps overshoot
# (the loss went 9.5, 7.9, 11.0) and magnify a rounding: the float32 curves part by 8.3e-4 (CPU),
# with them by 2.9e-4.
RISING_STEPS = 10
VARIANTS = ("stock", "tuned")
SHORT_LAP = 100  # steps; beyond, losses are compared as means of MEAN_STEPS neighbours
MEAN_STEPS = 25


@dataclass(frozen=True)
class Setup:
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    steps: int
    seed: int = 0

    @property
    def warm_up(self) -> int:
        return min(3, self.steps // 2)


@dataclass
class Side:
    """One of the two models as it ran."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    profile: Profiled | None = None


@dataclass
class Lap:
    setup: Setup
    sides: dict[str, Side]
    quiet: list[bool]
    bound: float

    @property
    def mean_steps(self) -> int:
        """Over how many steps a loss is the mean before it is compared."""
        return MEAN_STEPS if self.setup.steps > SHORT_LAP else 1

    @property
    def loss_differences(self) -> list[float]:
        """How far the curves are apart, from step `mean_steps` on."""
        pairs = zip(*(self.sides[v].losses for v in VARIANTS), strict=True)
        apart = [a - b for a, b in pairs]
        width = self.mean_steps
        sums = list(itertools.accumulate(apart, initial=0.0))
        return [abs(b - a) / width for a, b in zip(sums, sums[width:], strict=False)]

    @property
    def max_loss_difference(self) -> float:
        return max(self.loss_differences, default=0.0)

    @property
    def right(self) -> bool:
        return self.max_loss_difference <= self.bound

    def _counted(self) -> list[int]:
        timed = range(self.setup.warm_up, self.setup.steps)
        calm = [step for step in timed if self.quiet[step]]
        return list(timed) if self.disturbed else calm

    @property
    def disturbed(self) -> bool:
        """Whether fewer than half of the timed steps were quiet: the speeds are then no claim."""
        timed = self.quiet[self.setup.warm_up :]
        return 2 * sum(timed) < len(timed)

    def tokens_per_second(self, variant: str) -> float:
        seconds = [self.sides[variant].seconds[step] for step in self._counted()]
        return self.setup.shape.tokens / statistics.median(seconds)

    @property
    def speedup(self) -> float:
        return self.tokens_per_second("tuned") / self.tokens_per_second("stock")

    @property
    def peak_ratio(self) -> float:
        peaks = [self.sides[v].profile.peak_bytes for v in ("tuned", "stock")]
        return peaks[0] / peaks[1] if peaks[1] else math.nan

    def flop_utilisation(self, variant: str, ceilings: Ceilings) -> float:
        """The model's operations per second, as a share of the machine's measured matrix rate."""
        shape = self.setup.shape
        flops_per_second = shape.model_flops / shape.tokens * self.tokens_per_second(variant)
        return flops_per_second / ceilings.matmul_flops_per_second

    def as_dict(self, ceilings: Ceilings) -> dict:
        described = {
            v: {
                "losses": self.sides[v].losses,
                "tokens_per_second": self.tokens_per_second(v),
                "peak_bytes": self.sides[v].profile.peak_bytes,
                "flop_utilisation": self.flop_utilisation(v, ceilings),
            }
            for v in VARIANTS
        }
        return described | {
            "max_loss_difference": self.max_loss_difference,
            "bound": self.bound,
        }


class Trainer:
    """A model with its optimiser; `step` is the same for both variants but for whose parts run."""

    def __init__(self, variant: str, setup: Setup):
        self.variant, self.setup = variant, setup
        self.model = make_model(variant, setup)
        parameters = list(self.model.parameters())
        self.optimizer = make_adamw(variant, parameters, setup.shape.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / RISING_STEPS)
        )
        self.norm = 0.0  # of the last step's gradients
        self.clip = torch.nn.utils.clip_grad_norm_
        if variant == "tuned":  # the step multiplies by the coefficient: gradients stay as they are
            clip = tuned_name("optim", "clip_grad_norm")
            self.clip = partial(clip, optimizer=self.optimizer)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(tokens, targets)
        value = loss.item()
        if not math.isfinite(value):  # before the step spreads it over every weight
            return value
        loss.backward()
        self.norm = self.clip(self.model.parameters(), MAX_NORM).item()
        if not math.isfinite(self.norm):
            return value
        self.optimizer.step()
        self.schedule.step()
        return value


def make_model(variant: str, setup: Setup) -> nn.Module:
    """The seed's weights, in stock parts or in tuned ones."""
    torch.manual_seed(setup.seed)
    model = stock.GPT(setup.shape)
    if variant == "tuned":
        state = stock.tuned_state(model.state_dict(), setup.shape)
        model = _tuned_gpt(setup.shape)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - set(dict(model.named_buffers())):
            raise DynoError(f"redline.layers.GPT: parameters differ: {missing + unexpected}")
    return model.to(setup.device, setup.dtype)


def _tuned_gpt(shape: Shape) -> nn.Module:
    gpt = tuned_name("layers", "GPT")
    return gpt(
        shape.vocabulary,
        shape.hidden,
        shape.ffn,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        eps=shape.epsilon,
        max_positions=shape.sequence,
        fused_loss="promise",
    )


def run_lap(
    setup: Setup, batches: Batches, on_step: Callable[[int], None], make: Callable = Trainer
) -> Lap:
    """Both models step in turn on the same batch, the first one another each step."""
    try:
        trainers = {variant: make(variant, setup) for variant in VARIANTS}
    except Unavailable as missing:
        raise DynoError(f"the lap cannot run: {missing}") from None
    sides = {variant: Side() for variant in VARIANTS}
    quiet, watch = [], Watch()
    for step in range(setup.steps):
        batch = [t.to(setup.device) for t in batches[step]]
        watch.restart()
        for variant in VARIANTS if step % 2 else VARIANTS[::-1]:
            _timed_step(trainers[variant], batch, sides[variant], step)
        quiet.append(setup.device.type == "cuda" or watch.was_quiet())
        on_step(step)
    del trainers
    with quiet_profiler():
        for variant in VARIANTS:
            sides[variant].profile = _profile(variant, setup, batches, make)
    return Lap(setup, sides, quiet, BOUNDS[setup.dtype])


def _timed_step(trainer: Trainer, batch: list[Tensor], side: Side, step: int) -> None:
    if trainer.setup.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = trainer.step(*batch)
    if trainer.setup.device.type == "cuda":
        torch.cuda.synchronize()
    side.seconds.append(time.perf_counter() - start)
    side.losses.append(loss)
    for what, value in (("loss", loss), ("gradients' norm", trainer.norm)):
        if not math.isfinite(value):
            culprit = name_culprit(trainer.model, batch)
            raise DynoError(
                f"the {trainer.variant} model's {what} became {value} at step {step + 1}: {culprit}"
            )


def name_culprit(model: nn.Module, batch: list[Tensor]) -> str:
    """The first part of the model that makes a value that is not finite, from the batch again.

    Forward's parts run in order, and backward's in the opposite one: the last part in forward's
    order whose gradients are not finite is where backward made the first of them.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite"
    ran: list[tuple[str, nn.Module]] = []
    faulty: list[str] = []
    hooks = []

    def watch(name: str):
        def hook(module, _inputs, output):
            ran.append((name, module))
            if not _finite([output] if isinstance(output, Tensor) else output or ()):
                faulty.append(name)

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(watch(name or "the loss")))
    try:
        model.zero_grad(set_to_none=True)
        loss = model(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    if faulty:
        return f"the first part to produce it is {faulty[0]}"
    loss.backward()
    for name, module in reversed(ran):
        if not _finite([p.grad for p in module.parameters(recurse=False)]):
            return f"the first part to produce it in backward is {name}"
    return "no part repeats it"


def _finite(values) -> bool:
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _profile(variant: str, setup: Setup, batches: Batches, make: Callable) -> Profiled:
    """Builds the model anew and steps twice, so that all it allocates is seen."""
    batch = [t.to(setup.device) for t in batches[0]]

    def run():
        trainer = make(variant, setup)
        for _ in range(2):
            trainer.step(*batch)

    return profiled(run, setup.device)
