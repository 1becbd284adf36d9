"""The benchmark of verification: its tables agree with the ladder, and its two sides decide the same images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import verification
from benchmarks.verification import Tally, compare, main, survivors
from benchmarks.verification_models import ASSETS, MODELS, figures, stored_images
from ccdist import checkpoint
from ccdist.verdicts import Verdict

NAME, IMAGES = "digits_mlp", 30


@pytest.fixture
def case() -> verification.Case:
    model = MODELS[NAME]
    images, labels = stored_images(model)
    return verification.Case(NAME, checkpoint.load(ASSETS / NAME), images, labels, model.recipe.threat).of(
        range(IMAGES)
    )


@pytest.mark.timeout(60)
def test_a_reduced_run_tells_and_stores_every_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: verification.Case
) -> None:
    # Both are settings of the process that runs the tests.
    monkeypatch.setattr(verification, "keep_freed_memory", lambda: None)
    file, threads = tmp_path / "found.json", torch.get_num_threads()
    reduced = ["--repeats", "1", "--timeouts", "1", "--max-branches", "8", "--round-sizes", "4"]
    words = ["--model", NAME, "--images", str(IMAGES), "--threads", str(threads), *reduced, "--json", str(file)]
    assert main(words) == 0
    stored = json.loads(file.read_text())
    assert stored["command"] == f"python -m benchmarks.verification {' '.join(words)}"
    found = stored["models"][NAME]

    assert found["figures"] == figures(case.network, replace(MODELS[NAME], num_images=IMAGES))
    rungs = found["rungs"]
    assert rungs["ibp"]["certified"] == found["figures"]["ibp"]
    assert rungs["crown"]["certified"] == found["figures"]["crown"]
    assert rungs["crown"]["open"] == found["figures"]["open"]
    # No attack takes away what a bound proves.
    assert found["bounds"]["certified"] == rungs["alpha_crown"]["certified"]
    (limited,) = found["limits"]
    assert limited["entered"] == rungs["alpha_crown"]["open"]
    assert limited["certified"] + limited["falsified"] + limited["open"] == IMAGES
    assert limited["certified"] >= rungs["alpha_crown"]["certified"]
    assert found["survivors"]["survivors"] >= limited["certified"]
    for contest in found["batching"].values():
        if contest["images"] > 1:
            assert contest["batched"]["tally"]["certified"] == contest["one_at_a_time"]["tally"]["certified"]
            assert len(contest["ratios"]) == 1

    told = capsys.readouterr().out
    for heading in ("figures:", "rungs, n = 1", "time limits", "attack ensemble", "batching, n = 1", "s in all"):
        assert heading in told


def test_more_images_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "keep_freed_memory", lambda: None)
    words = ["--model", "mnist_cnn3", "--images", "101", "--threads", str(torch.get_num_threads())]
    with pytest.raises(ValueError, match="100 images are there, expected 101; --data DIR has more"):
        main(words)


def test_data_folder_gives_the_images_that_are_asked_for(case: verification.Case) -> None:
    args = verification._parser().parse_args(
        ["--model", "mnist_cnn3", "--images", "7", "--data", str(ASSETS / "images")]
    )
    model = replace(MODELS["mnist_cnn3"], num_images=7)
    with verification.image_folder(args) as folder:
        images, labels = stored_images(model, folder)
    expected, expected_labels = stored_images(model)
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)


def test_the_one_image_side_takes_its_fastest_round_size(
    case: verification.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only the work moves: 1 s a batched call, 2 s, 1 s and 3 s an image by round size."""
    now = [0.0]
    monkeypatch.setattr(verification.Clock, "now", lambda self: now[0])
    seconds = {None: 1.0, 16: 2.0, 64: 1.0, 256: 3.0}

    def work(some: verification.Case, round_size: int | None) -> Tally:
        now[0] += seconds[round_size]
        return Tally(certified=len(some.labels), branches=2)

    found = compare(case.of(range(4)), work, 3, round_sizes=(16, 64, 256), preparation=False)
    assert found["round_size"] == 64
    assert found["calibration"] == {"16": 8.0, "64": 4.0, "256": 12.0}
    assert found["ratios"] == [4.0, 4.0, 4.0]
    assert found["batched"]["tally"] == {"certified": 4, "falsified": 0, "open": 0, "branches": 2}
    assert found["one_at_a_time"]["tally"] == {"certified": 4, "falsified": 0, "open": 0, "branches": 8}


def test_preparation_is_taken_off_all_calls_but_the_first(
    case: verification.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(verification.Clock, "now", lambda self: now[0])
    made = verification.prepare(case)

    def prepare(_: verification.Case) -> object:
        now[0] += 0.25
        return made

    def work(some: verification.Case, round_size: int | None) -> Tally:
        prepare(some)
        now[0] += 1.0
        return Tally()

    monkeypatch.setattr(verification, "prepare", prepare)
    found = compare(case.of(range(5)), work, 2, round_sizes=(None,), preparation=True)
    assert found["preparation_seconds"] == 0.25
    assert found["one_at_a_time"]["seconds"] == [5.25, 5.25]  # 5 images and one preparation
    assert found["batched"]["seconds"] == [1.25, 1.25]


def test_survivors_are_the_same_whoever_is_asked(case: verification.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(self: verification.Case, rungs: tuple[str, ...], timeout_s: float | None = None) -> object:
        found = original(self, rungs, timeout_s)
        quick = found.ensemble.model_copy(update={"steps": 5, "targets": 2, "square_queries": 20})
        return found.model_copy(update={"ensemble": quick})

    original = verification.Case.config
    monkeypatch.setattr(verification.Case, "config", config)
    certified = verification.Climb.of(case, case.config(("ibp",))).rows(Verdict.CERTIFIED)
    some, everyone = (survivors(case, certified, ask_all=ask_all) for ask_all in (False, True))
    assert some["survivors"] == everyone["survivors"]
    assert (some["asked"], everyone["asked"]) == (IMAGES - len(certified), IMAGES)
    assert everyone["broken_though_certified"] == []
