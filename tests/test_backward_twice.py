"""Every op with a derivative: a second backward of one graph is refused in torch's sentence."""

import pytest
import torch

from cases import DEVICES
from op_cases import OPS, TRAINED

AGAIN = r"Trying to backward through the graph a second time"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRAINED)
def test_backward_run_twice_is_refused(name, device):
    case = OPS[name]
    leaves = [x.requires_grad_() for x in case.inputs(torch.float32, device)]
    outputs = case.op(*leaves)
    total = sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))
    total.backward()
    with pytest.raises(RuntimeError, match=AGAIN):
        total.backward()
