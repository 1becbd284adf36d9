"""The commit behind a number: of the repository that the package is read from, or unknown."""

import subprocess
from pathlib import Path

import pytest

from ccdist import provenance


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's folder in a repository of one commit, which it is no part of yet."""
    monkeypatch.delenv(provenance.COMMIT, raising=False)
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "provenance.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return folder


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(package: Path) -> None:
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "one")
    commit = git(package, "rev-parse", "--short=12", "HEAD")
    assert provenance.source_commit() == commit
    (package / "provenance.py").write_text("changed")
    assert provenance.source_commit() == f"{commit}-dirty"


def test_no_repository_is_unknown(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.source_commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert provenance.source_commit() == "unknown"


def test_a_repository_that_does_not_hold_the_package_is_not_its_own(package: Path) -> None:
    git(package.parent, "init")
    git(package.parent, "commit", "--allow-empty", "-m", "one")
    assert provenance.source_commit() == "unknown"


def test_whoever_made_a_copy_says_of_what(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.COMMIT, "0123456789ab-dirty")
    assert provenance.source_commit() == "0123456789ab-dirty"
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "one")
    assert provenance.source_commit() == git(package, "rev-parse", "--short=12", "HEAD")
