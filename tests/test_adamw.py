# Over budget: function: one table of bad arguments and their messages.
"""adamw_step against float64: many steps, every mixture of dtypes, any size and place in memory."""

import itertools

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn
from redline import ops
from tolerance import UNIT_ROUNDOFF, assert_close, relative_error

SHAPES = [(1,), (3, 7), (255,), (1024,), (0, 5), (4097,), (2, 8192), (33, 1000), ()]
BATCHED = [(3,)] * 600  # more tensors than one launch holds
OPTIONS = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


def lists(shapes, dtype, device, *, gradient=None, average=torch.float32, master=False, seed=0):
    """The six lists of adamw_step, and the parameters to start from."""
    parameters = [
        randn(*s, dtype=dtype, device=device, seed=seed + i) for i, s in enumerate(shapes)
    ]
    gradients = [
        randn(*s, dtype=gradient or dtype, device=device, seed=seed + 50 + i, scale=0.1)
        for i, s in enumerate(shapes)
    ]
    averages = [[torch.zeros_like(p, dtype=average) for p in parameters] for _ in range(2)]
    masters = [p.float() for p in parameters] if master else []
    steps = [torch.zeros((), device=device) for _ in parameters]
    return [parameters, gradients, *averages, masters, steps]


def rate(device, value=1e-2):
    return torch.tensor(value, dtype=torch.float64, device=device)


def copied(columns):
    return [[tensor.clone() for tensor in column] for column in columns]


def truth(columns, count, lr=1e-2, scale=1.0):
    """(p, m, v) of each parameter after `count` steps with the same gradient, in float64."""
    results = []
    for p, g in zip(columns[0], columns[1], strict=True):
        state = (
            p.cpu().double(),
            torch.zeros_like(p.cpu().double()),
            torch.zeros_like(p.cpu().double()),
        )
        for t in range(1, count + 1):
            state = reference.adamw_step(state, g.cpu().double() * scale, t, lr, **OPTIONS)
        results.append(state)
    return results


def same(first, second):
    flat = itertools.chain.from_iterable
    return all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", [SHAPES, BATCHED], ids=["shapes", "batches"])
def test_one_step(shapes, device):
    columns = lists(shapes, torch.float32, device)
    expected = truth(columns, 1)
    ops.adamw_step(*columns, learning_rate=rate(device), **OPTIONS)
    for i, (p, m, v) in enumerate(expected):
        assert_close(columns[0][i].cpu(), p, roundings=2, what="parameter")
        assert_close(columns[2][i].cpu(), m, roundings=3, what="exp_avg")
        assert_close(columns[3][i].cpu(), v, roundings=4, what="exp_avg_sq")
        assert columns[5][i].item() == 1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16], ids=["m32", "m16"])
@pytest.mark.parametrize("gradient", DTYPES.values(), ids=[f"g-{name}" for name in DTYPES])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mixtures_of_dtypes(dtype, gradient, average, device):
    """Each output is what float32 gives, rounded once to its own dtype."""
    half = dtype != torch.float32
    for master in (False, True) if half else (False,):
        columns = lists(
            [(33,), (5000,)], dtype, device, gradient=gradient, average=average, master=master
        )
        for average_list in columns[2:4]:
            for tensor in average_list:
                tensor.copy_(torch.rand_like(tensor, dtype=torch.float32))
        start = copied(columns)
        ops.adamw_step(*columns, learning_rate=rate(device), **OPTIONS)
        for i in range(2):
            state = [start[k][i].cpu().double() for k in (0, 2, 3)]
            p, m, v = reference.adamw_step(state, start[1][i].cpu().double(), 1, 1e-2, **OPTIONS)
            assert_close(columns[2][i].cpu(), m, roundings=1, sums=4)
            assert_close(columns[3][i].cpu(), v, roundings=1, sums=4)
            assert_close(columns[0][i].cpu(), p, roundings=1, sums=4)
            if master:
                assert_close(columns[4][i].cpu(), p, roundings=2)
                assert torch.equal(columns[0][i], columns[4][i].to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_error_over_many_steps_is_at_most_twice_stocks(device):
    shape = (3000,)
    columns = lists([shape], torch.float32, device)
    leaf = columns[0][0].clone().requires_grad_()
    theirs = torch.optim.AdamW([leaf], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    state = [columns[0][0].cpu().double(), torch.zeros(shape).double(), torch.zeros(shape).double()]
    generator = torch.Generator().manual_seed(3)
    for t in range(1, 301):
        gradient = torch.randn(shape, generator=generator)
        columns[1][0] = gradient.to(device)
        leaf.grad = gradient.to(device)
        ops.adamw_step(*columns, learning_rate=rate(device), **OPTIONS)
        theirs.step()
        state = reference.adamw_step(state, gradient.double(), t, 1e-2, **OPTIONS)
    stock = theirs.state[leaf]
    for ours, other, exact in zip(
        (columns[0][0], columns[2][0], columns[3][0]),
        (leaf, stock["exp_avg"], stock["exp_avg_sq"]),
        state,
        strict=True,
    ):
        error = relative_error(ours.cpu(), exact)
        bound = 2 * relative_error(other.detach().cpu(), exact)
        assert error <= max(bound, UNIT_ROUNDOFF[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_do_not_depend_on_place_strides_or_threads(dtype, device):
    columns = lists([(40, 999), (70000,)], dtype, device)
    starts = copied(columns), copied(columns), copied(columns), copied(columns)
    ops.adamw_step(*columns, learning_rate=rate(device), **OPTIONS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ops.adamw_step(*starts[0], learning_rate=rate(device), **OPTIONS)
    torch.set_num_threads(threads)
    assert same(columns, starts[0])

    def shifted(tensor):  # the first element lies one element behind an aligned address
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        room[1:] = tensor.flatten()
        return room[1:].view(tensor.shape)

    moved = [[shifted(t) for t in column] for column in starts[1]]
    ops.adamw_step(*moved, learning_rate=rate(device), **OPTIONS)
    assert same(columns, moved)

    def gapped(tensor):
        room = torch.empty(*tensor.shape, 2, dtype=tensor.dtype, device=device)
        room[..., 0] = tensor
        return room[..., 0]

    spread = [[gapped(t) for t in column] for column in starts[2][:5]] + starts[2][5:]
    ops.adamw_step(*spread, learning_rate=rate(device), **OPTIONS)
    assert same(columns, spread)

    turned = starts[3]
    turned[0][0] = turned[0][0].t().contiguous().t()  # the rest stays in rows
    ops.adamw_step(*turned, learning_rate=rate(device), **OPTIONS)
    assert same(columns, turned)


@pytest.mark.parametrize("device", DEVICES)
def test_scalars_on_the_device(device):
    start = lists([(5, 40)], torch.float32, device)
    scalar = lambda value: torch.tensor(value, device=device)  # noqa: E731
    scaled, clipped, by_hand, skipped = (copied(start) for _ in range(4))
    ops.adamw_step(
        *scaled, learning_rate=rate(device), grad_scale=scalar(64.0), found_inf=scalar(0.0)
    )
    for gradient in by_hand[1]:
        gradient.mul_(1 / 64)
    ops.adamw_step(*by_hand, learning_rate=rate(device))
    assert same([scaled[0], *scaled[2:]], [by_hand[0], *by_hand[2:]])
    assert torch.equal(scaled[1][0], start[1][0])  # gradients are never written

    coefficient = scalar(0.3)
    ops.adamw_step(*clipped, learning_rate=rate(device), clip_coefficient=coefficient)
    rewritten = copied(start)
    ops.scale_gradients(rewritten[1], coefficient)
    ops.adamw_step(*rewritten, learning_rate=rate(device))
    assert same([clipped[0], *clipped[2:]], [rewritten[0], *rewritten[2:]])

    ops.adamw_step(*skipped, learning_rate=rate(device), found_inf=scalar(1.0))
    assert same(skipped, start)
    narrow, wide = copied(start), copied(start)
    ops.adamw_step(*narrow, learning_rate=scalar(0.0078125))
    ops.adamw_step(*wide, learning_rate=rate(device, 0.0078125))
    assert same(narrow, wide)


@pytest.mark.parametrize("device", DEVICES)
def test_each_parameter_counts_its_own_steps(device):
    columns = lists([(6,), (6,), (0,)], torch.float32, device)
    columns[5][1].fill_(9)
    expected = truth(columns, 1)
    p, g = columns[0][1].cpu().double(), columns[1][1].cpu().double()
    zeros = torch.zeros_like(p)
    late = reference.adamw_step((p, zeros, zeros), g, 10, 1e-2, **OPTIONS)
    ops.adamw_step(*columns, learning_rate=rate(device), **OPTIONS)
    assert_close(columns[0][0].cpu(), expected[0][0], roundings=2)
    assert_close(columns[0][1].cpu(), late[0], roundings=2)
    assert [step.item() for step in columns[5]] == [1.0, 10.0, 1.0]


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_gradients_follow_stock(device):
    values = torch.tensor([0.0, 1e-30, 1e30, float("inf"), float("nan"), -1e-8], device=device)
    columns = lists([(6,)], torch.float32, device)
    columns[1][0].copy_(values)
    leaf = columns[0][0].clone().requires_grad_()
    leaf.grad = values.clone()
    torch.optim.AdamW([leaf], lr=1e-2).step()
    ops.adamw_step(*columns, learning_rate=rate(device))
    assert torch.equal(columns[0][0].isfinite(), leaf.isfinite())
    finite = leaf.isfinite()
    torch.testing.assert_close(columns[0][0][finite], leaf.detach()[finite])


def test_float64_on_the_cpu():
    columns = lists([(33,)], torch.float64, "cpu", average=torch.float64)
    expected = truth(columns, 3)
    for _ in range(3):
        ops.adamw_step(*columns, learning_rate=rate("cpu"), **OPTIONS)
    assert_close(columns[0][0], expected[0][0], roundings=4)


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    columns = lists([(4, 3), (5,)], torch.bfloat16, device, master=True)
    options = {"learning_rate": rate(device), **OPTIONS}
    contract.passes_opcheck(torch.ops.redline.adamw_step, tuple(columns), options, inner=True)
    versions = [tensor._version for tensor in columns[0]]
    ops.adamw_step(*columns, **options)
    assert [tensor._version for tensor in columns[0]] == [version + 1 for version in versions]


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    start = lists([(4, 3), (5,)], torch.float32, device)
    eager, traced = copied(start), copied(start)
    learning_rate = rate(device)

    def step(*columns):
        ops.adamw_step(*columns, learning_rate=learning_rate, **OPTIONS)

    step(*eager)
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    assert same(eager, traced)


@pytest.mark.parametrize("device", ["cuda"] if torch.cuda.is_available() else [])
def test_a_captured_step_replays(device):
    start = lists(SHAPES, torch.float32, device)
    eager, replayed = copied(start), copied(start)
    learning_rate, coefficient = rate(device), torch.ones((), device=device)
    scalars = {"learning_rate": learning_rate, "clip_coefficient": coefficient}
    warm = copied(start)
    ops.adamw_step(*warm, **scalars)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adamw_step(*replayed, **scalars)
    for value in (1e-2, 3e-3, 1e-4):
        learning_rate.fill_(value)
        coefficient.mul_(0.5)
        graph.replay()
        ops.adamw_step(*eager, **scalars)
    assert same(eager, replayed)


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    def refused(message, change=None, **options):
        columns = lists([(4,), (2, 3)], torch.float32, device)
        if change:
            change(columns)
        with pytest.raises(RuntimeError, match=message):
            ops.adamw_step(*columns, **{"learning_rate": rate(device), **options})

    refused(
        "adamw_step: gradients: expected 2 tensors, one for each parameter, not 1",
        lambda columns: columns[1].pop(),
    )
    refused(
        r"adamw_step: exp_avgs\[1\]: expected \[2, 3\], not \[6\]",
        lambda columns: columns[2].__setitem__(1, torch.zeros(6, device=device)),
    )
    refused(
        "adamw_step: exp_avgs: expected float32 or bfloat16 beside a parameter in float32, "
        "not float16",
        lambda columns: [column.__setitem__(0, column[0].half()) for column in columns[2:4]],
    )
    refused(
        r"adamw_step: exp_avg_sqs\[0\]: expected Float as in exp_avgs, not BFloat16",
        lambda columns: columns[3].__setitem__(0, columns[3][0].bfloat16()),
    )
    refused(
        "adamw_step: gradients: expected a dtype that goes with a parameter in float32, "
        "not float64",
        lambda columns: columns[1].__setitem__(0, columns[1][0].double()),
    )
    refused(
        "adamw_step: masters: expected none beside a parameter in float32",
        lambda columns: columns[4].extend(p.clone() for p in columns[0]),
    )
    refused(
        r"adamw_step: steps\[1\]: expected one Float on",
        lambda columns: columns[5].__setitem__(1, torch.zeros(2, device=device)),
    )
    refused(
        "a leaf Variable that requires grad is being used in an in-place",
        lambda columns: columns[0][0].requires_grad_(),
    )
    refused("adamw_step: beta1: expected a value of", beta1=1.0)
    refused("adamw_step: epsilon: expected 0 or more, not -1", epsilon=-1.0)
    refused(
        "adamw_step: learning_rate: expected one float32 or float64",
        learning_rate=torch.tensor(1, device=device),
    )
    refused(
        "adamw_step: found_inf: expected one float32, not",
        found_inf=torch.zeros(2, device=device),
    )
