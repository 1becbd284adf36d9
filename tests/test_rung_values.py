"""When rungs come, and what is measured there: against plain loops over steps and over single images."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ccdist.config import StudentConfig, ThreatModel
from ccdist.data import ImageSet, to_pixels
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import build_network
from ccdist.threats import perturbation_set
from ccdist.training_step import EpsilonSchedule
from search.studies.records import RungValues
from search.trials import rung_values
from search.trials.rung_values import Judge, PassedRung, RungLog, common_order, rung_epochs, stages

THREAT = ThreatModel(epsilon="1/10")


def student(epochs: int, warm_up: str = "0", ramp: str = "1/2") -> StudentConfig:
    return StudentConfig(
        epochs=epochs, loss={"kind": "cc_ibp", "alpha": 0.5}, epsilon_schedule={"warm_up": warm_up, "ramp": ramp}
    )


def test_rungs_by_hand() -> None:
    names = ["after-ramp 0", "after-ramp 1/3", "after-ramp 2/3"]
    assert rung_epochs(student(18), THREAT, 10) == dict(zip([9, 12, 15], names, strict=True))
    assert rung_epochs(student(160, "1/160", "1/2"), THREAT, 7) == dict(zip([81, 108, 134], names, strict=True))
    assert rung_epochs(student(2), THREAT, 10) == {1: names[0]}
    assert rung_epochs(student(4, "0", "0.51"), THREAT, 100) == {3: names[0]}  # the next one falls on it
    assert rung_epochs(student(9, "0", "0"), THREAT, 10) == dict(zip([1, 3, 6], names, strict=True))
    assert rung_epochs(student(4, "1/2", "1/2"), THREAT, 10) == {}
    assert rung_epochs(student(1), THREAT, 10) == {}


def test_the_first_rung_is_the_first_epoch_that_ends_at_the_target() -> None:
    shares = ["0", "0.07", "1/3", "1/2"]
    for epochs, steps, warm_up, ramp in itertools.product([3, 7, 20], [1, 9], shares, shares):
        config = student(epochs, warm_up, ramp)
        schedule = EpsilonSchedule(config.epsilon_schedule, THREAT, epochs * steps)
        # The step after an epoch's last is the first that sees what the schedule has reached by then.
        reached = [epoch for epoch in range(1, epochs) if schedule(epoch * steps + 1) == THREAT.radius]
        late = [epoch for epoch in reached if schedule.start + schedule.length <= epoch * steps]
        rungs = rung_epochs(config, THREAT, steps)
        assert list(rungs)[:1] == late[:1]
        assert all(epoch in late for epoch in rungs)


def test_stages_by_hand() -> None:
    def lengths(epochs: int) -> dict[str, int]:
        return {name: config.epochs for name, config in stages(student(epochs)).items()}

    assert lengths(18) == {"1/9": 2, "1/3": 6}
    assert lengths(160) == {"1/9": 18, "1/3": 53}
    assert lengths(3) == {"1/3": 1}
    assert lengths(5) == {"1/9": 1, "1/3": 2}
    assert lengths(1) == {}
    full = student(18)
    assert stages(full)["1/3"].epsilon_schedule == full.epsilon_schedule
    assert stages(full)["1/3"].seed == full.seed


def test_the_order_is_one_permutation() -> None:
    assert sorted(common_order(100)) == list(range(100))
    assert common_order(100) == common_order(100) != list(range(100))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_values_are_those_of_crown_or_ibp_on_every_image(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 1, 6, 6), generator=generator, dtype=torch.uint8)
    network = build_network("cnn3", input_shape=(1, 6, 6), num_classes=3, width=2, seed=1).eval().requires_grad_(False)
    network.head.bias -= network(to_pixels(images)).mean(0)  # so that each class is predicted
    labels = network(to_pixels(images)).argmax(1)
    labels[:10] = (labels[:10] + 1) % 3
    threat = ThreatModel(norm=norm, epsilon={"linf": "1/50", "l2": "1/20"}[norm])
    monkeypatch.setattr(rung_values, "RUNG_IMAGES", 30)
    monkeypatch.setattr(rung_values, "BATCH", 7)
    monkeypatch.setattr(rung_values, "CROWN_BYTES", 3000)  # a few images at once
    chosen = common_order(40)[:30]
    pixels = to_pixels(images[chosen])
    lower = crown_lower_bounds(network, perturbation_set(pixels, norm, threat.radius), labels[chosen])
    expected = int((lower.amin(1) > 0).sum()), sum(index >= 10 for index in chosen)
    assert 0 < expected[0] < expected[1]
    standard, certified = Judge(ImageSet(images, labels), threat, torch.device("cpu")).accuracies(network)
    assert (certified, standard) == (expected[0] / 30, expected[1] / 30)


def test_passed_rungs_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "trial" / "rungs.json"
    log, values = RungLog(path), RungValues(0.5, 0.25, 7.0)
    assert log.passed == {}
    log.note("1/9", PassedRung(values, 3.0))
    log.note("1/3", PassedRung(values, 4.0))
    assert list(RungLog(path).passed.items()) == [("1/9", PassedRung(values, 3.0)), ("1/3", PassedRung(values, 4.0))]
    assert set(json.loads(path.read_text())) == {"1/9", "1/3"}
    assert rung_values.AFTER_RAMP["after-ramp 1/3"] == Fraction(1, 3)
