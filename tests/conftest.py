"""Hypothesis profiles by HYPOTHESIS_PROFILE, and fixtures that every test file may use."""

import os
from collections import Counter
from typing import Any

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


# Seconds for a test of the intense profile, in place of its own limit.
INTENSE_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A hundred times the examples need more time than a test's own limit, which is that of the other profiles."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "intense":
        for item in items:
            item.add_marker(pytest.mark.timeout(INTENSE_TIMEOUT_S), append=False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one: the same tests run on either, and none needs it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every batch of attacked points that a training step finds."""
    from ccdist import training_step  # here: the import hook that checks shapes must be there first
    from ccdist.attacks import pgd

    found: list[torch.Tensor] = []

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(pgd(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(training_step, "pgd", recording)
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a training step attacks, bounds, reads statistics or folds a network."""
    from ccdist import training_step

    count: Counter[str] = Counter()

    def counted(name: str, owner: Any) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    counted("shi_regularizer_of_centers", training_step)
    for name in ("pgd", "folded_interval", "propagate", "elided_lower_bounds", "folded_forward"):
        counted(name, training_step)
    counted("collecting", training_step.Fold)
    return count
