"""Attention's scores and products: left to torch's kernel."""

from redline.tune.recognise import Owner
from redline.tune.swap import Part

# bench/results: the forward and both directions of plain and causal attention, times 0.99 to 1.04.
WHY = "ops.attention is torch's own kernel, nowhere measured faster"


def parts(owner: Owner) -> list[Part]:
    stock = owner.family.stock("Attention") or ()
    return [
        Part(f"{stock.__name__}: attention", WHY)
        for module in owner.modules
        if isinstance(module, stock)
    ]
