"""fused_linear_cross_entropy: what the laws ask of it, its memory, and what it refuses."""

import pytest
import torch

import contract
from cases import DEVICES
from head_cases import CHUNKED, OPTIONS, THREE, call, draw, leaves_of, modes, products, truth_of
from redline import ops
from redline.dyno.measure import profiled, quiet_profiler, saved_bytes
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)


def test_gradcheck(device):
    if device == "cuda":
        pytest.skip("float64 is the CPU's")
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors, targets = draw((4, 3, 6), torch.float64, device)
    leaves = leaves_of(tensors)
    targets[2] = -100
    for reduction in ("mean", "sum", "none"):
        for options in OPTIONS.values():
            for scale in (None,) if reduction == "none" else (None, 1.0):
                options = options | {"loss_scale": scale}
                assert torch.autograd.gradcheck(
                    lambda *given, r=reduction, o=options: call(given, targets, r, **o), leaves
                )


def test_opcheck(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors, targets = draw((6, 4, 9), torch.float32, device)
    (x, weight, bias), registered = leaves_of(tensors), torch.ops.redline
    one = torch.ones((), device=device)
    public = registered.fused_linear_cross_entropy.default
    main_grad = torch.zeros_like(weight)
    for options in ({}, {"loss_scale": one}, {"main_grad": main_grad}):
        contract.passes_opcheck(public, (x, weight, targets, bias), options)
    contract.passes_opcheck(public, (x, weight, targets, None, "none", -100, 0.1, 1e-3, 5.0))
    x, weight, bias = tensors
    head = (x, weight, bias, targets, "mean", -100, 0.1, 1e-3, 5.0)
    forward = registered.fused_linear_cross_entropy_forward
    _, statistics, count = forward(*head)
    backward = (one, *head, statistics, count, [True, True, True])
    checks = {
        "forward": [(head, {})],
        "backward": [(backward, {}), (backward, {"main_grad": main_grad})],
        "promise": [((one, *head, [True, False, True]), {})],
        "fulfil": [
            ((weight, one, one, torch.bfloat16), {}),
            ((weight, one, one, torch.float32), {"main_grad": main_grad, "accumulate": False}),
        ],
        "fulfil_inplace": [((weight, one, one), {})],
    }
    for name, given in checks.items():
        for arguments, options in given:
            op = getattr(registered, f"fused_linear_cross_entropy_{name}").default
            contract.passes_opcheck(op, arguments, options, inner=True)


@modes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tracing(reduction, promised, device):
    (x, weight, _), _ = draw((6, 5, 40), torch.float32, device)
    inputs = [x, weight, torch.arange(6, device=device)]

    def function(x, w, t, scale=1.0 if promised else None):
        loss = ops.fused_linear_cross_entropy(x, w, t, None, reduction, -100, 0.1, loss_scale=scale)
        return loss.sum()  # so that the upstream gradient of each token is that of the sum

    # The upstream gradient that contract.gradients draws for a scalar.
    drawn = torch.randn((), generator=torch.Generator().manual_seed(7)).item()

    def scaled(x, w, t):
        return function(x, w, t, drawn if promised else None)

    contract.compiles(scaled, inputs)
    contract.compiles_dynamic(scaled, inputs)
    contract.exports(function, inputs)
    contract.runs_in_inference_mode(function, inputs)
    contract.refuses_vmap(function, inputs)
    contract.runs_under_compiled_autograd(lambda x, w: scaled(x, w, inputs[2]), inputs[:2])
    if not promised:
        contract.refuses_double_backward(lambda x, w: function(x, w, inputs[2]), inputs[:2])
    if device == "cuda" and (reduction == "mean" or not promised):
        contract.captures(function, inputs)
        contract.agrees_on_side_stream(function, inputs)


def test_compiles_in_16_bits(device):
    """Where sizes are symbols the weight's gradient is kept in float32: not eager's bits, and as
    near to float64 within a rounding each."""
    (x, weight, _), targets = draw((6, 5, 40), torch.bfloat16, device)

    def function(x, w, t):
        return ops.fused_linear_cross_entropy(x, w, t, loss_scale=1.0)

    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        ours = contract.gradients(compiled, [x, weight, targets])
        stock = contract.gradients(function, [x, weight, targets], ours[2])
        if not dynamic:
            contract.equal_bits(ours[0] + ours[1], stock[0] + stock[1])
        for a, b in zip(ours[0] + ours[1], stock[0] + stock[1], strict=True):
            assert_close(a.cpu(), b.double().cpu(), roundings=2)


@modes
def test_compiles_with_main_grad(promised, device):
    tensors, targets = draw((9, 32, 256), torch.float32, device)
    main_grad, scale = torch.zeros(256, 32, device=device), 1.0 if promised else None
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        leaves = leaves_of(tensors)
        compiled(leaves, targets, loss_scale=scale, main_grad=main_grad).backward()
        assert leaves[1].grad is None
    _, (_, truth, _) = truth_of(tensors, targets, torch.full((9,), 2 / 9, device=device), {})
    assert_close(main_grad.cpu(), truth, sums=16)


def test_nothing_is_read_back(device):
    if device == "cpu":
        pytest.skip("there is no device to wait for")
    tensors, targets = draw((9, 32, 256), torch.bfloat16, device)
    leaves = leaves_of(tensors)

    def step(promise, reduction):
        call(leaves, targets, reduction, loss_scale=promise).sum().backward()

    cases = [(promise, reduction) for promise in (None, 1.0) for reduction in ("mean", "none")]
    for case in cases:
        step(*case)  # a library's first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case in cases:
            step(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@modes
def test_autocast_is_the_rule_of_the_stock_product(promised, device):
    tensors, targets = draw((9, 32, 256), torch.float32, device)
    leaves, scale = leaves_of(tensors), 1.0 if promised else None
    with torch.autocast(device, torch.bfloat16):
        loss = call(leaves, targets, loss_scale=scale)
        mixed = call((tensors[0].bfloat16(), *tensors[1:]), targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, mixed)
    assert torch.equal(loss, call([tensor.bfloat16() for tensor in tensors], targets))
    assert {grad.dtype for grad in torch.autograd.grad(loss, leaves)} == {torch.float32}


def test_targets_out_of_range(device):
    tensors, targets = draw((6, 4, 9), torch.float32, device)
    targets[2] = 9
    leaves = leaves_of(tensors)
    if device == "cpu":
        with pytest.raises(
            RuntimeError,
            match=r"fused_linear_cross_entropy: targets: expected classes of \[0, 9\) or "
            r"ignore_index -100, not 9 in row 2",
        ):
            call(leaves, targets)
        return
    loss = call(leaves, targets, "none")
    assert loss.isnan().tolist() == [row == 2 for row in range(6)]
    assert torch.autograd.grad(loss.sum(), leaves)[0].isnan().all(-1).tolist() == [
        row == 2 for row in range(6)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 5)}, r"x: expected a last dimension of 3, not 5"),
        ({"x": ()}, r"x: expected at least one dimension, not a scalar"),
        ({"x": torch.long}, r"x: expected a floating dtype, not Long"),
        ({"weight": (3,)}, r"weight: expected \[out, in\], not a rank of 1"),
        ({"weight": (0, 3), "bias": None}, r"weight: expected at least one class, not \[0, 3\]"),
        ({"weight": torch.bfloat16}, r"weight: expected Float as x has, not BFloat16"),
        ({"bias": (4,)}, r"bias: expected \[8\], not \[4\]"),
        ({"bias": torch.bfloat16}, r"bias: expected Float as weight has, not BFloat16"),
        ({"targets": (3,)}, r"targets: expected \[4\], not \[3\]"),
        ({"targets": torch.float32}, r"targets: expected classes as int64 or int32, not Float"),
        ({"reduction": "average"}, r"reduction: expected none, mean or sum, not average"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number of \[0, 1\], not 1.5"),
        ({"z_loss": -1.0}, r"z_loss: expected a finite number of 0 or more, not -1"),
        ({"z_loss": float("nan")}, r"z_loss: expected a finite number of 0 or more, not"),
        ({"logit_softcap": 0.0}, r"logit_softcap: expected more than 0, not 0"),
        ({"loss_scale": (4,)}, r"loss_scale: expected a scalar, not \[4\]"),
        (
            {"loss_scale": (3,), "reduction": "none"},
            r"loss_scale: expected a scalar, or one number per target, not \[3\]",
        ),
        ({"loss_scale": torch.long}, r"loss_scale: expected a floating dtype, not Long"),
        ({"main_grad": (3, 8)}, r"main_grad: expected \[8, 3\], not \[3, 8\]"),
        ({"main_grad": torch.long}, r"main_grad: expected a floating dtype, not Long"),
        ({"dummy_grad": "ones"}, r"dummy_grad: expected none, empty or zeros, not ones"),
        ({"tp_group": "tp"}, r"tp_group: expected none, not tp; products over more ranks are not"),
        ({"sequence_parallel": True}, r"sequence_parallel: expected false; products over more"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(change, message, device):
    shapes = {"x": (4, 3), "weight": (8, 3), "bias": (8,), "targets": (4,)}
    shapes |= {"loss_scale": (), "main_grad": (8, 3)} if change.keys() & {"loss_scale"} else {}
    shapes |= {"main_grad": (8, 3)} if "main_grad" in change else {}
    dtypes_of = {"targets": torch.long}
    given = {}
    for name, value in (shapes | change).items():
        if isinstance(value, torch.dtype):
            given[name] = torch.zeros(shapes[name], dtype=value, device=device)
        elif isinstance(value, tuple):
            given[name] = torch.zeros(value, dtype=dtypes_of.get(name), device=device)
        else:
            given[name] = value
    with pytest.raises(RuntimeError, match="fused_linear_cross_entropy: " + message):
        ops.fused_linear_cross_entropy(**given)
    if device == "cuda":
        given = {"targets": torch.zeros(4, dtype=torch.long)}
        with pytest.raises(RuntimeError, match="targets: expected a tensor on cuda:0, not on cpu"):
            ops.fused_linear_cross_entropy(*(torch.zeros(4, 4, device=device),) * 2, **given)


# --- docs/memory.md -------------------------------------------------------------------------------


def padded(count):
    return -(-count // 128) * 128


def chunk_of(count, width, size, device, third=False):
    """docs/memory.md's c(n, w), or d(n, w)."""
    parts, most = (3, 3 * 2**28) if third and device != "cpu" else (4, 2**29)
    least, total = (16 if device == "cpu" else 64) * 2**20, count * width * size
    chunks = -(-total // min(max(-(-total // parts), least), most))
    chunk = -(-count // chunks)
    if chunk < 128:
        return chunk
    return min(count, padded(chunk) if padded(chunk) * width * size <= most else chunk // 128 * 128)


def kept_size(case, size, device, with_main_grad=False):
    """docs/memory.md's k: bytes of an element of the weight's gradient that a promise keeps."""
    tokens, _, vocabulary = case
    room = 3 * (16 * 2**20 if device == "cpu" else 3 * 2**28)
    few = (tokens + 384) * vocabulary * size <= room
    chunks = -(-tokens // chunk_of(tokens, vocabulary, size, device, third=True))
    assert not few or chunks <= 3
    return size if few and not with_main_grad else 4


def expected_bytes(case, size, device, promised):
    """(kept, at most beside the gradients) without a bias."""
    tokens, hidden, vocabulary = case
    buffer = chunk_of(tokens, vocabulary, size, device, promised) * padded(vocabulary) * size
    statistics = 12 * tokens + 4
    if promised:
        kept = kept_size(case, size, device) * vocabulary * hidden
        return kept + size * tokens * hidden, buffer + statistics
    slice_ = chunk_of(vocabulary, tokens, size, device)
    sums = 4 * tokens * hidden if size < 4 and slice_ < vocabulary else 0
    return statistics, max(buffer, tokens * padded(slice_) * size + sums) + statistics


@modes
def test_bytes_kept_and_at_most(promised, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case, size, scale = CHUNKED[device], dtype.itemsize, 1.0 if promised else None
    tensors, targets = draw(case, dtype, device, with_bias=False)
    leaves = leaves_of(tensors)
    kept, at_most = expected_bytes(case, size, device, promised)
    measured = saved_bytes(lambda: call(leaves, targets, loss_scale=scale), [*leaves, targets])
    assert measured == kept + (4 if promised else 0)  # the scale
    gradients = kept if promised else sum(leaf.nbytes for leaf in leaves)  # kept ones are given

    def step():
        return torch.autograd.grad(call(leaves, targets, loss_scale=scale), leaves)

    step()
    with quiet_profiler():
        peak = profiled(step, torch.device(device)).peak_bytes
    workspace = 2**16 if device == "cpu" else 2**26  # cuBLASLt's is torch's allocator's
    assert peak - gradients <= at_most + workspace
    assert promised or peak - gradients > 0.9 * at_most
    assert at_most < (0.6 if device == "cpu" else 0.7) * case[0] * case[2] * size


# (tokens, hidden, vocabulary) in bfloat16, and whether the weight's gradient stays in float32: of
# one chunk, two, three and four. More than three are too many logits for a test on CUDA.
KEPT = [((9, 32, 256), False), (CHUNKED, False), (THREE, False), ({"cpu": (3000, 8, 9001)}, True)]


@pytest.mark.parametrize(("case", "is_wide"), KEPT, ids=["one", "two", "three", "four"])
@pytest.mark.parametrize("with_main_grad", [False, True], ids=["grad", "main_grad"])
def test_bytes_of_the_weights_gradient(with_main_grad, case, is_wide, device):
    if isinstance(case, dict) and device not in case:
        pytest.skip("too many logits")
    tokens, hidden, vocabulary = case = case[device] if isinstance(case, dict) else case
    size = kept_size(case, 2, device, with_main_grad)
    assert size == (4 if is_wide or with_main_grad else 2)
    tensors, targets = draw(case, torch.bfloat16, device, with_bias=False)
    leaves = leaves_of(tensors)
    options = {"main_grad": torch.zeros_like(leaves[1])} if with_main_grad else {}
    measured = saved_bytes(
        lambda: call(leaves, targets, loss_scale=1.0, **options), [*leaves, *options.values()]
    )
    assert measured == size * vocabulary * hidden + 2 * tokens * hidden + 4


HEAD = (8192, 4096, 128256)


def test_chunks_are_as_many_as_the_share_says(device):
    """A quarter of these tokens, and of these classes, is no whole number of lines."""
    tokens, hidden, vocabulary = 2049, 4, 8193
    tensors, targets = draw((tokens, hidden, vocabulary), torch.float32, device, with_bias=False)

    def count(scale):
        leaves = leaves_of(tensors)
        return products(lambda: call(leaves, targets, loss_scale=scale).backward())[1]

    chunk, slice_ = (chunk_of(*n, 4, device) for n in ((tokens, vocabulary), (vocabulary, tokens)))
    promised = chunk_of(tokens, vocabulary, 4, device, third=True)
    assert count(None) == -(-tokens // chunk) + 3 * -(-vocabulary // slice_)
    assert count(1.0) == 3 * -(-tokens // promised)
    assert device == "cuda" or (count(None), count(1.0)) == (16, 12)


def test_less_than_a_gigabyte_beside_the_gradients(device):
    for promised in (False, True):
        assert expected_bytes(HEAD, 2, device, promised)[1] < 1e9
    if device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 40e9:
        return
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, weight = (
        torch.randn(size, HEAD[1], device=device, dtype=torch.bfloat16, requires_grad=True)
        for size in (HEAD[0], HEAD[2])
    )
    targets = torch.randint(HEAD[2], HEAD[:1], device=device)

    def step():
        return torch.autograd.grad(ops.fused_linear_cross_entropy(x, weight, targets), (x, weight))

    step()
    peak = profiled(step, torch.device(device)).peak_bytes
    assert peak - x.nbytes - weight.nbytes < 1e9
