"""Every test starts from one seed, and float outputs of torch.empty start as NaN."""

from importlib.util import find_spec

import pytest
import torch

import redline.megatron
import redline.ops  # cases.py asks the library

if find_spec("megatron") is not None:
    redline.megatron.install()  # before any test file imports megatron.core


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (largest int): an element that no kernel writes shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For small models, whose operators take longer to hand out to threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
