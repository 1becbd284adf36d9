"""`make audit`: the lock, the environment and known vulnerabilities."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "audit", module)
        spec.loader.exec_module(module)
        yield module


def test_the_lock_holds_versions_and_hashes_only(audit: ModuleType) -> None:
    pins, wrong = audit.read_lock((ROOT / "requirements.lock").read_text())
    assert wrong == []
    assert len(pins) > 100
    assert {"torch", "ray", "optuna", "mlflow"} <= {pin.name for pin in pins}


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.14.1",
        "torch>=2.14 --hash=sha256:" + "0" * 64,
        "torch==2.14.1 --hash=md5:" + "0" * 32,
        "torch @ https://host/torch.whl --hash=sha256:" + "0" * 64,
        "git+https://host/torch",
        "-e .",
        "--extra-index-url https://host/simple",
        "./torch.whl --hash=sha256:" + "0" * 64,
    ],
)
def test_a_line_that_pins_nothing_is_found(audit: ModuleType, line: str) -> None:
    pins, wrong = audit.read_lock(f"numpy==2.0 \\\n    --hash=sha256:{'1' * 64}\n{line}\n")
    assert [pin.name for pin in pins] == ["numpy"]
    assert len(wrong) == 1


def test_an_environment_that_differs_is_found(audit: ModuleType) -> None:
    hashes = f" --hash=sha256:{'0' * 64}\n"
    lock = f"one==1.0{hashes}Two_x==2.0{hashes}three==3.0 ; sys_platform == 'win32'{hashes}four==4.0{hashes}"
    pins, wrong = audit.read_lock(lock)
    assert wrong == []
    installed = {"one": "1.0", "two-x": "2.1", "five": "5", "ccdist-search": "0.1.0"}
    told = ["two-x 2.0 is locked, 2.1 is installed", "four is missing", "five is not in the lock"]
    assert audit.differences(pins, [], installed) == told
    cloud, _ = audit.read_lock(f"five==5{hashes}six==6.0{hashes}")  # a part of it, which may be there
    assert audit.differences(pins, cloud, installed) == told[:2]
    assert audit.differences(pins, cloud, installed | {"six": "6.1"}) == [*told[:2], "six is not in the lock"]
    assert audit.installed_packages()["pytest"] == pytest.__version__


ADVISORY = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}


@pytest.mark.parametrize(
    ("answer", "strict", "code", "told"),
    [
        ({"dependencies": [{"name": "one", "version": "1.0", "vulns": []}]}, "0", 0, "no advisory names any"),
        ({"dependencies": [{"name": "one", "version": "1.0", "vulns": [ADVISORY]}]}, "0", 1, "one 1.0: CVE-1 PYSEC-1"),
        (None, "0", 0, "advisories were not checked: no answer (no route to host)"),
        (None, "1", 1, "advisories were not checked"),
    ],
)
def test_advisories_are_told_and_their_absence_too(
    audit: ModuleType,
    answer: Any,
    strict: str,
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """pip-audit in the place of whose answer a file is."""
    script = "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in --output) out=$2;; esac; shift; done\n"
    script += "echo no route to host >&2; exit 1\n" if answer is None else f"cp {tmp_path}/answer $out; exit 1\n"
    (tmp_path / "answer").write_text(json.dumps(answer))
    (tmp_path / "uv").write_text(script)
    (tmp_path / "uv").chmod(0o700)
    (tmp_path / "lock").write_text(f"one==1.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setenv("AUDIT_STRICT", strict)
    monkeypatch.setattr(audit, "installed_packages", lambda: {"one": "1.0", "two": "2.0"})
    (tmp_path / "cloud.lock").write_text(f"two==2.0 --hash=sha256:{'0' * 64}\n")
    places = ["--lock", str(tmp_path / "lock"), "--further", str(tmp_path / "cloud.lock")]
    assert audit.main([*places, "--uv", str(tmp_path / "uv")]) == code
    assert told in capsys.readouterr().out
