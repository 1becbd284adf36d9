"""The README's code: what can run here runs, and every command is either in .ci/run or named below with a reason."""

import re
from pathlib import Path

import pytest
import yaml

from ccdist.config import VerificationOptions
from search.config import SearchConfig
from search.space import Space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NOT_IN_CI = {
    "make ui": "serves until stopped; tests/test_tracking_server.py starts it",
    "python -m search.run spaces/mnist.yaml --trials 4": "needs downloaded data",
    "python -m search.run spaces/cifar.yaml": "needs downloaded data and GPUs",
    "ray up ray_cluster.yaml": "needs a cloud account; tests/test_cluster_yaml.py checks the file",
    "python -m search.run spaces/cifar.yaml --address auto": "needs a cluster; tests/test_ray_up.py has one",
    "python -m search.run spaces/cifar.yaml --address http://127.0.0.1:8265 --detach": "tests/test_detached.py has one",
    "python -m search.front cifar --address http://127.0.0.1:8265": "tests/test_detached.py has one",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    joined = [block.replace("\\\n", " ") for block in blocks("bash")]
    lines = [line.split("#")[0].strip() for block in joined for line in block.splitlines()]
    return [" ".join(line.split()) for line in lines if line]


@pytest.mark.parametrize("command", commands())
def test_every_command_runs_in_ci_or_has_a_reason_not_to(command: str) -> None:
    if command in NOT_IN_CI:
        return
    # .ci/run stores in a folder of its own.
    words = [word for word in command.split() if word not in ("python", "--storage") and not word.startswith("runs")]
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    assert any(all(word in step.split() for word in words) for step in steps), command


def test_the_reasons_are_about_commands_that_exist() -> None:
    assert set(NOT_IN_CI) <= set(commands())


@pytest.mark.timeout(20)
def test_your_own_network_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "Residual" in block]
    exec(compile(code, "README.md", "exec"), {})
    assert "Accuracies(standard=" in capsys.readouterr().out


@pytest.mark.timeout(20)
def test_a_stored_network_is_verified(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = [block for block in blocks("python") if "load_test_set" in block]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "num_images=40" in printed
    assert re.search(r"certified=0\.[1-9]", printed), printed


def test_the_complete_rungs_are_valid_in_a_space_file() -> None:
    (text,) = [block for block in blocks("yaml") if block.startswith("verification:")]
    options = VerificationOptions.model_validate(yaml.safe_load(text)["verification"])
    assert options.rungs[-1] == "branch_and_bound"
    assert options.branch_and_bound.timeout_s == 20


def test_the_example_of_a_space_file_is_valid_once_completed() -> None:
    (text,) = [block for block in blocks("yaml") if "name: mine" in block]
    tree = yaml.safe_load(text)
    tree["teacher"] = {"epochs": 1}
    tree["student"]["epochs"] = 1
    tree["budget"] = {"trials": 1}
    assert list(Space(SearchConfig.model_validate(tree)).parameters) == ["alpha"]
