"""What every op must do whatever it computes: one function per promise, used by each test file."""

import contextlib
import warnings

import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from cases import strided
from tolerance import assert_close


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


def seeded(function):
    """The function from the same state of torch's generators at each call."""

    def call(*args):
        torch.manual_seed(11)
        return function(*args)

    return call


def equal_bits(ours, theirs):
    """Holds two lists of tensors, some of them None, to the same bits; NaN is equal to NaN."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), f"result {index}"
        if a is not None:
            a, b = (tensor.detach().nan_to_num(123.0) for tensor in (a, b))
            assert torch.equal(a, b), f"result {index}"


def same_bits(op, inputs):
    """Forward and backward on four threads, again, and on one and three: equal bits.

    The op must have rows enough for several tasks (ops/run.h, rows_per_task).
    """
    threads = torch.get_num_threads()
    upstreams, expected = None, None
    try:
        for count in (4, 4, 1, 3):
            torch.set_num_threads(count)
            outputs, grads, upstreams = gradients(op, inputs, upstreams)
            expected = expected or (*outputs, *grads)
            equal_bits((*outputs, *grads), expected)
    finally:
        torch.set_num_threads(threads)


def each_row_alone(op, inputs, per_row):
    """Each row by itself has its bits of the batch: outputs and the gradients of the inputs
    `per_row`, whose leading axis is rows."""
    outputs, grads, upstreams = gradients(op, inputs)
    for row in range(len(outputs[0])):
        one = slice(row, row + 1)
        alone = [x[one] if i in per_row else x for i, x in enumerate(inputs)]
        ours = gradients(op, alone, [upstream[one] for upstream in upstreams])
        equal_bits(ours[0], [output[one] for output in outputs])
        whole = [None if grads[i] is None else grads[i][one] for i in per_row]
        equal_bits([ours[1][i] for i in per_row], whole)


def gradient_ignores_strides_and_neighbours(op, inputs, rows=None):
    """The gradient of the first input: of strided tensors, and of single rows of the leading axis,
    all but where `rows` says which.

    The inputs behind the first belong to every row.
    """
    x, *rest = inputs
    _, (expected, *_), (upstream,) = gradients(op, inputs)

    def gradient(x, upstream, *rest):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(op(leaf, *rest), leaf, upstream)[0]

    apart = gradient(strided(x), strided(upstream), *[strided(tensor) for tensor in rest])
    assert torch.equal(apart, expected)
    for row in rows or range(len(x)):
        one = slice(row, row + 1)
        assert torch.equal(gradient(x[one], upstream[one], *rest), expected[one]), f"row {row}"


# The names under which seen_calls() sees a product.
PRODUCTS = {"aten::mm", "aten::addmm", "redline::gemm", "redline::gemm_into"}


@contextlib.contextmanager
def seen_calls(names):
    """Appends the name of every op that is called below autograd, backward included."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


def passes_opcheck(op, args, kwargs=None, inner=False):
    """torch's opcheck: schema, registration, fake tensors, AOT dispatch, dynamic shapes."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not inner:
        tests += ("test_aot_dispatch_dynamic",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.opcheck(op, args, kwargs or {}, test_utils=tests)


def longer(inputs):
    """The inputs with one more of the leading axis that the first has."""
    count = inputs[0].shape[0]
    return [
        torch.cat([tensor, tensor[:1]]) if tensor.dim() and tensor.shape[0] == count else tensor
        for tensor in inputs
    ]


def compiles(op, inputs, backend="aot_eager"):
    """fullgraph, with gradients, and again at another leading size without a graph break."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend, dynamic=None)
    for given in (inputs, longer(inputs)):
        ours = gradients(compiled, given)
        stock = gradients(op, given, ours[2])
        equal_bits(ours[0] + ours[1], stock[0] + stock[1])


def compiles_dynamic(op, inputs):
    """One graph serves two leading sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for given, again in ((inputs, False), (longer(inputs), True)):
        with torch._dynamo.config.patch(error_on_recompile=again):
            ours = gradients(compiled, given)
        stock = gradients(op, given, ours[2])
        equal_bits(ours[0] + ours[1], stock[0] + stock[1])


def runs_under_compiled_autograd(op, inputs):
    """The backward of an eager forward, traced as a whole, has the same bits."""
    _, expected, upstreams = gradients(op, inputs)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = first(op(*leaves))
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.backward(upstreams[0])
    equal_bits([leaf.grad for leaf in leaves], expected)


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


def autocasts_as(op, stock, inputs, device):
    """Under autocast to bfloat16 the bits of `stock`; float32 gradients within two roundings of
    its own, which are rounded once more on the way."""
    with torch.autocast(device, torch.bfloat16):
        ours = gradients(op, inputs)
        theirs = gradients(stock, inputs, ours[2])
    assert ours[0][0].dtype == torch.bfloat16
    equal_bits(ours[0], theirs[0])
    for grad, expected in zip(ours[1], theirs[1], strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, expected.double(), torch.bfloat16, roundings=2)


def refuses_vmap(op, inputs):
    batched = [torch.stack([tensor, tensor]) for tensor in inputs]
    with pytest.raises(RuntimeError, match="vmap is not built"):
        torch.vmap(op)(*batched)


def refuses_double_backward(op, inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    grads = torch.autograd.grad(first(op(*leaves)).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grads[0].sum(), leaves)


def refuses_a_tangent_in_backward(op, inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = first(op(*leaves))
    with torch.autograd.forward_ad.dual_level():
        upstream = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="forward AD"):
            torch.autograd.grad(out, leaves, upstream)


def captures(op, inputs, backward=True):
    """A CUDA graph of forward and backward replays to the same bits on new data."""
    static = [tensor.clone() for tensor in inputs]
    leaves = [tensor.requires_grad_(backward) for tensor in static if tensor.is_floating_point()]
    upstream = torch.randn_like(first(op(*static)))

    def step():
        out = first(op(*static))
        if not backward:
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream, allow_unused=True)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    equal_bits(results, step())


def agrees_on_side_stream(op, inputs, backward=True):
    """Forward and backward on a stream that is not the default one."""

    def results(upstreams=None):
        if not backward:
            return [first(op(*inputs))], None
        outputs, grads, upstreams = gradients(op, inputs, upstreams)
        return [*outputs, *grads], upstreams

    expected, upstreams = results()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ours, _ = results(upstreams)
    side.synchronize()
    equal_bits(ours, expected)
