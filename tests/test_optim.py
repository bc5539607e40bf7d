"""redline.optim: a drop-in for torch.optim.AdamW and torch.nn.utils.clip_grad_norm_."""

import copy
import io

import pytest
import torch
from torch import nn

from cases import DEVICES, randn
from redline import ops
from redline.optim import AdamW, clip_grad_norm

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def model(device="cpu", dtype=torch.float32):
    torch.manual_seed(1)
    layers = nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5)
    return nn.Sequential(*layers).to(device, dtype)


def backward(net, step=0, scale=1.0):
    """Gradients of a small loss; `step` draws the batch."""
    parameter = next(net.parameters())
    x = randn(16, 7, dtype=parameter.dtype, device=parameter.device, seed=100 + step)
    net.zero_grad()
    loss = net(x).square().mean() * scale
    loss.backward()
    return loss.detach()


def train(net, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(net, step)
        optimizer.step()


def same_bits(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def assert_near(first, second, rtol=1e-5):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_follows_torch_with_groups_and_a_scheduler(device):
    ours, theirs = model(device), model(device)
    built = []
    for net, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        weights = [p for p in net.parameters() if p.dim() > 1]
        others = [p for p in net.parameters() if p.dim() < 2]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
        optimizer = kind(groups, **OPTIONS)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 3e-3], total_steps=40)
        built.append((net, optimizer, schedule))
    for step in range(30):
        for net, optimizer, schedule in built:
            backward(net, step)
            optimizer.step()
            schedule.step()
    assert_near(ours, theirs)
    assert isinstance(built[0][1], torch.optim.Optimizer)


@pytest.mark.parametrize("device", DEVICES)
def test_state_dicts_move_both_ways(device):
    """10 steps of one, its state dict through a file, 10 steps of the other."""
    for first_kind, second_kind in ((torch.optim.AdamW, AdamW), (AdamW, torch.optim.AdamW)):
        net, straight = model(device), model(device)
        first = first_kind(net.parameters(), **OPTIONS)
        train(net, first, 10)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = second_kind(net.parameters(), lr=1.0)
        second.load_state_dict(torch.load(file, weights_only=True))
        train(net, second, 10, first=10)
        assert second.param_groups[0]["betas"] == OPTIONS["betas"]
        assert float(second.state[net[0].weight]["step"]) == 20
        train(straight, torch.optim.AdamW(straight.parameters(), **OPTIONS), 20)
        assert_near(net, straight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_resumes_to_the_bit(dtype, master, device):
    options = {**OPTIONS, "master": master, "state_dtype": torch.float32}
    straight, net = model(device, dtype), model(device, dtype)
    train(straight, AdamW(straight.parameters(), **options), 8)
    first = AdamW(net.parameters(), **options)
    train(net, first, 4)
    state = copy.deepcopy(first.state_dict())
    expected = {"step", "exp_avg", "exp_avg_sq"} | (
        {"master"} if master and dtype.itemsize == 2 else set()
    )
    assert set(state["state"][0]) == expected
    addresses = [entry["step"].data_ptr() for entry in state["state"].values()]
    assert len(set(addresses)) == len(addresses)  # safetensors refuses shared memory
    resumed = model(device, dtype)
    resumed.load_state_dict(net.state_dict())
    second = AdamW(resumed.parameters(), **options)
    second.load_state_dict(state)
    assert second.state[resumed[0].weight]["exp_avg"].dtype == torch.float32
    train(resumed, second, 4, first=4)
    assert same_bits(resumed, straight)
    again = copy.deepcopy(second)  # pickles keep options and state
    assert again.param_groups[0]["master"] == master


@pytest.mark.parametrize("device", DEVICES)
def test_masters_keep_what_bfloat16_would_lose(device):
    exact = model(device)
    net = model(device, torch.bfloat16)
    exact.load_state_dict(net.state_dict())
    plain = copy.deepcopy(net)
    options = {**OPTIONS, "lr": 1e-5}
    optimizers = [
        AdamW(exact.parameters(), **options),
        AdamW(net.parameters(), master=True, **options),
        AdamW(plain.parameters(), **options),
    ]
    for step in range(100):
        backward(exact, step)
        for other in (net, plain):
            for p, q in zip(other.parameters(), exact.parameters(), strict=True):
                p.grad = q.grad.bfloat16()
        for optimizer in optimizers:
            optimizer.step()
    weight = exact[0].weight
    error = lambda other: (other[0].weight - weight).norm()  # noqa: E731
    assert torch.equal(net[0].weight, optimizers[1].state[net[0].weight]["master"].bfloat16())
    assert error(net) < error(plain)
    torch.testing.assert_close(
        optimizers[1].state[net[0].weight]["master"], weight.detach(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_follows_torch_and_hands_over_its_coefficient(device):
    stock, scaled, handed = model(device), model(device), model(device)
    theirs = torch.optim.AdamW(stock.parameters(), **OPTIONS)
    in_place, handing = (AdamW(net.parameters(), **OPTIONS) for net in (scaled, handed))
    for step in range(5):
        for net in (stock, scaled, handed):
            backward(net, step, scale=100.0)
        before = [p.grad.clone() for p in handed.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.1)
        ours = clip_grad_norm(scaled.parameters(), 0.1)
        again = clip_grad_norm(handed.parameters(), 0.1, handing)
        if step == 0:
            torch.testing.assert_close(ours, norm)
        for p, q in zip(scaled.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-2 if step else 1e-5, atol=1e-4)
        assert torch.equal(ours, again)
        assert all(torch.equal(p.grad, g) for p, g in zip(handed.parameters(), before, strict=True))
        for optimizer in (theirs, in_place, handing):
            optimizer.step()
        assert same_bits(scaled, handed)
    train(scaled, in_place, 1)  # the coefficient served one step
    train(handed, handing, 1)
    assert same_bits(scaled, handed)
    assert clip_grad_norm([], 1.0) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler(device):
    """A scale is divided out on the way; a step that overflows changes nothing."""
    ours, plain = model(device), model(device)
    optimizer = AdamW(ours.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000)
    other = AdamW(plain.parameters(), **OPTIONS)
    for step in range(6):
        before = copy.deepcopy(ours)
        backward(ours, step, scale=scaler.get_scale())
        scaler.scale(torch.ones((), device=device))
        if step == 3:
            ours[0].weight.grad[0, 0] = float("inf")
        if step == 4:
            scaler.unscale_(optimizer)
            clip_grad_norm(ours.parameters(), 1e9, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert same_bits(ours, before) and scaler.get_scale() == 512.0
            assert optimizer.state[ours[0].weight]["step"].item() == 3
            continue
        backward(plain, step)
        other.step()
    assert_near(ours, plain)
    assert not hasattr(optimizer, "found_inf")


def test_closures_hooks_and_parameters_without_gradients():
    net = model()
    optimizer = AdamW(net.parameters(), **OPTIONS)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("stepped"))
    loss = optimizer.step(lambda: backward(net).requires_grad_())
    assert loss.item() > 0 and seen == ["stepped"]
    net.zero_grad()
    frozen = net[0].weight.clone()
    net[3].weight.grad = torch.ones_like(net[3].weight)
    optimizer.step()
    assert torch.equal(net[0].weight, frozen)
    steps = [optimizer.state[net[i].weight]["step"].item() for i in (0, 3)]
    assert steps == [1, 2]
    optimizer.zero_grad()
    optimizer.step()  # nothing to do
    empty = nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    AdamW([empty]).step()


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_of_states(device):
    net = model(device, torch.bfloat16)
    for wanted in (None, torch.bfloat16):
        optimizer = AdamW(net.parameters(), state_dtype=wanted)
        train(net, optimizer, 1)
        assert optimizer.state[net[0].weight]["exp_avg"].dtype == (wanted or torch.float32)
    wide = nn.Linear(3, 3, dtype=torch.float64)
    wide(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    optimizer = AdamW(wide.parameters())
    assert clip_grad_norm(wide.parameters(), 1.0).dtype == torch.float64
    optimizer.step()
    assert optimizer.state[wide.weight]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_a_learning_rate_in_a_tensor(device):
    ours, theirs = model(device), model(device)
    rate = torch.tensor(1e-2, device=device)
    optimizer = AdamW(ours.parameters(), **{**OPTIONS, "lr": rate})
    other = AdamW(theirs.parameters(), **{**OPTIONS, "lr": rate.item()})
    for step, value in enumerate((1e-2, 3e-3, 1e-4)):
        rate.fill_(value)
        other.param_groups[0]["lr"] = rate.item()
        train(ours, optimizer, 1, first=step)
        train(theirs, other, 1, first=step)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("device", ["cuda"] if torch.cuda.is_available() else [])
def test_a_captured_step_and_clip_replay(device):
    eager, captured = model(device), model(device)
    rate = torch.tensor(1e-2, device=device)
    optimizers = [AdamW(net.parameters(), **{**OPTIONS, "lr": rate}) for net in (eager, captured)]

    def step(net, optimizer):
        clip_grad_norm(net.parameters(), 0.01, optimizer)
        optimizer.step()

    for net, optimizer in zip((eager, captured), optimizers, strict=True):
        backward(net)
        step(net, optimizer)
    for p in captured.parameters():
        p.grad = p.grad.clone()  # of one address from here on
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, optimizers[1])
    for number in range(1, 4):
        rate.mul_(0.5)
        backward(eager, number)
        for p, q in zip(captured.parameters(), eager.parameters(), strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        step(eager, optimizers[0])
    assert same_bits(eager, captured)
    fresh = AdamW(model(device).parameters())
    fresh.param_groups[0]["params"][0].grad = torch.ones_like(next(iter(captured.parameters())))
    with (
        pytest.raises(RuntimeError, match="expected one step before a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fresh.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_devices():
    parameters = [nn.Parameter(torch.ones(5, device=f"cuda:{i}")) for i in (0, 1, 1)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW(parameters, **OPTIONS)
    norm = clip_grad_norm(parameters, 1.0, optimizer)
    torch.testing.assert_close(norm.item(), 15**0.5)
    optimizer.step()
    assert torch.equal(parameters[0].cpu(), parameters[2].cpu())


def test_dtensor_parameters(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        ours, plain = model(), model()
        for module in ours:
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])))
        optimizer, other = (AdamW(net.parameters(), **OPTIONS) for net in (ours, plain))
        for step in range(3):
            backward(plain, step)
            for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
                p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)])
            norms = [
                clip_grad_norm(net.parameters(), 0.01, o)
                for net, o in ((ours, optimizer), (plain, other))
            ]
            torch.testing.assert_close(*norms)
            optimizer.step()
            other.step()
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q)
        state = optimizer.state[ours[0].weight]
        assert isinstance(state["exp_avg"], DTensor) and not isinstance(state["step"], DTensor)
        clip_grad_norm(ours.parameters(), 1e-3)
        norm = ops.gradient_norm([p.grad.to_local() for p in ours.parameters()])
        torch.testing.assert_close(norm.item(), 1e-3, rtol=1e-3, atol=0)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        assert isinstance(optimizer.state[ours[0].weight]["exp_avg"], DTensor)
    finally:
        distributed.destroy_process_group()


def test_distributed_checkpoint_state_dicts():
    from torch.distributed.checkpoint import state_dict as checkpoint

    net = model()
    optimizer = AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 2)
    saved = copy.deepcopy(checkpoint.get_optimizer_state_dict(net, optimizer))
    fresh = AdamW(net.parameters(), lr=1.0)
    checkpoint.set_optimizer_state_dict(net, fresh, saved)
    assert fresh.param_groups[0]["lr"] == OPTIONS["lr"]
    twin = copy.deepcopy(net)
    train(net, optimizer, 1, first=2)
    restored = AdamW(twin.parameters())
    restored.load_state_dict(fresh.state_dict())
    train(twin, restored, 1, first=2)
    assert same_bits(net, twin)


def test_bad_arguments():
    net = model()
    for options, message in [
        ({"lr": -1.0}, "AdamW: lr: expected 0 or more, not -1.0"),
        ({"eps": -1.0}, "AdamW: eps: expected 0 or more, not -1.0"),
        ({"weight_decay": -1.0}, "AdamW: weight_decay: expected 0 or more, not -1.0"),
        ({"betas": (0.9, 1.0)}, r"AdamW: betas: expected two values of \[0, 1\), not"),
        ({"lr": torch.ones(2)}, r"AdamW: lr: expected one element, not \(2,\)"),
        ({"amsgrad": True}, "AdamW: amsgrad: expected False, it is not built"),
        ({"maximize": True}, "AdamW: maximize: expected False, it is not built"),
        ({"state_dtype": torch.float16}, "AdamW: state_dtype: expected torch.float32 or"),
    ]:
        with pytest.raises(ValueError, match=message):
            AdamW(net.parameters(), **options)
    with pytest.raises(TypeError, match="AdamW: nesterov: no such option"):
        AdamW(net.parameters(), nesterov=True)
    AdamW(net.parameters(), fused=True, foreach=None, capturable=True)  # mean nothing here
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    for refuses in (AdamW(sparse.parameters()).step, lambda: clip_grad_norm(sparse.weight, 1.0)):
        with pytest.raises(
            RuntimeError, match=r"gradients: expected a dense tensor, not torch\.spar"
        ):
            refuses()
    backward(net)
    optimizer = AdamW(net.parameters())
    with pytest.raises(ValueError, match="clip_grad_norm: parameters: expected those of the opt"):
        clip_grad_norm(list(net.parameters())[:2], 1.0, optimizer)
    momentum = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    momentum.step()
    with pytest.raises((ValueError, KeyError), match=r"expected exp_avg|betas"):
        optimizer.load_state_dict(momentum.state_dict())
    stock = torch.optim.AdamW(net.parameters(), amsgrad=True)
    stock.step()
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        optimizer.load_state_dict(stock.state_dict())
    adam = torch.optim.Adam(net.parameters(), weight_decay=0.1)
    adam.step()
    before = optimizer.param_groups[0]["weight_decay"]
    with pytest.raises(
        ValueError, match=r"state: expected one of an AdamW, not of torch\.optim\.A"
    ):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["weight_decay"] == before
