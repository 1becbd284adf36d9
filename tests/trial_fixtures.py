"""Fixtures of tests with artefacts in an object store; `trial_moments` has what they share besides."""

from pathlib import Path

import pytest

from search.artifacts import remote_files, workplace


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(workplace.SCRATCH, str(tmp_path / "scratch"))
    return f"file://{tmp_path}/store"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away is given up soon."""
    monkeypatch.setattr(remote_files, "PATIENCE_S", 0.02)
    monkeypatch.setattr(remote_files, "_FIRST_PAUSE_S", 0.001)
