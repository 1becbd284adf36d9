"""Whether what is installed is what was chosen, and nothing that is known to be vulnerable.

    python .ci/audit.py [--uv .uv/bin/uv]

    lock          every line of requirements.lock, and of the locks of docs/clusters, is NAME==VERSION with SHA-256
                  hashes: no address, repository or folder
    environment   the installed packages are those of the lock, no more and no fewer; a cloud's may be there too
    advisories    none of these versions is named by the OSV database, asked by pip-audit

Exit code: 0 nothing was found, 1 something was. Without a network the advisories cannot be asked for: that is said, and
is an error only with AUDIT_STRICT=1.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OWN = "ccdist-search"  # installed from the checkout
PIP_AUDIT = "pip-audit==2.10.1"
# Advisories that do not concern this project: id -> why. None today.
ACCEPTED: dict[str, str] = {}
PATIENCE_S = 300.0

_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+)(?: ; (?P<marker>[^#]+?))?(?: --hash=sha256:[0-9a-f]{64})+"
)


@dataclass(frozen=True)
class Pin:
    """A line of the lock."""

    name: str
    version: str
    marker: str | None

    @property
    def is_for_here(self) -> bool:
        return self.marker is None or Marker(self.marker).evaluate()


def read_lock(text: str) -> tuple[list[Pin], list[str]]:
    """The pins of a lock, and the lines that are none."""
    pins, wrong = [], []
    for line in text.replace("\\\n", " ").splitlines():
        line = " ".join(line.split())
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            wrong.append(line[:80])
        else:
            pins.append(Pin(canonicalize_name(match["name"]), match["version"], match["marker"]))
    return pins, wrong


def differences(pins: Sequence[Pin], further: Sequence[Pin], installed: dict[str, str]) -> list[str]:
    """How an environment differs from the lock; what further locks name may be there too, at their versions."""
    wanted = {pin.name: pin.version for pin in pins if pin.is_for_here}
    found = [
        f"{name} {version} is locked, {installed[name]} is installed" if name in installed else f"{name} is missing"
        for name, version in wanted.items()
        if installed.get(name) != version
    ]
    others = sorted(installed.keys() - wanted.keys() - {OWN})
    allowed = {(pin.name, pin.version) for pin in further}
    return found + [f"{name} is not in the lock" for name in others if (name, installed[name]) not in allowed]


def installed_packages() -> dict[str, str]:
    """Name -> version of everything in this environment."""
    return {canonicalize_name(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}


def advisories(locks: Sequence[Path], uv: str) -> tuple[list[str], str | None]:
    """The advisories about the versions of some locks, and why they could not be asked for."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [uv, "tool", "run", PIP_AUDIT, "--vulnerability-service", "osv", "--disable-pip", "--require-hashes"]
        command += [f"--requirement={lock}" for lock in locks]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [], " ".join(str(error).split())
        if not answer.exists():
            lines = done.stderr.strip().splitlines() or ["it says nothing"]
            return [], lines[-1][:200]
        return named(json.loads(answer.read_text())), None


def named(answer: dict[str, list[dict[str, object]]]) -> list[str]:
    """One line for each advisory in what pip-audit says, but those that are accepted."""
    found = []
    for package in answer["dependencies"]:
        for each in package.get("vulns", []):  # type: ignore[attr-defined]
            known = {each["id"], *each.get("aliases", [])}
            if not known & ACCEPTED.keys():
                fixed = ", ".join(each.get("fix_versions", [])) or "no version yet"
                found.append(f"{package['name']} {package['version']}: {' '.join(sorted(known))}; fixed in {fixed}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python .ci/audit.py", description="Audit what is installed.")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock", help="of this environment")
    parser.add_argument("--further", type=Path, nargs="*", default=sorted((ROOT / "docs" / "clusters").glob("*.lock")))
    parser.add_argument("--uv", default=str(ROOT / ".uv/bin/uv"))
    options = parser.parse_args(arguments)
    strict = os.environ.get("AUDIT_STRICT") == "1"
    pins, wrong = read_lock(options.lock.read_text())
    further: list[Pin] = []
    for path in options.further:
        more, wrong_there = read_lock(path.read_text())
        further, wrong = further + more, wrong + wrong_there
    different = differences(pins, further, installed_packages())
    known, unasked = advisories([options.lock, *options.further], options.uv)
    for heading, findings in (("lock", wrong), ("environment", different), ("advisories", known)):
        for finding in findings:
            print(f"{heading}: {finding}")
    here = sum(pin.is_for_here for pin in pins)
    print(f"{len(pins)} packages locked with hashes, {here} of them for this machine")
    if unasked is not None:
        print(f"advisories were not checked: no answer ({unasked})")
    elif not known:
        print(f"no advisory names any of the {here} versions")
    return 1 if wrong or different or known or (strict and unasked is not None) else 0


if __name__ == "__main__":
    sys.exit(main())
