"""redline.strict: a fallback is an error, on every thread that backward runs on."""

import threading

import pytest
import torch

import redline
from cases import DEVICES
from contract import equal_bits, gradients
from redline import ops

devices = pytest.mark.parametrize("device", DEVICES)
COPIED = "are copied to lie side by side; give it contiguous (strict mode)"
NARROW = (
    "gemm: out: the CPU has no product that adds up 16-bit factors in float32: they are copied to "
    "it; give float32 factors, or no main_grad (strict mode)"
)
MASKED = "torch's fused kernels do not serve it: products and a masked softmax that hold all scores"


def turned(rows, cols, dtype=torch.float32):
    return torch.ones(cols, rows, dtype=dtype).t()


def step(**changed):
    lists = {name: torch.ones(3, 4) for name in ("parameters", "gradients", "exp_avgs")}
    lists |= {"exp_avg_sqs": torch.ones(3, 4)} | changed
    rate = torch.tensor(0.1)
    ops.adamw_step(*([t] for t in lists.values()), [], [torch.zeros(())], learning_rate=rate)


def attend(**options):
    q = torch.ones(2, 5, 4, 8)
    k = torch.ones(2, 6, 4, 8)
    return ops.attention(q, k, k, **options)


def products(op, *arguments, **options):
    a, b = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    return getattr(torch.ops.redline, op)(*arguments, a, b, **options)


def packed():
    q, bounds = torch.ones(5, 4, 8), torch.tensor([0, 2, 5])
    return ops.attention(q, q, q, cu_seqlens_q=bounds, cu_seqlens_k=bounds)


def wide_gradient():
    x, weight = (torch.ones(4, 4, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    ops.linear(x, weight, main_grad=torch.zeros(4, 4)).backward(torch.ones_like(x))


# What is called, and the whole sentence.
REFUSED = {
    "norm": (
        lambda: ops.rms_norm(turned(3, 4)),
        f"rms_norm: x: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "parameter": (
        lambda: ops.layer_norm(torch.ones(3, 4), torch.ones(4, 2)[:, 0]),
        f"layer_norm: weight: sizes [4] with strides [2] {COPIED}",
    ),
    "residual": (
        lambda: ops.residual_rms_norm(torch.ones(3, 4), turned(3, 4)),
        f"rms_norm: residual: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "activation": (
        lambda: ops.activation(turned(3, 4)),
        f"activation: x: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "gate": (
        lambda: ops.gated_activation_pair(turned(3, 4), torch.ones(3, 4)),
        f"gated_activation: gate: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "dropout": (
        lambda: ops.bias_dropout_add(torch.ones(3, 4), None, turned(3, 4), 0.0),
        f"bias_dropout_add: residual: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "dropout and norm": (
        lambda: ops.bias_dropout_residual_rms_norm(torch.ones(3, 4), None, turned(3, 4), 0.5),
        f"rms_norm: residual: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "softmax": (
        lambda: ops.softmax(turned(3, 4)),
        f"softmax: scores: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "tokens": (
        lambda: ops.embedding(turned(3, 4, torch.int64), torch.ones(9, 4)),
        f"embedding: tokens: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "logits": (
        lambda: ops.cross_entropy(turned(3, 4), torch.zeros(3, dtype=torch.int64)),
        f"cross_entropy: logits: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "targets": (
        lambda: ops.cross_entropy(torch.ones(3, 4), torch.zeros(3, dtype=torch.int32)),
        "cross_entropy: targets: int32 is copied to int64; give int64 (strict mode)",
    ),
    "head_dim": (
        lambda: ops.rotary(torch.ones(1, 2, 4, 3).mT, torch.ones(2, 2), torch.ones(2, 2)),
        f"rotary: x: sizes [1, 2, 3, 4] with strides [24, 12, 1, 3] {COPIED}",
    ),
    "k's head_dim": (
        lambda: ops.rotary_pair(
            torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, 3).mT, torch.ones(2, 2), torch.ones(2, 2)
        ),
        f"rotary_pair: k: sizes [1, 2, 3, 4] with strides [24, 12, 1, 3] {COPIED}",
    ),
    "table": (
        lambda: ops.rotary(torch.ones(1, 2, 3, 4), turned(2, 2), torch.ones(2, 2)),
        f"rotary: cos: sizes [2, 2] with strides [1, 2] {COPIED}",
    ),
    "qkv": (
        lambda: ops.qkv_rotary_split(
            torch.ones(1, 16, 2).mT, torch.ones(2, 2), torch.ones(2, 2), 2, 1
        ),
        f"qkv_rotary_split: qkv: sizes [1, 2, 16] with strides [32, 1, 2] {COPIED}",
    ),
    "optimiser": (
        lambda: step(gradients=turned(3, 4)),
        f"adamw_step: gradients: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "norm of gradients": (
        lambda: ops.gradient_norm([turned(3, 4)]),
        f"gradient_norm: gradients: sizes [3, 4] with strides [1, 3] {COPIED}",
    ),
    "scaled gradients": (
        lambda: ops.scale_gradients([torch.ones(3, 8)[:, ::2]], torch.tensor(0.5)),
        f"scale_gradients: gradients: sizes [3, 4] with strides [8, 2] {COPIED}",
    ),
    "window": (
        lambda: attend(window=(2, 0)),
        f"attention: window: {MASKED}; give none (strict mode)",
    ),
    "causal": (
        lambda: attend(causal=True),
        f"attention: causal: {MASKED}; give as many queries as keys, or one (strict mode)",
    ),
    "sink": (
        lambda: attend(sink=torch.ones(4)),
        f"attention: sink: {MASKED}; give none (strict mode)",
    ),
    "softcap": (
        lambda: attend(softcap=2.0),
        f"attention: softcap: {MASKED}; give none (strict mode)",
    ),
    "log_sum_exp": (
        lambda: attend(return_log_sum_exp=True),
        f"attention: return_log_sum_exp: {MASKED}; leave it false (strict mode)",
    ),
    "packed": (
        packed,
        f"attention: cu_seqlens_q: {MASKED}; give a batch of padded sequences (strict mode)",
    ),
    "no fused kernel": (
        lambda: ops.attention(
            *(torch.ones(1, 4, 2, 8, dtype=torch.float64),) * 2,
            torch.ones(1, 4, 2, 16, dtype=torch.float64),
        ),
        "attention: q: torch has no fused kernel for Double heads of 8: products and a softmax "
        "that hold all scores; use a 16-bit dtype and a head_dim that torch's kernels have "
        "(strict mode)",
    ),
    "main_grad": (wide_gradient, NARROW),
    "float32 product": (lambda: products("gemm", out_dtype=torch.float32), NARROW),
    "sum of products": (
        lambda: products("gemm_into", torch.ones(2, 8, dtype=torch.bfloat16)),
        NARROW,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fallback_is_an_error_that_says_what_to_change(name):
    call, sentence = REFUSED[name]
    call()  # without strict mode it is served
    with redline.strict(), pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value).splitlines()[0] == sentence
    call()


def test_nothing_is_written_before_the_error():
    gradient = torch.ones(3, 8)[:, ::2]
    with redline.strict(), pytest.raises(RuntimeError):
        ops.scale_gradients([gradient], torch.tensor(0.5))
    assert torch.equal(gradient, torch.ones(3, 4))


def test_it_nests_and_ends():
    x = turned(3, 4)
    with redline.strict():
        with redline.strict(False):
            ops.rms_norm(x)
            assert not torch.ops.redline.is_strict()
        assert torch.ops.redline.is_strict()
        with pytest.raises(RuntimeError):
            ops.rms_norm(x)
    assert not torch.ops.redline.is_strict()


def on_another_thread(call):
    """What `call` raised there, or None."""
    raised = []

    def run():
        try:
            call()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


NODES = {
    "rms_norm": (ops.rms_norm, (6, 8)),
    "activation": (ops.activation, (6, 8)),
    "gated_activation": (ops.gated_activation, (6, 16)),
    "softmax": (ops.softmax, (6, 8)),
    "rotary": (
        lambda x: ops.rotary(x, torch.ones(2, 4).to(x), torch.ones(2, 4).to(x)),
        (1, 2, 3, 8),
    ),
    "rotary_pair": (
        lambda x: ops.rotary_pair(x, x, torch.ones(2, 4).to(x), torch.ones(2, 4).to(x))[0],
        (1, 2, 3, 8),
    ),
    "qkv_rotary_split": (
        lambda x: ops.qkv_rotary_split(x, torch.ones(2, 4).to(x), torch.ones(2, 4).to(x), 2, 1)[0],
        (1, 2, 32),
    ),
    "bias_dropout_add": (lambda x: ops.bias_dropout_add(x, None, x.detach(), 0.5), (6, 8)),
    "bias_dropout_residual_rms_norm": (
        lambda x: ops.bias_dropout_residual_rms_norm(x, None, x.detach(), 0.5)[0],
        (6, 8),
    ),
    "embedding": (lambda w: ops.embedding(torch.arange(6, device=w.device), w), (6, 8)),
}


@pytest.mark.parametrize("name", NODES)
@devices
def test_backward_is_strict_where_forward_was(name, device):
    """On another thread, after the context has ended: the node keeps it."""
    op, shape = NODES[name]
    x = torch.ones(shape, device=device, requires_grad=True)
    with redline.strict():
        y = op(x)
    plain = op(x)

    def backward(y):
        upstream = torch.ones(y.shape[::-1], device=device).permute(*range(y.dim())[::-1])
        torch.autograd.grad(y, x, upstream, retain_graph=True)

    for error in (on_another_thread(lambda: backward(y)), raised_here(lambda: backward(y))):
        assert f"_grad: sizes {list(y.shape)} with strides" in str(error)
        assert COPIED in str(error)
    assert on_another_thread(lambda: backward(plain)) is None
    assert not torch.ops.redline.is_strict()


def raised_here(call):
    with pytest.raises(RuntimeError) as caught:
        call()
    return caught.value


@devices
def test_a_strict_threads_backward_is_strict_on_autograds_threads(device):
    """Forward before the context, backward within: torch carries it to the device's thread."""
    x = torch.ones(6, 8, device=device, requires_grad=True)
    y = ops.rms_norm(x)
    with redline.strict(), pytest.raises(RuntimeError, match=r"rms_norm: y_grad: .*copied"):
        y.backward(torch.ones(8, 6, device=device).t())
    y = ops.rms_norm(x)
    y.backward(torch.ones(8, 6, device=device).t())


def test_a_checkpointed_region_is_strict_when_it_is_computed_again():
    from torch.utils.checkpoint import checkpoint

    calls = []

    def region(x):
        calls.append(torch.ops.redline.is_strict())
        return ops.rms_norm(x)

    x = torch.ones(6, 8, requires_grad=True)
    with redline.strict():
        checkpoint(region, x, use_reentrant=False).backward(torch.ones(6, 8))
    assert calls == [True, True]


@devices
def test_bits_are_those_without_it(device):
    inputs = [torch.randn(6, 8).to(device), torch.randn(8).to(device)]
    outputs, grads, upstreams = gradients(ops.rms_norm, inputs)
    with redline.strict():
        strict = gradients(ops.rms_norm, inputs, upstreams)
    equal_bits((*outputs, *grads), (*strict[0], *strict[1]))


def test_compiled_code_is_held_too():
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager")
    x = turned(3, 4)
    compiled(x)
    with redline.strict(), pytest.raises(RuntimeError, match=r"rms_norm: x: .*copied"):
        compiled(x)
