"""docs/memory.md, "When memory runs out": a node that fails leaves main_grad as it was."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import DEVICES, randn
from contract import equal_bits
from redline import layers, ops

pytestmark = pytest.mark.parametrize("device", DEVICES)

ROWS, HIDDEN, FFN, OUT = 6, 16, 24, 8


class MemoryRunsOut(TorchDispatchMode):
    """Raises at the n-th op that makes a tensor, those inside of our ops counted."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "redline":  # its kernel, with this mode on for what that calls
            on_cuda = any(isinstance(tensor, torch.Tensor) and tensor.is_cuda for tensor in args)
            key = torch._C.DispatchKey.CUDA if on_cuda else torch._C.DispatchKey.CPU
            with self:
                return func._op_dk(key, *args, **(kwargs or {}))
        makes = any(returned.alias_info is None for returned in func._schema.returns)
        self.left -= makes
        if makes and self.left == 0:
            raise torch.OutOfMemoryError(f"at {func}")
        return func(*args, **(kwargs or {}))


def draw(device, dtype, **shapes):
    each = enumerate(shapes.items())
    return {
        name: randn(*shape, dtype=dtype, device=device, seed=i).requires_grad_()
        for i, (name, shape) in each
    }


def buffers_like(*weights):
    return [torch.full_like(weight, 0.5, dtype=torch.float32) for weight in weights]


# Each gives what backward starts from, the leaves, and the buffers.


def linear(device, dtype):
    leaves = draw(device, dtype, x=(ROWS, HIDDEN), weight=(OUT, HIDDEN), bias=(OUT,))
    buffers = buffers_like(leaves["weight"])
    return ops.linear(*leaves.values(), main_grad=buffers[0], dummy_grad="zeros"), leaves, buffers


def norm_linear(device, dtype):
    shapes = {"x": (ROWS, HIDDEN), "norm_weight": (HIDDEN,), "norm_bias": (HIDDEN,)}
    leaves = draw(device, dtype, **shapes, weight=(OUT, HIDDEN), bias=(OUT,))
    buffers = buffers_like(leaves["weight"])
    options = {"norm": "layer_norm", "main_grad": buffers[0], "dummy_grad": "zeros"}
    return ops.norm_linear(*leaves.values(), **options), leaves, buffers


def norm_mlp(device, dtype):
    shapes = {"x": (ROWS, HIDDEN), "norm_weight": (HIDDEN,), "norm_bias": (HIDDEN,)}
    shapes |= {"fc1_weight": (2 * FFN, HIDDEN), "fc1_bias": (2 * FFN,)}
    leaves = draw(device, dtype, **shapes, fc2_weight=(OUT, FFN), fc2_bias=(OUT,))
    buffers = buffers_like(leaves["fc1_weight"], leaves["fc2_weight"])
    options = {"fc1_main_grad": buffers[0], "fc2_main_grad": buffers[1]}
    options |= {"norm": "layer_norm", "fc1_dummy_grad": "zeros", "fc2_dummy_grad": "zeros"}
    return ops.norm_mlp(*leaves.values(), **options), leaves, buffers


def head(device, dtype, **options):
    leaves = draw(device, dtype, x=(ROWS, HIDDEN), weight=(OUT, HIDDEN), bias=(OUT,))
    buffers = buffers_like(leaves["weight"])
    x, weight, bias = leaves.values()
    targets = torch.arange(ROWS, device=device)
    options |= {"main_grad": buffers[0], "dummy_grad": "zeros"}
    loss = ops.fused_linear_cross_entropy(x, weight, targets, bias, **options)
    return loss, leaves, buffers


def promised_head(device, dtype):
    return head(device, dtype, loss_scale=2.0)


def grouped_linear(device, dtype):
    """One expert, whose node is the last: split's own follows where x has a gradient."""
    layer = layers.GroupedLinear(
        1, HIDDEN, OUT, device=device, dtype=dtype, accumulate_main_grad=True
    )
    buffers = buffers_like(layer.weight0)
    layer.weight0.main_grad = buffers[0]
    x = randn(ROWS, HIDDEN, dtype=dtype, device=device)
    return layer(x, [ROWS]), dict(layer.named_parameters()), buffers


# The most ops that make a tensor which a backward here may have.
FAR = 100


@pytest.mark.parametrize(
    "node", [linear, norm_linear, norm_mlp, head, promised_head, grouped_linear]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_node_that_fails_leaves_main_grad_as_it_was(node, dtype, device):
    # On the CPU two 16-bit products are copied to float32, one behind the other's write.
    partial = node is norm_mlp and dtype == torch.bfloat16 and device == "cpu"
    for n in range(1, FAR):
        y, leaves, buffers = node(device, dtype)
        upstream = torch.ones_like(y)
        before = [tensor.detach().clone() for tensor in (*buffers, *leaves.values())]
        try:
            with MemoryRunsOut(n):
                torch.autograd.grad(y, leaves.values(), upstream, allow_unused=True)
        except torch.OutOfMemoryError:
            after = [*buffers, *leaves.values()]
            if partial and not torch.equal(after[0], before[0]):
                del after[0], before[0]  # fc1's is whole then, and fc2's as it was
            equal_bits(after, before)
        else:
            break
    assert 1 < n < FAR
    assert not any(torch.equal(a, b) for a, b in zip(buffers, before, strict=False))


def queued(leaves, main_grad, n):
    """The queue of a backward that fails at the n-th op that makes a tensor, and whether it did."""
    queue = ops.WeightGradientQueue()
    y = ops.linear(*leaves.values(), main_grad=main_grad, delayed=queue)
    upstream = torch.ones_like(y)
    try:
        with MemoryRunsOut(n):
            torch.autograd.grad(y, leaves.values(), upstream, allow_unused=True)
    except torch.OutOfMemoryError:
        return queue, True
    return queue, False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("into", [True, False], ids=["main_grad", "returned"])
def test_a_delayed_gradient_that_fails_may_be_asked_for_again(into, dtype, device):
    leaves = draw(device, dtype, x=(ROWS, HIDDEN), weight=(OUT, HIDDEN), bias=(OUT,))
    ours, whole = (buffers_like(leaves["weight"])[0] if into else None for _ in range(2))
    queue, failed = queued(leaves, ours, 1)
    assert failed and len(queue) == 0
    expected = queued(leaves, whole, FAR)[0].pop()
    queue, _ = queued(leaves, ours, FAR)
    before, failures = ours.clone() if into else None, 0
    for n in range(1, FAR):
        try:
            with MemoryRunsOut(n):
                gradient = queue.pop()
            break
        except torch.OutOfMemoryError:
            failures += 1
            assert len(queue) == 1
            equal_bits([ours], [before])
    # On CUDA a product into main_grad takes its workspace past the dispatcher.
    assert failures or into
    assert len(queue) == 0
    equal_bits([gradient, ours], [expected, whole])


class Fails:
    """A queue whose next product runs out of memory; the one after is the queue's own."""

    def __init__(self, layer, name):
        self.layer, self.name, self.queue = layer, name, getattr(layer, name)
        setattr(layer, name, self)

    def __len__(self):
        return len(self.queue)

    def pop(self):
        setattr(self.layer, self.name, self.queue)
        raise torch.OutOfMemoryError("at a product")


@pytest.mark.parametrize("failing", ["fc1_delayed", "delayed"])
def test_a_pair_of_delayed_gradients_may_be_asked_for_again(failing, device):
    """What one product of LayerNormMLP's pair lost to memory comes at the next call, once."""
    layer = layers.LayerNormMLP(HIDDEN, FFN, delay_weight_grad=True, device=device)
    x = randn(ROWS, HIDDEN, dtype=torch.float32, device=device)

    def gradients(fails):
        layer.fc1_weight.grad = layer.fc2_weight.grad = None
        for scale in (1.0, 2.0):
            (scale * layer(x).sum()).backward()
        if fails:
            Fails(layer, failing)
            with pytest.raises(torch.OutOfMemoryError):
                layer.backward_dw()
        for _ in range(2):
            layer.backward_dw()
        return layer.fc1_weight.grad, layer.fc2_weight.grad

    equal_bits(gradients(fails=True), gradients(fails=False))
    with pytest.raises(RuntimeError, match="pop: expected a gradient"):
        layer.backward_dw()
