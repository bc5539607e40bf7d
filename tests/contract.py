"""What every op must do whatever it computes: one function per promise, used by each test file."""

import warnings

import pytest
import torch


def gradients(op, inputs, upstreams=None):
    """Outputs and the gradients of the differentiable inputs under random upstream gradients."""
    leaves = [
        tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        if isinstance(tensor, torch.Tensor)
        else tensor
        for tensor in inputs
    ]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstreams is None:
        generator = torch.Generator().manual_seed(7)
        upstreams = [
            torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs
        ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, upstreams, allow_unused=True)
    return outputs, grads, upstreams


def same_bits(op, inputs):
    """Forward and backward twice, and with one thread: equal bits."""
    first = gradients(op, inputs)
    again = gradients(op, inputs, first[2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = gradients(op, inputs, first[2])
    finally:
        torch.set_num_threads(threads)
    for other in (again, alone):
        for ours, theirs in zip(first[0] + first[1], other[0] + other[1], strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(
                ours.detach().nan_to_num(123.0), theirs.detach().nan_to_num(123.0)
            )


def passes_opcheck(op, args, kwargs=None, inner=False):
    """torch.library.opcheck: schema, registration, fake tensors, AOT dispatch, dynamic shapes."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not inner:
        tests += ("test_aot_dispatch_dynamic",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(op, args, kwargs or {}, test_utils=tests)


def compiles(op, inputs, backend="aot_eager"):
    """fullgraph, with gradients, and again at another leading size without a graph break."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend, dynamic=None)
    ours = gradients(compiled, inputs)
    stock = gradients(op, inputs, ours[2])
    for a, b in zip(ours[0] + ours[1], stock[0] + stock[1], strict=True):
        assert a is None or torch.equal(a.nan_to_num(1.0), b.nan_to_num(1.0))


def compiles_dynamic(op, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    ours = gradients(compiled, inputs)
    stock = gradients(op, inputs, ours[2])
    for a, b in zip(ours[0] + ours[1], stock[0] + stock[1], strict=True):
        assert a is None or torch.equal(a.nan_to_num(1.0), b.nan_to_num(1.0))


def exports(op, inputs):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return op(*args)

    program = torch.export.export(Module(), tuple(inputs))
    assert torch.equal(first(program.module()(*inputs)), first(op(*inputs)))


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def runs_in_inference_mode(op, inputs):
    expected = first(op(*inputs))
    with torch.inference_mode():
        assert torch.equal(first(op(*inputs)).nan_to_num(1.0), expected.nan_to_num(1.0))


def refuses_vmap(op, inputs):
    batched = [torch.stack([tensor, tensor]) for tensor in inputs]
    with pytest.raises(RuntimeError, match="vmap is not built"):
        torch.vmap(op)(*batched)


def refuses_double_backward(op, inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    grads = torch.autograd.grad(first(op(*leaves)).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grads[0].sum(), leaves)


def captures(op, inputs):
    """A CUDA graph of the forward replays to the same bits on new data."""
    static = [tensor.clone() for tensor in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        op(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = first(op(*static))
    for tensor in static:
        if tensor.is_floating_point():
            tensor.mul_(0.5)
    graph.replay()
    with torch.no_grad():
        assert torch.equal(out, first(op(*static)))


def agrees_on_side_stream(op, inputs):
    expected = first(op(*inputs))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        out = first(op(*inputs))
    side.synchronize()
    assert torch.equal(out, expected)
