"""A training of a second and how it is asked for: what the tests of `ccdist.train` and of recipes share."""

import json
from pathlib import Path
from typing import Any

import pytest

from ccdist import train

ROOT = Path(__file__).parent.parent
TINY = """
name: tiny
data: {name: digits, validation: 0.24, train_images: 600, validation_images: 40}
threat: {norm: linf, epsilon: 1/20}
network: {name: mlp, width: 16}
teacher:
  epochs: 20
  attack: {steps: 6, step_size: 0.25}
  precision: {attack: float32}
student:
  epochs: 25
  loss: {kind: cc_dist, alpha: 0.3, beta: 5}
  attack: {steps: 6, step_size: 0.25}
  precision: {attack: float32}
verification: {attack: {steps: 3, step_size: 0.3}}
seed: 3
"""
QUICK = ["--set", "teacher.epochs=1", "--set", "student.epochs=2"]


def run(*arguments: Any) -> int:
    return train.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 2) -> str:
    """The one line that the command answers with."""
    assert run(*arguments) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert line.startswith("error: ")
    return line.strip()


def curves(out: Path) -> list[dict[str, Any]]:
    file = out / "curves.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
