"""Every test starts from one seed, and float outputs of torch.empty start as NaN."""

import pytest
import torch

import redline.ops  # noqa: F401  (cases.py asks the library)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (largest int): an element that no kernel writes shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
