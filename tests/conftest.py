"""Hypothesis profiles by HYPOTHESIS_PROFILE, and fixtures that every test file may use."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# The tensors here are too small to share: several threads on busy cores make such steps fifteen times slower.
torch.set_num_threads(1)

# Times vary on shared machines, so neither a deadline nor slow data generation fails a test.
for name, max_examples in {"dev": 10, "ci": 50, "intense": 1000}.items():
    settings.register_profile(
        name,
        max_examples=max_examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one: the same tests run on either, and none needs it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
