"""embedding: against float64, the order of the gradient's sums, and what the laws ask."""

import re

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from redline import ops
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)

# (tokens, vocabulary, hidden): one, odd, repeats, more rows than tokens, empty, over a block.
CASES = [
    ((1,), 1, 1),
    ((3, 7), 5, 33),
    ((300,), 4, 24),
    ((), 7, 8),
    ((0, 3), 7, 8),
    ((4, 9), 1000, 64),
    ((2, 5, 3), 40, 2500),
]


# Tokens of each row, about the 64 of a chunk: rows of many start and end in every place of one.
COUNTS = [
    (64, 65, 63, 0, 128, 129, 1, 500),
    (1, 200, 64, 66, 65, 127, 3, 65, 65),
    (1000,),
    (63, 1, 65),
    tuple(range(60, 72)),
]


def case_name(case):
    return f"{'x'.join(map(str, case[0])) or 'scalar'}-{case[1]}-{case[2]}"


def tokens_of(shape, vocabulary, device, dtype=torch.int64):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary, shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=["i64", "i32"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_forward_and_backward(case, dtype, index, device):
    shape, vocabulary, hidden = case
    tokens = tokens_of(shape, vocabulary, device, index)
    weight = randn(vocabulary, hidden, dtype=dtype, device=device)
    (y,), (weight_grad,), (upstream,) = contract.gradients(ops.embedding, [tokens, weight])
    assert y.dtype == dtype and torch.equal(y, weight[tokens.long()])
    (weight64,) = wide(weight)
    y64 = reference.embedding(tokens.cpu().long(), weight64)
    (weight64_grad,) = torch.autograd.grad(y64, [weight64], upstream.cpu().double())
    assert weight_grad.dtype == dtype
    # A float32 sum of k terms rounds k - 1 times; the roundings add like a random walk.
    sums = (tokens.numel() / vocabulary) ** 0.5 + 1
    leaf = weight.detach().requires_grad_()
    (stock,) = torch.autograd.grad(torch.nn.functional.embedding(tokens, leaf), leaf, upstream)
    assert_close(weight_grad.cpu(), weight64_grad, dtype, sums=sums, stock=stock.cpu())


def in_order(y_grad, tokens, vocabulary):
    """The gradient by adding the tokens' rows one after another in float32."""
    sums = torch.zeros(vocabulary, y_grad.shape[-1])
    rows = y_grad.float().cpu().flatten(0, -2)
    for token, row in zip(tokens.flatten().tolist(), rows, strict=True):
        sums[token] += row
    return sums


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient_is_summed_in_order_of_occurrence(dtype, device):
    tokens = tokens_of((5, 41), 9, device)
    y_grad = randn(5, 41, 40, dtype=dtype, device=device, scale=10.0)
    grad = torch.ops.redline.embedding_backward(y_grad, tokens, 9)
    assert torch.equal(grad.cpu(), in_order(y_grad, tokens, 9).to(dtype))


def in_chunks(y_grad, tokens, vocabulary, chunk):
    """The gradient by adding `chunk` tokens' rows after one another, then those sums in order."""
    sums = torch.zeros(vocabulary, y_grad.shape[-1])
    for row in range(vocabulary):
        rows = y_grad[tokens == row].float().cpu()
        for part in rows.split(chunk):
            sums[row] += in_order(part, torch.zeros(len(part), dtype=torch.int64), 1)[0]
    return sums


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_of_many_tokens(counts, dtype, device):
    tokens = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))]
    tokens = tokens.to(device)
    y_grad = randn(len(tokens), 24, dtype=dtype, device=device, scale=10.0)
    grad = torch.ops.redline.embedding_backward(y_grad, tokens, len(counts))
    chunk = 64 if device == "cuda" else max(len(tokens), 1)
    assert torch.equal(grad.cpu(), in_chunks(y_grad, tokens, len(counts), chunk).to(dtype))


@pytest.mark.parametrize("count", [512, 513, 2049, 5000, 9000])
def test_any_number_of_runs(count, device):
    """Of 512 tokens, each of which holds some of every row."""
    tokens = tokens_of((count,), 90, device)
    y_grad = randn(count, 8, dtype=torch.float32, device=device, scale=10.0)
    grad = torch.ops.redline.embedding_backward(y_grad, tokens, 90)
    chunk = 64 if device == "cuda" else count
    assert torch.equal(grad.cpu(), in_chunks(y_grad, tokens, 90, chunk))


def test_accumulates_more_than_is_read_ahead(device):
    """A y_grad of more than 24 MB, into a float32 buffer."""
    tokens = tokens_of((1600,), 700, device)
    y_grad = randn(1600, 8192, dtype=torch.bfloat16, device=device)
    buffer = randn(700, 8192, dtype=torch.float32, device=device)
    expected = buffer.cpu() + in_order(y_grad, tokens, 700)
    torch.ops.redline.embedding_backward_into(buffer, y_grad, tokens)
    assert torch.equal(buffer.cpu(), expected)


@pytest.mark.parametrize("wide_buffer", [False, True], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_accumulates_into_a_buffer(dtype, wide_buffer, device):
    tokens = tokens_of((6, 11), 50, device)
    y_grad = randn(6, 11, 40, dtype=dtype, device=device)
    buffer = randn(50, 40, dtype=torch.float32 if wide_buffer else dtype, device=device)
    expected = (buffer.float().cpu() + in_order(y_grad, tokens, 50)).to(buffer.dtype)
    version = buffer._version
    torch.ops.redline.embedding_backward_into(buffer, y_grad, tokens)
    assert torch.equal(buffer.cpu(), expected) and buffer._version > version


@pytest.mark.parametrize("padding_idx", [0, 3, -2])
def test_padding_has_no_gradient(padding_idx, device):
    tokens = tokens_of((4, 9), 5, device)
    weight = randn(5, 12, dtype=torch.float32, device=device).requires_grad_()
    stock = torch.nn.functional.embedding(tokens, weight, padding_idx)
    y = ops.embedding(tokens, weight, padding_idx)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, [weight], upstream)
    (stock_grad,) = torch.autograd.grad(stock, [weight], upstream)
    assert torch.equal(y, stock) and not grad[padding_idx].any()
    assert_close(grad, stock_grad.double(), sums=8)
    buffer = torch.ones_like(grad)
    torch.ops.redline.embedding_backward_into(buffer, upstream, tokens, padding_idx)
    assert (buffer[padding_idx] == 1).all()


@pytest.mark.parametrize("bad", [-1, 7], ids=["negative", "beyond"])
def test_token_outside_the_vocabulary(bad, device):
    tokens = torch.tensor([0, bad, 6], device=device)
    weight = randn(7, 8, dtype=torch.float32, device=device)
    y_grad = torch.ones(3, 8, device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"embedding: tokens: expected 0 to 6, not {bad}"):
            ops.embedding(tokens, weight)
        with pytest.raises(RuntimeError, match=f"embedding: tokens: expected 0 to 6, not {bad}"):
            torch.ops.redline.embedding_backward(y_grad, tokens, 7)
        return
    y = ops.embedding(tokens, weight)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], weight[[0, 6]])
    grad = torch.ops.redline.embedding_backward(y_grad, tokens, 7)
    assert torch.equal(grad.sum(1).cpu(), torch.tensor([8.0, 0, 0, 0, 0, 0, 8.0]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strided_inputs_have_the_bits_of_contiguous_ones(dtype, device):
    tokens = tokens_of((6, 11), 20, device)
    weight = randn(20, 64, dtype=dtype, device=device)
    y_grad = randn(6, 11, 64, dtype=dtype, device=device)
    y = ops.embedding(tokens, weight)
    grad = torch.ops.redline.embedding_backward(y_grad, tokens, 20)
    apart = tokens.t().contiguous().t()
    for other in (strided(weight), weight.t().contiguous().t()):
        assert torch.equal(ops.embedding(apart, other), y)
    for other in (strided(y_grad), y_grad.transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(torch.ops.redline.embedding_backward(other, apart, 20), grad)


@pytest.mark.parametrize("vocabulary", [262142, 262143, 262144])
def test_the_largest_vocabularies(vocabulary, device):
    """The last rows of what a sort by runs can hold, and one more, with tokens of no gradient."""
    count = 16000  # runs of 512 do not divide it
    tokens = tokens_of((count,), vocabulary, device)
    tokens[:3], tokens[-200:] = vocabulary - 1, vocabulary - 2
    tokens[-1] = 5
    y_grad = randn(count, 8, dtype=torch.float32, device=device)
    grad = torch.ops.redline.embedding_backward(y_grad, tokens, vocabulary, 5)
    expected = torch.zeros(vocabulary, 8, dtype=torch.float64)
    named = tokens.cpu() != 5
    expected.index_add_(0, tokens.cpu()[named], y_grad.cpu().double()[named])
    assert_close(grad.cpu(), expected, sums=200**0.5)


def test_same_bits(device):
    tokens = tokens_of((32, 64), 2000, device)
    weight = randn(2000, 96, dtype=torch.bfloat16, device=device)
    contract.same_bits(ops.embedding, [tokens, weight])


def test_keeps_only_the_tokens(device):
    tokens = tokens_of((4, 8), 100, device)
    weight = randn(100, 96, dtype=torch.float32, device=device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.embedding(tokens, weight)
    assert [tensor.data_ptr() for tensor in kept] == [tokens.data_ptr()]


def test_bad_arguments(device):
    tokens = tokens_of((4, 8), 5, device)
    weight = torch.zeros(5, 6, device=device)
    y_grad = torch.zeros(4, 8, 6, device=device)
    backward = torch.ops.redline.embedding_backward
    for call, message in (
        (
            lambda: ops.embedding(tokens.float(), weight),
            "embedding: tokens: expected int64 or int32, not Float",
        ),
        (
            lambda: ops.embedding(tokens, weight[0]),
            r"embedding: weight: expected \[vocabulary, hidden\], not a rank of 1",
        ),
        (
            lambda: ops.embedding(tokens, weight.long()),
            "embedding: weight: expected a floating dtype, not Long",
        ),
        (
            lambda: ops.embedding(tokens, weight, 5),
            "embedding: padding_idx: expected a row of 5, not 5",
        ),
        (
            lambda: backward(y_grad[0], tokens, 5),
            "embedding: y_grad: expected a rank of 3, not 2",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_bad_buffers(device):
    tokens = tokens_of((4, 8), 5, device)
    shared = torch.zeros(2, 4 * 8, 6, device=device)
    weight, y_grad = torch.zeros(5, 6, device=device), shared[0].view(4, 8, 6)
    into = ops.embedding_backward_into
    for buffer, message in (
        (weight[:, :4], r"[vocabulary, 6], not [5, 4]"),
        (weight.half(), "Float or Float, not Half"),
        (torch.zeros(6, 5, device=device).t(), "adjacent columns, not a stride of 5"),
        (weight[0].expand(5, 6), "rows that do not overlap, not a stride of 0 for 6 columns"),
        (weight.as_strided((5, 6), (3, 1)), "rows that do not overlap, not a stride of 3"),
        (shared[0, 2:7], "memory of its own, not that of y_grad"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"embedding: buffer: expected {message}")):
            into(buffer, y_grad, tokens)
    into(shared[1, :5], y_grad, tokens)  # apart, in one storage


def test_float64_is_refused_on_cuda(device):
    if device != "cuda":
        pytest.skip("the CPU has float64")
    weight = torch.zeros(5, 6, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="embedding: weight: no kernel for float64"):
        ops.embedding(tokens_of((3,), 5, device), weight)


def test_opcheck(device):
    tokens = tokens_of((4, 8), 20, device)
    weight = randn(20, 6, dtype=torch.float32, device=device)
    y_grad = randn(4, 8, 6, dtype=torch.float32, device=device)
    ours = torch.ops.redline
    contract.passes_opcheck(ours.embedding.default, (tokens, weight.requires_grad_()))
    contract.passes_opcheck(ours.embedding_forward.default, (tokens, weight.detach()), inner=True)
    contract.passes_opcheck(ours.embedding_backward.default, (y_grad, tokens, 20), inner=True)
    contract.passes_opcheck(
        ours.embedding_backward_into.default,
        (torch.zeros(20, 6, device=device), y_grad, tokens),
        inner=True,
    )


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    tokens = tokens_of((3, 5), 4, device)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda weight: ops.embedding(tokens, weight), [weight])


def test_compiles_and_exports(device):
    tokens = tokens_of((4, 8), 20, device)
    weight = randn(20, 6, dtype=torch.float32, device=device)
    contract.compiles(ops.embedding, [tokens, weight])
    contract.compiles_dynamic(ops.embedding, [tokens, weight])
    contract.exports(ops.embedding, [tokens, weight])
    contract.runs_in_inference_mode(ops.embedding, [tokens, weight])


def test_compiles_into_a_buffer(device):
    tokens = tokens_of((4, 8), 20, device)
    y_grad = randn(4, 8, 6, dtype=torch.float32, device=device)

    def add(buffer):
        ops.embedding_backward_into(buffer, y_grad, tokens)
        return buffer + 1

    buffers = [torch.zeros(20, 6, device=device) for _ in range(2)]
    compiled = torch.compile(add, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(buffers[0]), add(buffers[1]))
    assert torch.equal(*buffers)


def test_autocast_follows_the_weight(device):
    tokens = tokens_of((4, 8), 20, device)
    weight = randn(20, 6, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        stock = torch.nn.functional.embedding(tokens, weight)
        assert ops.embedding(tokens, weight).dtype == stock.dtype


def test_refuses_vmap_and_double_backward(device):
    tokens = tokens_of((4, 8), 20, device)
    weight = randn(20, 6, dtype=torch.float32, device=device)
    contract.refuses_vmap(ops.embedding, [tokens, weight])
    contract.refuses_double_backward(lambda w: ops.embedding(tokens, w).square(), [weight])


def test_graphs_and_streams(device):
    if device != "cuda":
        pytest.skip("CUDA graphs and streams")
    tokens = tokens_of((16, 64), 1000, device)
    weight = randn(1000, 96, dtype=torch.bfloat16, device=device)
    contract.captures(lambda weight: ops.embedding(tokens, weight), [weight])
    contract.agrees_on_side_stream(ops.embedding, [tokens, weight])
