"""bias_dropout_residual_rms_norm and ..._layer_norm: registration, tracing, kernels, refusals."""

import functools

import pytest
import torch

import contract
import redline
from cases import DEVICES
from contract import seeded
from redline import ops
from test_bias_dropout_add import P
from test_bias_dropout_residual_norm import NORMS, devices, fused, inputs, norms


@devices
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    registered = torch.ops.redline
    x, bias, residual, weight, norm_bias = (
        tensor.requires_grad_() for tensor in inputs("layer_norm", (4, 3, 8), torch.float32, device)
    )
    rms, layer = (getattr(registered, f"bias_dropout_residual_{norm}") for norm in NORMS)
    forward = registered.bias_dropout_residual_norm_forward
    for op in (rms, layer, forward):
        assert torch.Tag.nondeterministic_seeded in op.default.tags
    still = {"training": False}
    contract.passes_opcheck(rms, (x, bias, residual, P, weight), still)
    contract.passes_opcheck(layer, (x, bias, residual, P, weight, norm_bias), still)
    contract.passes_opcheck(rms, (x, None, residual, 1.0, weight))
    x, bias, residual, weight, norm_bias = (
        tensor.detach() for tensor in (x, bias, residual, weight, norm_bias)
    )
    for norm, probability in (("rms_norm", 0.0), ("layer_norm", 1.0)):
        given = (x, bias, residual, weight, norm_bias, norm, 1e-5, False, probability)
        contract.passes_opcheck(forward, given, inner=True)
    statistic, state = torch.rand(4, 3, device=device), torch.tensor([1, 4], device=device)
    backward = (x, x, weight, norm_bias, statistic, statistic, residual, False, state, bias, P)
    contract.passes_opcheck(
        registered.bias_dropout_residual_norm_backward,
        (*backward, torch.float32, True, True, True, True),
        inner=True,
    )


@devices
@norms
def test_tracing(norm, device):
    given = inputs(norm, (6, 3, 40), torch.float32, device)
    op, still = fused(norm), fused(norm, training=False)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    ours, eager = (contract.gradients(seeded(function), given) for function in (compiled, op))
    contract.equal_bits(ours[0] + ours[1], eager[0] + eager[1])
    contract.compiles(still, given)
    contract.compiles_dynamic(still, given)
    contract.exports(still, given)
    contract.runs_in_inference_mode(seeded(op), given)
    contract.refuses_vmap(still, given)
    contract.refuses_double_backward(lambda *args: op(*args)[0].square(), given)
    contract.refuses_a_tangent_in_backward(op, given)
    if device == "cuda":
        contract.captures(still, given)
        contract.agrees_on_side_stream(seeded(op), given)
        draws_anew_in_a_graph(norm, given[0])


def draws_anew_in_a_graph(norm, like):
    """Each replay of a CUDA graph has a mask of its own, and its gradient the same one."""
    x, residual = torch.ones_like(like).requires_grad_(), torch.zeros_like(like)
    op = fused(norm, with_bias=False)

    def step():
        y, total = op(x, residual)
        (total.sum() + 0 * y.sum()).backward()
        return total

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    seen = []
    for _ in range(2):
        x.grad.zero_()
        graph.replay()
        assert torch.equal(total != 0, x.grad != 0)
        seen.append((total != 0).clone())
    assert not torch.equal(*seen)


@devices
@norms
def test_autocast_follows_stock(norm, device):
    x, bias, residual, *parameters = inputs(norm, (4, 32), torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        outs = fused(norm)(x, bias, residual, *parameters)
        theirs = getattr(ops, f"residual_{norm}")(x, residual, *parameters)
    assert [out.dtype for out in outs] == [out.dtype for out in theirs]


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize(
    ("shape", "with_bias", "expected"),
    [
        ((1100, 4096), False, (["forward"], ["backward", "sum_chunks"])),
        ((1100, 4096), True, (["forward"], ["backward", "sum_chunks", "column", "sum_chunks"])),
        ((1100, 4097), False, (["element", "forward"], ["backward", "sum_chunks", "element"])),
        ((40, 4096), False, (["forward"], ["few_rows", "element"])),
        ((40, 32768), False, (["element", "forward"], ["backward", "sum_chunks"])),
    ],
)
@norms
def test_kernels(norm, shape, with_bias, expected, device):
    """One each way, but for an input bias's gradient and for rows that its kernels do not take."""
    if shape[1] == 32768 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("without clusters such rows are walked")
    given = inputs(norm, shape, torch.bfloat16, device, with_bias)
    leaves = [tensor.requires_grad_() for tensor in given]
    launches = redline.explain(fused(norm, with_bias), *leaves).launches
    for direction, names in zip(("forward", "backward"), expected, strict=True):
        seen = [launch.kernel for launch in launches if launch.direction == direction]
        assert len(seen) == len(names), seen
        assert all(f"{name}_kernel" in kernel for kernel, name in zip(seen, names, strict=True))


@devices
@norms
def test_bad_arguments(norm, device):
    x, w = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    op = getattr(ops, f"bias_dropout_residual_{norm}")
    for arguments, message in [
        ((x, w[:7], x, P), r"input_bias: expected \[8\], not \[7\] float32"),
        ((x, w.double(), x, P), "input_bias: expected float32, not float64"),
        ((x, w, x[:, :7], P), r"residual: expected \[4, 8\], not \[4, 7\]"),
        ((x, w, x.bfloat16(), P), "residual: expected float32, not bfloat16"),
        ((x, w, x, P, w[:7]), "x: expected a last dimension of 7, not 8"),
        ((x.long(), w, x, P), "x: expected a floating dtype, not Long"),
        ((x, w, x, 1.5), "probability: expected 0 to 1, not 1.5"),
        ((x, w, x, -0.5), "probability: expected 0 to 1, not -0.5"),
        ((x[0, 0], None, x[0, 0], P), "x: expected at least one dimension, not a scalar"),
    ]:
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError, match=f"{norm}: {message}"):
            op(*arguments)
        assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="probability: expected 0 to 1, not 2"):
        op(x, w, x, 2.0, training=False)
    inner = torch.ops.redline
    with pytest.raises(RuntimeError, match="norm: expected rms_norm or layer_norm, not norm"):
        inner.bias_dropout_residual_norm_forward(x, w, x, w, None, "norm", 1e-5, False, P)
    statistic, state = torch.ones(4, device=device), torch.zeros(2, device=device).long()
    backward = functools.partial(inner.bias_dropout_residual_norm_backward, x, x, w, None)
    none = (None, P, torch.float32)
    with pytest.raises(RuntimeError, match="needs_input_bias: expected input_bias to be given"):
        backward(None, statistic, None, False, state, *none, False, False, True, False)
    with pytest.raises(RuntimeError, match=r"rng_state: expected \[2\], not \[1\] int64"):
        backward(None, statistic, None, False, state[:1], *none, False, False, False, False)
    if device == "cuda":
        with pytest.raises(RuntimeError, match="residual: expected a tensor on cuda:0, not on cpu"):
            op(x, w, x.cpu(), P)
        with pytest.raises(RuntimeError, match="no kernel for float64"):
            op(x.double(), None, x.double(), P)
