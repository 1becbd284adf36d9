"""A real confirmation: the command, Ray with two workers, real trainings; killed in the middle and continued."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from studies import config_of, open_study, result

from benchmarks.live_search import FOREIGN_VARIABLES, PATIENCE_S, ROOT, kill_session, wait_for, workers_of
from ccdist import checkpoint
from ccdist.data import load_dataset, load_test_set, to_pixels
from ccdist.verification import accuracies
from search import confirm, front
from search.artifacts.places import TrialPlaces
from search.confirming.confirmation import SEED
from search.studies.records import StudyRecord
from search.study import load_record
from search.trials.verifying import load_verdicts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEST_IMAGES = 24
EPOCHS = 24  # a run takes about two seconds


@pytest.fixture
def ray_folder() -> Path:
    """A short path: Ray keeps sockets there, whose paths may have a hundred characters."""
    return Path(tempfile.mkdtemp(prefix="ray-"))


class Confirmation:
    """A finished search of two members, and the commands that confirm it."""

    def __init__(self, storage: Path, ray_folder: Path) -> None:
        self.storage, self.ray_folder = storage, ray_folder
        config = config_of(
            storage, student__epochs=EPOCHS, network__width=24, resources={"concurrency": 2}, budget={"trials": 2}
        )
        study = open_study(config, storage / "study.db", load_dataset(config.data).fingerprint)
        for standard, certified in ((0.9, 0.3), (0.8, 0.5)):
            study.tell(study.ask().number, result(standard, certified))

    def start(self, seeds: int) -> subprocess.Popen[str]:
        own = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
        arguments = ["tiny", "--storage", str(self.storage), "--seeds", str(seeds)]
        options = ["--test-images", str(TEST_IMAGES), "--timeout", "2"]
        return subprocess.Popen(
            [sys.executable, "-m", "search.confirm", *arguments, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=own | {"RAY_TMPDIR": str(self.ray_folder), "COLUMNS": "160"},
            start_new_session=True,
        )

    def run(self, seeds: int) -> str:
        driver = self.start(seeds)
        try:
            out, err = driver.communicate(timeout=PATIENCE_S)
        finally:
            kill_session(driver.pid)
        assert driver.returncode == 0, err
        return out

    def count(self, state: str) -> int:
        """Runs in one of Optuna's states, read beside the driver."""
        connection = sqlite3.connect(f"file:{self.storage / 'study.db'}?mode=ro", uri=True)
        query = (
            "SELECT count(*) FROM trials JOIN studies USING (study_id) WHERE state = ? AND study_name = 'tiny-confirm'"
        )
        try:
            return int(connection.execute(query, (state,)).fetchone()[0])
        finally:
            connection.close()

    def interrupt(self, with_signal: signal.Signals, *, group: bool) -> int:
        """Start, wait until one run is done and another is in the middle, and send the driver a signal -> exit code."""
        driver = self.start(2)
        try:
            wait_for(lambda: self.count("COMPLETE") >= 1 and self.in_the_middle(), "one run is done, another is not")
            if group:
                os.killpg(driver.pid, with_signal)  # as a terminal does
            else:
                os.kill(driver.pid, with_signal)
            code = driver.wait(PATIENCE_S)
            wait_for(lambda: workers_of(driver.pid) == [], "the workers are gone")
            return code
        finally:
            kill_session(driver.pid)
            driver.communicate()

    def in_the_middle(self) -> bool:
        return any(self.storage.glob("artifacts/tiny-confirm/trials/*/state.safetensors"))

    @property
    def record(self) -> StudyRecord:
        return load_record(f"sqlite:///{self.storage / 'study.db'}", "tiny-confirm")


def check_complete(confirmation: Confirmation, seeds: int) -> None:
    """Every pair once, each measured on the test images, from the student that lies there."""
    record = confirmation.record
    assert record.split == "test"
    assert {trial.state for trial in record.trials} == {"COMPLETE"}
    pairs = Counter((trial.configuration, trial.params[SEED]) for trial in record.trials)
    assert len(pairs) == 2 * seeds
    assert set(pairs.values()) == {1}
    teachers = list((confirmation.storage / "artifacts/teachers").glob("*/teacher.json"))
    assert len(teachers) == seeds, "one for each seed, shared by all members that read one"
    test = load_test_set(config_of(confirmation.storage).data, TEST_IMAGES)
    for trial in record.trials:
        places = TrialPlaces.of(confirmation.storage / "artifacts", "tiny-confirm", trial.key)
        verdicts = load_verdicts(places)
        measured = accuracies(verdicts)
        assert verdicts["label"].to_pylist() == test.labels.tolist()
        assert (measured.standard, measured.certified) == trial.objectives
        network = checkpoint.load(places.student)
        assert network(to_pixels(test.images)).argmax(1).tolist() == verdicts["prediction"].to_pylist()


def test_a_killed_confirmation_goes_on_and_is_extended(
    tmp_path: Path, ray_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    confirmation = Confirmation(tmp_path, ray_folder)
    assert confirmation.interrupt(signal.SIGKILL, group=False) == -signal.SIGKILL
    before = {trial.key: trial for trial in confirmation.record.trials if trial.state == "COMPLETE"}
    assert 1 <= len(before) < 4
    out = confirmation.run(2)
    assert f"{4 - len(before)} of 4 runs are left" in out
    check_complete(confirmation, 2)
    after = {trial.key: trial for trial in confirmation.record.trials}
    assert {key: after[key] for key in before} == before, "what was finished was not run again"

    folder = tmp_path / "artifacts" / "tiny-confirm"
    told = json.loads((folder / "confirm.json").read_text())
    assert [member["num_seeds"] for member in told["members"]] == [2, 2]
    assert "24 test images of digits" in (folder / "confirm.tex").read_text()
    arguments = ["tiny", "--storage", str(tmp_path)]
    assert confirm.main([*arguments, "--seeds", "2"]) == 0
    assert "has its 4 runs already" in capsys.readouterr().out
    assert front.main(["tiny-confirm", "--storage", str(tmp_path)]) == 0
    assert "24 test images of digits" in capsys.readouterr().out

    first = (folder / "confirm.json").read_bytes()
    out = confirmation.run(3)
    assert "2 of 6 runs are left" in out
    check_complete(confirmation, 3)
    assert (folder / "confirm.json").read_bytes() != first


def test_ctrl_c_stops_a_confirmation_that_the_same_command_ends(tmp_path: Path, ray_folder: Path) -> None:
    confirmation = Confirmation(tmp_path, ray_folder)
    assert confirmation.interrupt(signal.SIGINT, group=True) == confirm.INTERRUPTED
    assert (tmp_path / "artifacts/tiny-confirm/confirm.md").is_file(), "what is there is told"
    confirmation.run(2)
    check_complete(confirmation, 2)
