"""cross_entropy with `loss_scale`: what it refuses, and what every op must do."""

import pytest
import torch

import contract
from cases import DEVICES, randn
from loss_cases import call, draw, gradcheck
from redline import ops

pytestmark = pytest.mark.parametrize("device", DEVICES)


def test_targets_out_of_range(device):
    logits, targets = draw((6, 33), torch.float32, device)
    targets[2], targets[4] = 33, -1
    if device == "cpu":
        computed = logits.clone().requires_grad_() * 1
        with pytest.raises(
            RuntimeError,
            match=r"targets: expected classes of \[0, 33\) or ignore_index -100, not 33 in row 2",
        ):
            ops.cross_entropy(computed, targets, loss_scale=1.0, inplace_backward=True)
        assert torch.equal(computed, logits)
        return
    for cols in (32, 33):  # whole vectors, and more
        one = torch.ones(6, device=device)
        loss, grad = call(logits[:, :cols].contiguous(), targets, "none", up=one, promise=one)
        bad = torch.tensor([False, False, True, False, True, False], device=device)
        bad |= targets >= cols
        assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan().all(-1), bad)
        assert not grad[~bad].isnan().any()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((4,), {}, r"expected a scalar, not \[4\]"),
        ((3,), {"reduction": "none"}, r"expected a scalar, or one number per target, not \[3\]"),
        (torch.long, {}, r"expected a floating dtype, not Long"),
        ((), {"return_log_sum_exp": True}, r"expected none with log_sum_exp, whose upstream grad"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_refusals(trained, given, options, message, device):
    logits = torch.zeros(4, 8, device=device, requires_grad=trained)
    targets = torch.zeros(4, dtype=torch.long, device=device)
    size, dtype = (given, None) if isinstance(given, tuple) else ((), given)
    scale = torch.ones(size, dtype=dtype, device=device)
    with pytest.raises(RuntimeError, match="cross_entropy: loss_scale: " + message):
        ops.cross_entropy(logits, targets, loss_scale=scale, **options)
    if device == "cuda":
        message = "loss_scale: expected a tensor on cuda:0, not on cpu"
        with pytest.raises(RuntimeError, match=message):
            ops.cross_entropy(logits, targets, loss_scale=torch.ones(()))


def test_a_backward_with_create_graph_is_refused(device):
    logits, targets = draw((4, 8), torch.float32, device)
    leaf = logits.requires_grad_()
    loss = ops.cross_entropy(leaf, targets, loss_scale=1.0)
    with pytest.raises(RuntimeError, match="loss_scale: expected a backward without create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


# --- registration and tracing ---------------------------------------------------------------------


def test_gradcheck(device):
    if device == "cuda":
        pytest.skip("float64 is the CPU's")
    gradcheck(["mean", "sum"], loss_scale=1.0)


def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.randn(4, 3, 8, device=device, requires_grad=True)
    targets = torch.randint(0, 8, (4, 3), device=device)
    registered, one = torch.ops.redline, torch.ones((), device=device)
    for arguments in ((), ("sum", -100, 0.1, 1e-3, 30.0)):
        contract.passes_opcheck(
            registered.cross_entropy, (logits, targets, *arguments), {"loss_scale": one}
        )
    x, half = logits.detach(), one / 2
    formula = ("mean", -100, 0.1, 1e-3, 30.0)
    checks = {
        "promise": (x, targets, one, *formula),
        "promise_inplace": (x, targets, one, *formula),
        "fulfil": (x, half, one),
        "fulfil_inplace": (x, half, one),
    }
    for name, arguments in checks.items():
        op = getattr(registered, f"cross_entropy_{name}")
        contract.passes_opcheck(op, arguments, inner=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tracing(reduction, inplace, device):
    inputs = [randn(6, 3, 40, dtype=torch.float32, device=device)]
    inputs += [torch.randint(0, 40, (6, 3), device=device)]
    # The upstream gradient that contract.gradients draws for a scalar.
    drawn = torch.randn((), generator=torch.Generator().manual_seed(7)).item()

    def function(x, t):
        options = {"loss_scale": drawn, "inplace_backward": inplace}
        return ops.cross_entropy(x * 1, t, reduction, -100, 0.1, **options).sum()

    contract.compiles(function, inputs)
    contract.compiles_dynamic(function, inputs)
    contract.exports(function, inputs)
    contract.runs_in_inference_mode(function, inputs)
    contract.refuses_vmap(function, inputs)
    contract.runs_under_compiled_autograd(lambda x: function(x, inputs[1]), inputs[:1])
    if device == "cuda" and reduction == "mean":
        contract.captures(function, inputs)
        contract.agrees_on_side_stream(function, inputs)


def test_nothing_is_read_back(device):
    if device == "cpu":
        pytest.skip("there is no device to wait for")
    logits, targets = draw((9, 256), torch.bfloat16, device)
    up = torch.ones((), device=device)

    def step():
        call(logits, targets, up=up, promise=up)
        call(logits, targets, "none", up=up.expand(9), promise=up)

    step()  # a library's first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
