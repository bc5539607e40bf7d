"""gradient_norm, clip_coefficient and scale_gradients against float64."""

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided
from redline import ops
from tolerance import assert_close

SHAPES = [(1,), (3, 7), (0, 4), (1024,), (32769,), (2, 50000), ()]
BATCHED = [(3,)] * 1100  # more tensors than one launch holds


def gradients(dtype, device, shapes=SHAPES):
    return [randn(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", [SHAPES, BATCHED], ids=["shapes", "batches"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_norm(dtype, shapes, device):
    tensors = gradients(dtype, device, shapes)
    norm = ops.gradient_norm(tensors)
    assert norm.dtype == torch.float32 and norm.shape == ()
    assert_close(norm.cpu(), reference.gradient_norm(*[t.cpu().double() for t in tensors]))
    assert torch.equal(ops.gradient_norm([tensors[-1].new_zeros(0, 3)]).cpu(), torch.tensor(0.0))


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes_and_extremes(device):
    tensors = [randn(500, dtype=dtype, device=device) for dtype in DTYPES.values()]
    tensors[0] *= 1e25  # a float32 square would overflow
    expected = reference.gradient_norm(*[t.cpu().double() for t in tensors])
    assert_close(ops.gradient_norm(tensors).cpu(), expected)
    for bad in (float("inf"), float("nan")):
        tensors[1][7] = bad
        norm = ops.gradient_norm(tensors)
        assert norm.isnan() if bad != bad else norm.isinf()
    tiny = [randn(500, dtype=torch.float32, device=device) * 1e-30]
    expected = reference.gradient_norm(tiny[0].cpu().double())
    assert_close(ops.gradient_norm(tiny).cpu(), expected)


def test_float64_on_the_cpu():
    tensors = gradients(torch.float64, "cpu")
    norm = ops.gradient_norm(tensors)
    assert norm.dtype == torch.float64
    assert_close(norm, reference.gradient_norm(*tensors), sums=500)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_do_not_depend_on_place_strides_or_threads(dtype, device):
    tensors = [randn(40, 999, dtype=dtype, device=device), randn(70001, dtype=dtype, device=device)]
    norm, coefficient = ops.gradient_norm(tensors), torch.tensor(0.37, device=device)
    moved = [strided(tensor) for tensor in tensors]
    assert torch.equal(ops.gradient_norm(moved), norm)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(ops.gradient_norm(tensors), norm)
    torch.set_num_threads(threads)
    expected = [(tensor.float() * coefficient).to(dtype) for tensor in tensors]
    ops.scale_gradients(tensors, coefficient)
    ops.scale_gradients(moved, coefficient)
    for ours, shifted, exact in zip(tensors, moved, expected, strict=True):
        assert torch.equal(ours, exact) and torch.equal(shifted, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_coefficient(device):
    for norm, expected in ((4.0, 0.25), (0.5, 1.0), (0.0, 1.0), (float("inf"), 0.0)):
        found = ops.clip_coefficient(torch.tensor(norm, device=device), 1.0)
        torch.testing.assert_close(found.cpu(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert ops.clip_coefficient(torch.tensor(float("nan"), device=device), 1.0).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors, norm = gradients(torch.float32, device), torch.tensor(2.0, device=device)
    registered = torch.ops.redline
    contract.passes_opcheck(registered.gradient_norm, (tensors,), inner=True)
    contract.passes_opcheck(registered.clip_coefficient, (norm, 1.0), inner=True)
    contract.passes_opcheck(registered.scale_gradients, (tensors, norm), inner=True)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    def clip(*tensors):
        norm = ops.gradient_norm(tensors)
        ops.scale_gradients(tensors, ops.clip_coefficient(norm, 1.0))
        return norm

    eager, traced = gradients(torch.float32, device), gradients(torch.float32, device)
    torch._dynamo.reset()
    norm = torch.compile(clip, fullgraph=True, backend="aot_eager")(*traced)
    assert torch.equal(norm, clip(*eager))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize("device", ["cuda"] if torch.cuda.is_available() else [])
def test_captures(device):
    tensors = gradients(torch.float32, device)
    contract.captures(lambda *tensors: ops.gradient_norm(tensors), tensors, backward=False)
    contract.agrees_on_side_stream(
        lambda *tensors: ops.gradient_norm(tensors), tensors, backward=False
    )


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device):
    x = torch.randn(4, device=device)
    with pytest.raises(RuntimeError, match="gradients: expected a floating dtype, not int64"):
        ops.gradient_norm([x.long()])
    with pytest.raises(RuntimeError, match="max_norm: expected 0 or more, not -1"):
        ops.clip_coefficient(x[0], -1.0)
    with pytest.raises(RuntimeError, match="norm: expected one float32 or float64, not"):
        ops.clip_coefficient(x, 1.0)
    with pytest.raises(RuntimeError, match="coefficient: expected one float32, not"):
        ops.scale_gradients([x], x)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        ops.scale_gradients([x.requires_grad_()], torch.ones((), device=device))
    with pytest.raises(RuntimeError, match="expected a dense tensor, not Sparse"):
        ops.gradient_norm([torch.eye(3, device=device).to_sparse(), x.detach()])
