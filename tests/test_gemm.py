"""gemm: against float64 in every layout, each epilogue, sums into a buffer, and what it refuses."""

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from tolerance import UNIT_ROUNDOFF, assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)

gemm, gemm_gelu = torch.ops.redline.gemm, torch.ops.redline.gemm_gelu
gemm_into = torch.ops.redline.gemm_into

# (batch, M, N, K): one, odd, empty in each place, over a tile, whole vectors.
CASES = [
    ((), 1, 1, 1),
    ((), 3, 5, 7),
    ((), 1, 129, 33),
    ((), 64, 1, 40),
    ((), 130, 67, 257),
    ((), 64, 128, 96),
    ((), 0, 4, 5),
    ((), 4, 0, 5),
    ((), 4, 5, 0),
    ((3,), 5, 8, 16),
    ((2,), 65, 33, 9),
    ((0,), 4, 4, 4),
]
EPILOGUES = ["none", "bias", "gelu", "gelu bias", "gelu_grad"]
BUFFERS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "x".join(map(str, (*case[0], *case[1:])))
)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
epilogues = pytest.mark.parametrize("epilogue", EPILOGUES)


def factors(case, dtype, device):
    batch, m, n, k = case
    a = randn(*batch, m, k, dtype=dtype, device=device)
    return a, randn(*batch, k, n, dtype=dtype, device=device, seed=1)


def beside(epilogue, a, b, dtype):
    """The keyword arguments of an epilogue."""
    kind, device = epilogue.split()[0], a.device
    given = {} if kind == "bias" else {"epilogue": kind}
    if "bias" in epilogue:
        given["bias"] = randn(b.shape[-1], dtype=dtype, device=device, seed=2)
    if kind == "gelu_grad":
        shape = (*a.shape[:-1], b.shape[-1])
        given["pre_activation"] = randn(*shape, dtype=dtype, device=device, seed=3)
    return given


def truth_of(a, b, bias=None, epilogue="none", pre_activation=None):
    a, b, bias, pre = wide(a, b, bias, pre_activation)
    y = a @ b if bias is None else a @ b + bias
    if epilogue == "gelu":
        return reference.activation(y)
    if epilogue == "gelu_grad":
        return torch.autograd.grad(reference.activation(pre), pre, y)[0]
    return y


@cases
@dtypes
@epilogues
def test_forward(case, dtype, epilogue, device):
    a, b = factors(case, dtype, device)
    given = beside(epilogue, a, b, dtype)
    out = gemm(a, b, **given)
    assert out.dtype == dtype and out.is_contiguous()
    stock = None
    if epilogue != "gelu_grad":
        stock = (a @ b + given["bias"] if "bias" in given else a @ b).cpu()
        stock = torch.nn.functional.gelu(stock, approximate="tanh") if "gelu" in epilogue else stock
    # Where the epilogue is a step of its own, the product is rounded before it; sums of up to 257.
    assert_close(out.cpu(), truth_of(a, b, **given), dtype, roundings=2, sums=24, stock=stock)


@cases
@epilogues
def test_16_bit_factors_give_float32(case, epilogue, device):
    a, b = factors(case, torch.bfloat16, device)
    given = beside(epilogue, a, b, torch.float32)
    out = gemm(a, b, out_dtype=torch.float32, **given)
    assert out.dtype == torch.float32
    assert_close(out.cpu(), truth_of(a, b, **given), torch.float32, sums=64)


@cases
@dtypes
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_gelu_keeps_what_it_was_applied_to(case, dtype, with_bias, device):
    a, b = factors(case, dtype, device)
    bias = randn(b.shape[-1], dtype=dtype, device=device, seed=2) if with_bias else None
    out, pre = gemm_gelu(a, b, bias=bias)
    truth = truth_of(a, b, bias)
    assert_close(pre.cpu(), truth, dtype, roundings=2, sums=24, what="pre_activation")
    assert_close(out.cpu(), reference.activation(truth), dtype, roundings=2, sums=24)


def layouts(tensor):
    """The same numbers: contiguous, a transposed view, rows apart, and neither rows nor columns
    adjacent."""
    columns = tensor.mT.clone(memory_format=torch.contiguous_format).mT
    apart = tensor.new_empty(*tensor.shape, 2)[..., 0]
    apart.copy_(tensor)
    return {
        "rows": tensor.clone(),
        "columns": columns,
        "gaps": strided(tensor),
        "columns with gaps": strided(columns.mT).mT,
        "apart": apart,
    }


@pytest.mark.parametrize("case", [((), 24, 40, 56), ((), 5, 7, 9), ((3,), 6, 8, 10)], ids=str)
@dtypes
@pytest.mark.parametrize("epilogue", ["bias", "gelu_grad"])
def test_every_layout(case, dtype, epilogue, device):
    a, b = factors(case, dtype, device)
    given = beside(epilogue, a, b, dtype)
    truth = truth_of(a, b, **given)
    for left, a_view in layouts(a).items():
        for right, b_view in layouts(b).items():
            out = gemm(a_view, b_view, **given)
            assert_close(
                out.cpu(), truth, dtype, roundings=2, sums=24, what=f"a in {left}, b in {right}"
            )


def test_a_shared_factor_and_strided_vectors(device):
    a, b = factors(((3,), 6, 8, 16), torch.float32, device)
    shared, bias = b[:1].expand(3, 16, 8), strided(randn(8, dtype=a.dtype, device=device)[None])[0]
    assert_close(gemm(a, shared, bias=bias).cpu(), truth_of(a, shared, bias), sums=24)
    one = torch.ones(1, 1, device=device).expand(6, 16)  # strides of 0, as sum().backward() gives
    assert_close(gemm(one, b[0]).cpu(), truth_of(one, b[0]), sums=24)


@cases
@dtypes
@pytest.mark.parametrize("buffer_dtype", BUFFERS.values(), ids=BUFFERS)
@pytest.mark.parametrize("accumulate", [True, False], ids=["adds", "overwrites"])
def test_into_a_buffer(case, dtype, buffer_dtype, accumulate, device):
    a, b = factors(case, dtype, device)
    shape = (*a.shape[:-1], b.shape[-1])
    before = randn(*shape, dtype=buffer_dtype, device=device, seed=9)
    truth = truth_of(a, b)
    truth = truth + before.double().cpu() if accumulate else truth
    buffers = layouts(before if accumulate else torch.full_like(before, float("nan")))
    for layout, out in buffers.items():
        version = out._version
        gemm_into(out, a, b, accumulate=accumulate)
        assert out._version > version
        assert_close(out.cpu(), truth, buffer_dtype, sums=24, what=layout)  # rounded once


# (M, N, K), each no whole vectors where the matrices' neighbours lie along it; over the least work.
@pytest.mark.parametrize("shape", [(257, 521, 1030), (520, 513, 512), (513, 520, 512)], ids=str)
@dtypes
@pytest.mark.parametrize("accumulate", [True, False], ids=["adds", "overwrites"])
def test_uneven_sizes_in_padded_rows(shape, dtype, accumulate, device):
    """What is over is a product of its own on CUDA; what lies in the padding is left alone."""
    m, n, k = shape

    def padded(rows, cols, seed, transposed=False):
        lines, width = (cols, rows) if transposed else (rows, cols)
        room = torch.full((lines, (width + 63) // 64 * 64), 7.0, dtype=dtype, device=device)
        view = room[:, :width].copy_(randn(lines, width, dtype=dtype, device=device, seed=seed))
        return (view.t() if transposed else view), room

    for transposed in (False, True):
        a, _ = padded(m, k, 0, transposed)
        b, _ = padded(k, n, 1, not transposed)
        out, room = padded(m, n, 2)
        truth = truth_of(a, b) + (out.double().cpu() if accumulate else 0)
        gemm_into(out, a, b, accumulate=accumulate)
        assert_close(out.cpu(), truth, dtype, sums=24)
        assert (room[:, n:] == 7).all()


@pytest.mark.parametrize("case", [case for case in CASES if not case[0]], ids=str)
@dtypes
@pytest.mark.parametrize("buffer_dtype", BUFFERS.values(), ids=BUFFERS)
def test_bias_gradient(case, dtype, buffer_dtype, device):
    """Of y_grad^T x: y_grad's rows added up, beside the product."""
    a, b = factors(case, dtype, device)
    before = randn(a.shape[0], b.shape[1], dtype=buffer_dtype, device=device, seed=9)
    truth, sums = truth_of(a, b) + before.double().cpu(), a.double().sum(1).cpu()
    # A sum of 257 terms may be near 0 where its error is not.
    size = a.double().abs().sum(1).cpu()
    bound = UNIT_ROUNDOFF[buffer_dtype] + 24 * UNIT_ROUNDOFF[torch.float32]
    for layout, out in layouts(before).items():
        bias_grad = before.new_full((a.shape[0],), float("nan"))
        gemm_into(out, layouts(a)["columns"], b, accumulate=True, bias_grad=bias_grad)
        assert_close(out.cpu(), truth, buffer_dtype, sums=24, what=layout)
        assert ((bias_grad.double().cpu() - sums).abs() <= bound * size).all(), layout


@dtypes
@pytest.mark.parametrize("shape", [(129, 67, 700), (64, 1, 4096), (512, 256, 64)], ids=str)
def test_same_bits(dtype, shape, device):
    a, b = factors(((), *shape), dtype, device)
    results = []
    for _ in range(3):
        out, bias_grad = a.new_empty(shape[0], shape[1]), a.new_empty(shape[0])
        gemm_into(out, a, b, accumulate=False, bias_grad=bias_grad)
        wgrad = torch.zeros(shape[0], shape[1], device=device)
        gemm_into(wgrad, a, b)
        gelu = beside("gelu bias", a, b, dtype)
        results.append([gemm(a, b), gemm(a, b, **gelu), out, bias_grad, wgrad])
    for again in results[1:]:
        contract.equal_bits(again, results[0])


def test_tf32_is_torchs_setting(device):
    if device == "cpu":
        pytest.skip("the CPU has no tf32")
    a, b = factors(((), 256, 256, 256), torch.float32, device)
    truth, errors = truth_of(a, b), {}
    setting = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            errors[allowed] = (gemm(a, b).cpu().double() - truth).norm() / truth.norm()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = setting
    assert errors[False] < 1e-6 and 1e-5 < errors[True] < 2e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": (4,)}, r"a: expected \[M, K\] or \[batch, M, K\], not a rank of 1"),
        ({"a": torch.zeros(2, 4).long()}, r"a: expected a floating dtype, not Long"),
        ({"b": (5, 3)}, r"b: expected \[K, N\] beside a \[2, 4\], not \[5, 3\]"),
        ({"b": (2, 4, 3)}, r"b: expected \[K, N\] beside a \[2, 4\], not \[2, 4, 3\]"),
        ({"b": torch.zeros(4, 3).double()}, r"b: expected Float as a has, not Double"),
        ({"bias": (2,)}, r"bias: expected \[3\], not \[2\]"),
        ({"bias": torch.zeros(3).double()}, r"bias: expected Float as out has, not Double"),
        ({"epilogue": "relu"}, r"epilogue: expected none, gelu or gelu_grad, not relu"),
        ({"epilogue": "gelu_grad"}, r"pre_activation: expected one with gelu_grad"),
        ({"pre_activation": (2, 3)}, r"pre_activation: expected none without gelu_grad"),
        (
            {"epilogue": "gelu_grad", "pre_activation": (3, 2)},
            r"pre_activation: expected \[2, 3\], not \[3, 2\]",
        ),
        (
            {"epilogue": "gelu_grad", "pre_activation": (2, 3), "bias": (3,)},
            r"bias: expected none with gelu_grad",
        ),
        ({"out_dtype": torch.float16}, r"out_dtype: expected Float or Float, not Half"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message, device):
    given = {"a": (2, 4), "b": (4, 3)} | change
    for name, value in given.items():
        if isinstance(value, tuple):
            given[name] = torch.zeros(value, device=device)
        elif isinstance(value, torch.Tensor):
            given[name] = value.to(device)
    with pytest.raises(RuntimeError, match="gemm: " + message):
        gemm(**given)


def test_refused_buffers(device):
    a, b = factors(((), 2, 3, 4), torch.float32, device)
    out = torch.zeros(2, 3, device=device)
    with pytest.raises(RuntimeError, match=r"gemm: out: expected \[2, 3\], not \[3, 2\]"):
        gemm_into(out.t(), a, b)
    with pytest.raises(RuntimeError, match="gemm: out: expected a floating dtype, not Int"):
        gemm_into(out.int(), a, b)
    with pytest.raises(RuntimeError, match=r"gemm: bias_grad: expected \[M\] beside a \[M, K\]"):
        gemm_into(out, a, b, bias_grad=out[0])
    with pytest.raises(RuntimeError, match="gemm: bias_grad: expected contiguous Float as out has"):
        gemm_into(out, a, b, bias_grad=out[:, 0].double())
    assert not out.any()


def test_gradients_are_refused(device):
    a, b = factors(((), 2, 3, 4), torch.float32, device)
    with pytest.raises(RuntimeError, match="not implemented"):
        gemm(a.requires_grad_(), b).sum().backward()


def test_opcheck_and_meta(device):
    a, b = factors(((), 6, 8, 16), torch.float32, device)
    out, bias_grad = torch.zeros(6, 8, device=device), torch.zeros(6, device=device)
    contract.passes_opcheck(gemm.default, (a, b), beside("gelu bias", a, b, a.dtype), inner=True)
    contract.passes_opcheck(gemm.default, (a, b), beside("gelu_grad", a, b, a.dtype), inner=True)
    contract.passes_opcheck(gemm_gelu.default, (a, b), inner=True)
    contract.passes_opcheck(gemm_into.default, (out, a, b), {"bias_grad": bias_grad}, inner=True)
    assert gemm(a.to("meta"), b.to("meta"), out_dtype=torch.float32).shape == (6, 8)


def test_compiles(device):
    a, b = factors(((), 6, 8, 16), torch.float32, device)

    def both(a, b):
        out = torch.zeros(a.shape[0], b.shape[1], device=a.device)
        bias_grad = torch.empty_like(out[:, 0])
        gemm_into(out, a, b, bias_grad=bias_grad)
        return out, bias_grad, *gemm_gelu(a, b), gemm(a, b, bias=b[0])

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 5):
        contract.equal_bits(compiled(a[:rows], b), both(a[:rows], b))


def test_graphs_and_streams(device):
    if device == "cpu":
        pytest.skip("the CPU has neither")
    a, b = factors(((), 64, 128, 4096), torch.bfloat16, device)
    bias = randn(128, dtype=torch.bfloat16, device=device)
    contract.captures(lambda a, b, bias: gemm(a, b, bias=bias), [a, b, bias], backward=False)
    contract.agrees_on_side_stream(lambda a, b: gemm(a, b), [a, b], backward=False)
