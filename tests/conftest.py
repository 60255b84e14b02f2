"""Fixed seeds, and memory that shows when it was not written."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.host_model.build import Builder


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def fresh_memory_is_nan():
    """Uninitialised outputs hold NaN, so that an unwritten element cannot pass."""
    old = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(old[0])
    torch.utils.deterministic.fill_uninitialized_memory = old[1]


@pytest.fixture(scope="session")
def host_model(tmp_path_factory) -> Builder:
    """Compiles CUDA kernel bodies for the host model."""
    return Builder(tmp_path_factory.mktemp("host_model"))


@pytest.fixture(scope="session")
def tiny():
    """The module recipes/tiny.py, whose recipe run takes a second."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "recipes" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
