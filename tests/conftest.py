"""Every test starts from one seed, and float outputs of torch.empty start as NaN."""

import sys
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


@pytest.fixture(autouse=True, scope="module")
def no_process_group_stays():
    """A file that joins one leaves it to the end of the file, so that the next may make its own."""
    yield
    if torch.distributed.is_initialized():
        if "megatron.core.parallel_state" in sys.modules:
            sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture
def one_thread():
    """For small models, whose operators take longer to hand out to threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
