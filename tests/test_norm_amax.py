"""The rows' largest magnitudes out of the norms' own pass."""

import pytest
import torch

import cases
import contract
from cases import DEVICES, DTYPES, HUGE, SMALL, randn, strided
from redline import ops

NORMS = ["rms_norm", "layer_norm"]
# A width for each way in which threads share a row on CUDA, by whole vectors and not.
TILES = [(33, 128), (33, 127), (33, 256), (33, 512), (33, 505), (9, 1024), (600, 4096), (70, 4096)]
TILES += [(9, 4100), (600, 4097), (5, 16384), (5, 20000), (3, 65536), (3, 140000), (3, 140001)]


def parameters(norm, cols, dtype, device):
    names = ["weight"] if norm == "rms_norm" else ["weight", "bias"]
    return [randn(cols, dtype=dtype, device=device, seed=i, shift=0.5) for i, _ in enumerate(names)]


def largest(y):
    """Of each row, in the dtype of the statistics: NaN where the row has one."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    if y.shape[-1] == 0:
        return torch.zeros(y.shape[:-1], dtype=wide, device=y.device)
    return y.abs().amax(-1).to(wide)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SMALL + TILES + HUGE, ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_amax_of_every_row(norm, case, dtype, device):
    """y and the sum have the bits of the op without it; amax those of a pass over y."""
    x, residual = (randn(*case, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    if x.numel():  # the last column's, and a negative one's
        x[0, -1], x[-1, 0] = 50.0, -60.0
    extra = parameters(norm, case[1], dtype, device)
    alone, behind = getattr(ops, norm), getattr(ops, f"residual_{norm}")
    y, amax = alone(x, *extra, return_amax=True)
    assert torch.equal(y, alone(x, *extra)) and torch.equal(amax, largest(y))
    *outs, amax = behind(x, residual, *extra, return_amax=True)
    contract.equal_bits(outs, behind(x, residual, *extra))
    assert torch.equal(amax, largest(outs[0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cols", [128, 200, 777, 4096, 40000, 140000])
@pytest.mark.parametrize("norm", NORMS)
def test_extreme_rows(norm, cols, device):
    """NaN, infinity, zeros and what overflows 16 bits, wherever in the row they are."""
    for dtype in (torch.float32, torch.float16):
        x = randn(6, cols, dtype=dtype, device=device)
        x[0, cols // 2], x[1, -1], x[2], x[3, 1] = float("nan"), float("inf"), 0.0, -100.0
        weight = torch.full((cols,), 6e4, dtype=dtype, device=device)
        y, amax = getattr(ops, norm)(x, weight, return_amax=True)
        contract.equal_bits([amax], [largest(y)])
        assert amax[0].isnan() and amax[3] == largest(y)[3]
        assert dtype == torch.float32 or amax[3].isinf()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_mixed_dtypes_zero_centered_and_no_parameters(norm, device):
    x = randn(40, 300, dtype=torch.bfloat16, device=device)
    residual = randn(40, 300, dtype=torch.float32, device=device, seed=3)
    extra = parameters(norm, 300, torch.float32, device)
    for options in ({}, {"zero_centered": True}):
        y, total, amax = getattr(ops, f"residual_{norm}")(
            x, residual, *extra, return_amax=True, **options
        )
        assert (y.dtype, total.dtype, amax.dtype) == (x.dtype, torch.float32, torch.float32)
        assert torch.equal(amax, largest(y))
    y, amax = getattr(ops, norm)(x, return_amax=True)
    assert torch.equal(amax, largest(y))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cols", [65, 250, 1032, 40000])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_from_the_row_count_on_have_zero(norm, cols, device):
    x = randn(9, cols, dtype=torch.bfloat16, device=device)
    count = torch.tensor(5, device=device)
    y, amax = getattr(ops, norm)(x, row_count=count, return_amax=True)
    assert amax[:5].all() and not amax[5:].any() and torch.equal(amax, largest(y))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_the_norms_own(norm, device):
    """amax has none and leaves the others theirs."""
    x = randn(600, 200, dtype=torch.bfloat16, device=device)
    extra = parameters(norm, 200, torch.bfloat16, device)
    plain = getattr(ops, norm)
    _, expected, upstreams = contract.gradients(plain, [x, *extra])
    _, grads, _ = contract.gradients(
        lambda *args: plain(*args, return_amax=True)[0], [x, *extra], upstreams
    )
    contract.equal_bits(grads, expected)
    assert not plain(x.requires_grad_(), *extra, return_amax=True)[1].requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_bits_do_not_depend_on_strides_threads_or_neighbours(norm, device):
    x = randn(600, 999, dtype=torch.bfloat16, device=device)
    extra = parameters(norm, 999, torch.bfloat16, device)

    def amax_of(*inputs):
        return getattr(ops, norm)(*inputs, return_amax=True)[1]

    expected = amax_of(x, *extra)
    assert torch.equal(amax_of(strided(x), *[strided(tensor) for tensor in extra]), expected)
    for row in range(600):
        assert torch.equal(amax_of(x[row], *extra), expected[row])
    contract.same_bits(lambda *args: getattr(ops, norm)(*args, return_amax=True)[0], [x, *extra])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_tracing_and_registration(norm, device):
    x = randn(6, 3, 40, dtype=torch.float32, device=device)
    w = randn(40, dtype=torch.float32, device=device)

    def both(*inputs):
        return getattr(ops, norm)(*inputs, return_amax=True)[0]

    contract.compiles(both, [x, w])
    contract.compiles_dynamic(both, [x, w])
    contract.exports(both, [x, w])
    contract.refuses_double_backward(both, [x, w])
    if device == "cuda":
        contract.captures(both, [x, w])
    torch.utils.deterministic.fill_uninitialized_memory = False
    registered, bias = torch.ops.redline, None if norm == "rms_norm" else w
    contract.passes_opcheck(registered.norm_with_amax, (x, x + 1, w, bias, norm))
    contract.passes_opcheck(
        registered.norm_forward_with_amax, (x, None, w, bias, norm, 1e-5, False, None), inner=True
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_is_the_norms_own(norm, device):
    x = randn(4, 32, dtype=torch.bfloat16, device=device)
    extra = parameters(norm, 32, torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, amax = getattr(ops, norm)(x, *extra, return_amax=True)
        assert torch.equal(y, getattr(ops, norm)(x, *extra)) and torch.equal(amax, largest(y))
        y, total, amax = getattr(ops, f"residual_{norm}")(x, x, *extra, return_amax=True)
        contract.equal_bits([y, total], getattr(ops, f"residual_{norm}")(x, x, *extra))
        assert torch.equal(amax, largest(y))


def test_bad_arguments():
    x, w = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(RuntimeError, match="norm_with_amax: norm: expected rms_norm or layer_norm"):
        torch.ops.redline.norm_with_amax(x, None, w, None, "batch_norm")
    with pytest.raises(RuntimeError, match="rms_norm: bias: expected none"):
        torch.ops.redline.norm_with_amax(x, None, w, w, "rms_norm")
    with pytest.raises(RuntimeError, match="rms_norm: x: expected a last dimension of 7, not 8"):
        ops.rms_norm(x, w[:7], return_amax=True)
