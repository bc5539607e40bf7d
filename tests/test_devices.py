"""Every op family on a second GPU, past 2^31 elements, and with its backward on other threads."""

import functools
import threading

import pytest
import torch

import contract
from cases import DEVICES, randn
from redline import ops

ROWS, COLS = 70, 48


def normal(*shape, device, dtype=torch.float32, seed=0):
    return randn(*shape, dtype=dtype, device=device, seed=seed)


def rotate(x):
    angles = torch.arange(x.shape[1] * 8.0, device=x.device).view(-1, 8)
    return ops.rotary(x, angles.cos(), angles.sin())


def undropped(x, bias, residual):
    return ops.bias_dropout_add(x, bias, residual, 0.0)


def undropped_norm(x, bias, residual, weight):
    return ops.bias_dropout_residual_rms_norm(x, bias, residual, 0.0, weight)[0]


# name: (op, shapes of its inputs); a shape of numbers alone is of float32 data.
FAMILIES = {
    "rms_norm": (ops.rms_norm, [(ROWS, COLS), (COLS,)]),
    "layer_norm": (ops.layer_norm, [(ROWS, COLS), (COLS,), (COLS,)]),
    "activation": (ops.activation, [(ROWS, COLS), (COLS,)]),
    "gated_activation": (lambda x, b: ops.gated_activation(x, bias=b), [(ROWS, COLS), (COLS,)]),
    "bias_dropout_add": (undropped, [(ROWS, COLS), (COLS,), (ROWS, COLS)]),
    "bias_dropout_residual_rms_norm": (
        undropped_norm,
        [(ROWS, COLS), (COLS,), (ROWS, COLS), (COLS,)],
    ),
    "softmax": (ops.softmax, [(ROWS, COLS)]),
    "rotary": (rotate, [(7, 5, 2, 16)]),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, torch.arange(ROWS, device=x.device) % COLS),
        [(ROWS, COLS)],
    ),
    "fused_linear_cross_entropy": (
        lambda x, w: ops.fused_linear_cross_entropy(x, w, torch.arange(ROWS, device=x.device) % 9),
        [(ROWS, COLS), (COLS, COLS)],
    ),
    "embedding": (
        lambda w: ops.embedding(torch.arange(99, device=w.device) % ROWS, w),
        [(ROWS, COLS)],
    ),
    "norm_linear": (
        lambda x, g, w: ops.norm_linear(x, g, None, w),
        [(ROWS, COLS), (COLS,), (16, COLS)],
    ),
    "norm_mlp": (
        lambda x, g, up, down: ops.norm_mlp(x, g, None, up, None, down),
        [(ROWS, COLS), (COLS,), (32, COLS), (COLS, 16)],
    ),
    "attention": (functools.partial(ops.attention, causal=True), [(2, 9, 4, 16)] * 3),
}
families = pytest.mark.parametrize("name", FAMILIES)


def drawn(name, device):
    op, shapes = FAMILIES[name]
    return op, [normal(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]


@families
@pytest.mark.parametrize("device", DEVICES)
def test_backward_on_other_threads(name, device):
    """One thread's graph by another thread, and four threads with graphs of their own."""
    if name == "attention" and device == "cuda":
        pytest.skip("torch's attention backward gives other bits on each run on CUDA")
    op, inputs = drawn(name, device)
    _, expected, upstreams = contract.gradients(op, inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    built = op(*leaves)
    results = {}

    def other_thread():
        results["other"] = torch.autograd.grad(built, leaves, upstreams[0])

    def own_graph(index):
        results[index] = contract.gradients(op, inputs, upstreams)[1]

    threads = [threading.Thread(target=other_thread)]
    threads += [threading.Thread(target=own_graph, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 5
    for grads in results.values():
        contract.equal_bits(grads, expected)


@families
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu(name):
    """Tensors on cuda:1 while cuda:0 is the current device."""
    op, inputs = drawn(name, "cuda:0")
    outputs, grads, upstreams = contract.gradients(op, inputs)
    others = [tensor.to("cuda:1") for tensor in inputs]
    ours = contract.gradients(op, others, [tensor.to("cuda:1") for tensor in upstreams])
    assert all(tensor.device == torch.device("cuda:1") for tensor in (*ours[0], *ours[1]))
    contract.equal_bits([tensor.to("cuda:0") for tensor in ours[0]], outputs)
    if name != "attention":  # torch's backward gives other bits on each run
        contract.equal_bits([tensor.to("cuda:0") for tensor in ours[1]], grads)


def gpu_bytes():
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


needs_memory = pytest.mark.skipif(gpu_bytes() < 40e9, reason="needs a GPU of 40 GB")
LONG = 2**19 + 2  # rows of 4096: past 2^31 elements

# name: (op, shape of x, shapes of the inputs that belong to every row)
LARGE = {
    "rms_norm": (ops.rms_norm, (LONG, 4096), [(4096,)]),
    "layer_norm": (ops.layer_norm, (LONG, 4096), [(4096,), (4096,)]),
    "activation": (ops.activation, (LONG, 4096), [(4096,)]),
    "gated_activation": (ops.gated_activation, (LONG, 4096), []),
    "bias_dropout_add": (
        lambda x: ops.bias_dropout_add(x, None, x.detach(), 0.0),
        (LONG, 4096),
        [],
    ),
    "softmax": (ops.softmax, (LONG, 4096), []),
    "rotary": (rotate, (2**16 + 2, 16, 128, 16), []),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, x.new_zeros(x.shape[0], dtype=torch.int64), "none"),
        (LONG, 4096),
        [],
    ),
}


@needs_memory
@pytest.mark.parametrize("name", LARGE)
def test_more_than_2_to_the_31_elements(name):
    """The last rows of a large tensor are what they are alone, forward and backward."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost a pass over each
    op, shape, parameters = LARGE[name]
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    rest = [normal(*size, device="cuda", dtype=torch.bfloat16) for size in parameters]
    y = op(x, *rest)
    (x_grad,) = torch.autograd.grad(y, x, y.detach())
    tail = x.detach()[-2:].clone().requires_grad_()
    y_tail = op(tail, *rest)
    (tail_grad,) = torch.autograd.grad(y_tail, tail, y_tail.detach())
    contract.equal_bits([y[-2:], x_grad[-2:]], [y_tail, tail_grad])


@needs_memory
def test_embedding_of_more_than_2_to_the_31_elements():
    torch.utils.deterministic.fill_uninitialized_memory = False
    weight = normal(64, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    tokens = torch.arange(LONG, device="cuda") % 63
    tokens[-1] = 63  # once: its gradient is the last row of y's
    y = ops.embedding(tokens, weight)
    (weight_grad,) = torch.autograd.grad(y, weight, y.detach())
    contract.equal_bits([y[-1], weight_grad[63]], [weight[63], weight[63]])


@needs_memory
def test_optimizer_of_more_than_2_to_the_31_elements():
    torch.utils.deterministic.fill_uninitialized_memory = False
    count = 2**31 + 9

    def step(size):
        options = {"device": "cuda", "dtype": torch.bfloat16}
        parameter, gradient = torch.ones(size, **options), torch.full((size,), 0.5, **options)
        averages = [torch.zeros(size, **options) for _ in range(2)]
        rate = torch.tensor(0.1, device="cuda", dtype=torch.float64)
        counter = torch.zeros((), device="cuda")
        ops.adamw_step(
            [parameter], [gradient], *([a] for a in averages), [], [counter], learning_rate=rate
        )
        norm = ops.gradient_norm([gradient]).item()
        return parameter[-9:].clone(), norm

    tail, norm = step(count)
    assert torch.equal(tail, step(9)[0]) and not torch.equal(tail, torch.ones_like(tail))
    assert norm == pytest.approx(0.5 * count**0.5, rel=1e-5)
