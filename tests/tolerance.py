"""One comparison, one table. Tolerances are counted roundings (docs/numerics.md)."""

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TINY = {  # half of the smallest subnormal: what underflow may add to an element
    torch.float64: 2.0**-1075,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}


def relative_error(out, reference):
    """||out - reference|| / ||reference||, in float64."""
    out, reference = out.double().flatten(), reference.double().flatten()
    return ((out - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def assert_close(out, reference, dtype=None, *, roundings=1, sums=0, stock=None, what="output"):
    """Holds `out` to `reference` (float64) within counted roundings of `dtype`.

    roundings: how often the path rounds to `dtype`. sums: float32 (float64 for float64) roundings
    that a long sum adds, in units of its own roundoff. stock: the same result by stock torch in
    the same dtype: from 64 elements on, our L2 error is then held to twice stock's or one
    rounding, whichever is larger.
    """
    dtype = dtype or out.dtype
    assert out.shape == reference.shape, f"{what}: {tuple(out.shape)} != {tuple(reference.shape)}"
    if out.numel() == 0:
        return
    out, reference = out.detach().double(), reference.detach().double()
    bad = out.isnan() != reference.isnan()
    assert not bad.any(), f"{what}: NaN differs at {bad.nonzero()[0].tolist()}"
    infinite = reference.isinf() | out.isinf()
    assert torch.equal(out[infinite], reference[infinite]), f"{what}: infinities differ"
    keep = ~(reference.isnan() | infinite)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = roundings * UNIT_ROUNDOFF[dtype] + sums * UNIT_ROUNDOFF[wide]
    error, scale = (out - reference)[keep].abs(), reference[keep].abs()
    if error.numel() == 0:
        return
    floor = TINY[dtype]
    l2, l2_bound = error.norm(), bound * scale.norm() + floor * error.numel() ** 0.5
    worst, worst_bound = error.max(), 4 * bound * scale.max() + floor
    if stock is not None and error.numel() >= 64:  # of a few elements the errors are luck
        theirs = (stock.detach().double() - reference)[keep].abs()
        l2_bound = torch.maximum(2 * theirs.norm(), UNIT_ROUNDOFF[dtype] * scale.norm() + floor)
        worst_bound = torch.maximum(2 * theirs.max(), worst_bound)
    if l2 <= l2_bound and worst <= worst_bound:
        return
    full = torch.where(keep, (out - reference).abs(), torch.zeros_like(out))
    index = torch.unravel_index(full.argmax(), full.shape)
    share = (error > worst_bound).double().mean().item()
    raise AssertionError(
        f"{what}: L2 error {l2:.3e} (bound {l2_bound:.3e}), worst {worst:.3e} (bound "
        f"{worst_bound:.3e}) at {[int(i) for i in index]}: {out[index]:.6g} != "
        f"{reference[index]:.6g}; {share:.2%} of the elements are beyond the bound"
    )
