"""Norm's backward on CUDA where its groups of threads take rows in many turns, or in none."""

import functools

import pytest
import torch

import contract
import reference
from cases import randn, wide
from redline import ops
from test_norm import NORMS, parameters, sums
from tolerance import assert_close

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a CPU has no groups of threads"
)
# Blocks that leave a group out (512, 1024 and 2048 columns, from 16 turns on), and those that ask
# for a row's statistics two rows ahead: 5000, and layer's of two groups, 3072.
TURNS = [(34000, 512), (17500, 1024), (8500, 2048), (1400, 3072), (700, 3072), (1030, 5000)]


def expected_of(norm, x, extra, up):
    leaves = wide(x, *extra)
    y = getattr(reference, norm)(*leaves)
    return torch.autograd.grad(y, leaves, up.cpu().double())


@pytest.mark.parametrize(("rows", "cols"), TURNS)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_in_turns(norm, rows, cols):
    """Against float64; with the residual's gradient the parameters' have the same bits."""
    make = functools.partial(randn, rows, cols, dtype=torch.bfloat16, device="cuda")
    x, up, total_grad = make(), make(seed=5), make(seed=6)
    extra = parameters(norm, cols, torch.bfloat16, "cuda")
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *extra)]
    grads = torch.autograd.grad(getattr(ops, norm)(*leaves), leaves, up)
    for ours, theirs in zip(grads, expected_of(norm, x, extra, up), strict=True):
        assert_close(ours.cpu(), theirs, sums=4 * sums(cols) + rows)
    zeros = torch.zeros_like(x)
    both = getattr(ops, f"residual_{norm}")(leaves[0], zeros, *leaves[1:])
    again = torch.autograd.grad(both, leaves, (up, total_grad))
    for ours, same in zip(grads[1:], again[1:], strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("held", [0, 1, 132, 133, 265, 1030])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_that_count_where_statistics_are_asked_early(norm, held):
    """Blocks have no row, one, two, or some one more than others."""
    x = randn(1030, 5000, dtype=torch.bfloat16, device="cuda")
    count = torch.tensor(held, device="cuda")
    extra = parameters(norm, 5000, torch.bfloat16, "cuda")
    _, grads, up = contract.gradients(
        lambda *args: getattr(ops, norm)(*args, row_count=count), [x, *extra]
    )
    assert not grads[0][held:].any()
    expected = expected_of(norm, x[:held], extra, up[0][:held])
    for ours, theirs in zip((grads[0][:held], *grads[1:]), expected, strict=True):
        assert_close(ours.cpu(), theirs, sums=4 * sums(5000) + held)
