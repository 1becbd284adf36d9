"""SIGKILLs at random moments to drivers, workers and the tracking server of real searches: nothing may be lost.

What is checked stands in `benchmarks.kills`, which does the same hundreds of times.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from studies import result

from benchmarks.kills import KINDS, Round, front_faults, run_round, study_faults, undisturbed
from benchmarks.live_search import Server, wait_for
from search.studies.records import StudyRecord, TrialRecord

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder, folder / "server.log")
    server.start()
    yield server
    server.kill()


def disturbed(folder: Path, server: Server, kind: str, kills: dict[str, int]) -> Round:
    seed = random.SystemRandom().randrange(1, 10**6)
    targets = [target for target, count in kills.items() for _ in range(count)]
    random.Random(seed).shuffle(targets)
    print(f"seed {seed}, kind {kind}: {targets}")  # shown where the test fails
    wait_for(server.answers, "the tracking server answers")
    reference = undisturbed(folder, server, seed) if kind == "independent" else None
    return run_round(folder, server, kind, seed, targets, reference, longest_delay_s=1.5)


def test_twelve_kills_change_nothing(server: Server, tmp_path: Path) -> None:
    """Suggestions depend on their number only, so the front must be that of the undisturbed search."""
    plan = disturbed(tmp_path, server, "independent", {"driver": 2, "worker": 9, "server": 1})
    assert plan.faults == []
    assert plan.num_kills == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifteen_more_kills_change_nothing(kind: str, server: Server, tmp_path: Path) -> None:
    plan = disturbed(tmp_path, server, kind, {"driver": 5, "worker": 6, "server": 4})
    assert plan.faults == []
    assert plan.num_kills == 15


# ---- The checks see what they are for --------------------------------------------------------------------------


def record_of(*trials: TrialRecord) -> StudyRecord:
    return StudyRecord("digits", (0.0, 0.0), trials, "digits", "linf 1/10", 80, "ibp", 0.0)


def complete(number: int, standard: float = 0.9, certified: float = 0.5, **params: float) -> TrialRecord:
    told = result(standard, certified)
    return TrialRecord(
        f"digits-{number:04d}",
        number,
        "COMPLETE",
        {"alpha": 0.1 * number} | params,
        "",
        number,
        told.standard_accuracy,
        certified_accuracy=told.certified_accuracy,
        certified_upper=told.certified_accuracy,
        verification_state="finished",
    )


def test_lost_doubled_and_left_trials_are_faults() -> None:
    assert study_faults(record_of(complete(0), complete(1)), 2) == []
    assert "1 trials are done, 2 were asked for" in study_faults(record_of(complete(0)), 2)
    assert any("doubled" in fault for fault in study_faults(record_of(complete(0), complete(0)), 2))
    assert "a suggestion was repeated" in study_faults(record_of(complete(0), complete(1, alpha=0.0)), 2)
    left = TrialRecord("digits-0001", 1, "RUNNING", {}, "", 1)
    assert "digits-0001 is left RUNNING" in study_faults(record_of(complete(0), left), 1)
    failed = TrialRecord("digits-0001", 1, "FAILED", {}, "", 1, reason="ValueError: no")
    assert "digits-0001 failed: ValueError: no" in study_faults(record_of(complete(0), failed), 1)


def test_another_front_is_a_fault() -> None:
    reference = record_of(complete(0, 0.9, 0.5), complete(1, 0.8, 0.6))
    assert front_faults(reference, reference) == []
    assert front_faults(record_of(complete(0, 0.9, 0.5), complete(1, 0.8, 0.7)), reference)
    assert front_faults(record_of(complete(0, 0.9, 0.5), complete(1, 0.8, 0.6, alpha=3.0)), reference)
