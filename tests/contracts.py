"""Promises that every implementation of an interface keeps: one test class for each interface."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import oracles
import pytest
import strategies
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from ccdist.bounds import UnsupportedLayerError
from ccdist.interval import Interval
from ccdist.networks import Network
from tracking.tracker import MetricRow, StudyInfo, Tracker

STUDY = StudyInfo("study-a", "digits-linf", {"owner": "me"}, {"width": 4}, "A search.")


@dataclass(frozen=True)
class TrialView:
    """What a tracker has kept of one trial. history: name of metric -> (step, value) in order of steps."""

    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    files: frozenset[str] = frozenset()


class TrackerContract:
    """Give a `tracker` fixture with nothing in it, and `observe`."""

    def observe(self, tracker: Tracker) -> dict[str, TrialView] | None:
        """The trials of STUDY by key, a doubled one under a second key; None: it keeps nothing."""
        raise NotImplementedError

    def check(self, tracker: Tracker, expected: dict[str, TrialView]) -> None:
        observed = self.observe(tracker)
        assert observed is None or observed == expected

    def test_a_whole_trial(self, tracker: Tracker, tmp_path: Path) -> None:
        weights = tmp_path / "weights.bin"
        weights.write_bytes(b"1")
        tracker.open_study(STUDY)
        tracker.start_trial("t1", {"alpha": 0.5}, {"host": "here"})
        tracker.log_metrics("t1", [MetricRow("loss", 2.0, 1000, 0), MetricRow("loss", 1.0, 2000, 1)])
        tracker.log_artifact("t1", weights, "models")
        tracker.end_trial("t1", "FINISHED", {"end": "complete"}, time_ms=3000)
        history = {"loss": [(0, 2.0), (1, 1.0)]}
        view = TrialView("FINISHED", {"alpha": "0.5"}, history, frozenset({"models/weights.bin"}))
        self.check(tracker, {"t1": view})

    def test_saying_it_twice_changes_nothing(self, tracker: Tracker) -> None:
        for _ in range(2):
            tracker.open_study(STUDY)
            tracker.start_trial("t1", {"alpha": 0.5}, {})
            tracker.log_metrics("t1", [MetricRow("loss", 2.0, 1000, 0)])
            tracker.end_trial("t1", "FAILED", {})
            tracker.log_study({"hypervolume": 0.1}, {"best": "t1"}, {}, step=1, time_ms=1000)
            tracker.close_study("FINISHED")
        self.check(tracker, {"t1": TrialView("FAILED", {"alpha": "0.5"}, {"loss": [(0, 2.0)]})})

    def test_a_retried_trial_runs_again(self, tracker: Tracker) -> None:
        tracker.open_study(STUDY)
        tracker.start_trial("t1", {}, {})
        tracker.end_trial("t1", "FAILED", {})
        tracker.start_trial("t1", {}, {})
        self.check(tracker, {"t1": TrialView("RUNNING")})

    def test_a_trial_may_start_with_any_message(self, tracker: Tracker) -> None:
        tracker.open_study(STUDY)
        tracker.log_metrics("t1", [MetricRow("loss", 2.0, 1000, 0)])
        tracker.end_trial("t2", "KILLED", {})
        views = {"t1": TrialView("RUNNING", {}, {"loss": [(0, 2.0)]}), "t2": TrialView("KILLED")}
        self.check(tracker, views)

    def test_stale_trials_are_killed(self, tracker: Tracker) -> None:
        tracker.open_study(STUDY)
        for key in ("done", "lost", "live"):
            tracker.start_trial(key, {}, {})
        tracker.end_trial("done", "FINISHED", {})
        closed = tracker.close_stale({"live"})
        views = {"done": TrialView("FINISHED"), "lost": TrialView("KILLED"), "live": TrialView("RUNNING")}
        self.check(tracker, views)
        assert closed == ([] if self.observe(tracker) is None else ["lost"])

    def test_files_of_the_study(self, tracker: Tracker, tmp_path: Path) -> None:
        (tmp_path / "figures").mkdir()
        (tmp_path / "figures" / "front.png").write_bytes(b"1")
        tracker.open_study(STUDY)
        artifacts = {"pictures": tmp_path / "figures", "tables/f.png": tmp_path / "figures" / "front.png"}
        tracker.log_study({}, {}, artifacts, description="![front](artifact:pictures/front.png)")
        self.check(tracker, {})  # files of the study are no trials

    def test_studies_do_not_mix(self, tracker: Tracker) -> None:
        tracker.open_study(StudyInfo("other", STUDY.experiment))
        tracker.start_trial("t1", {"alpha": 1}, {})
        tracker.open_study(STUDY)
        tracker.start_trial("t1", {"alpha": 2}, {})
        tracker.close_stale({"t1"})
        self.check(tracker, {"t1": TrialView("RUNNING", {"alpha": "2"})})

    def test_a_link_is_for_people_or_not_there(self, tracker: Tracker) -> None:
        tracker.open_study(STUDY)
        assert tracker.study_url() is None or str(tracker.study_url()).startswith("http")


# Bounds and samples are computed in float64 along different routes; their rounding differs by some 1e-15 of values
# that reach a few hundred in the drawn networks.
BOUND_ROUNDING = 1e-10

# The same inherited test runs in several classes, each with its own bound.
inherited = settings(suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])


class BoundContract:
    """Give `lower_bounds`: sound lower bounds of z[y] - z[j] over a box."""

    def lower_bounds(self, network: Network, box: Interval, labels: Tensor) -> Tensor:
        raise NotImplementedError

    @inherited
    @given(case=strategies.cases())
    def test_no_sampled_point_is_below_the_bound(self, case: strategies.Case) -> None:
        bound = self.lower_bounds(case.network, case.box, case.labels)
        points = oracles.sample_box(case.box, 64, torch.Generator().manual_seed(case.seed))
        for sample in points:
            differences = oracles.logit_differences(case.network(sample), case.labels)
            assert (differences >= bound - BOUND_ROUNDING * (1 + bound.abs())).all()

    @inherited
    @given(case=strategies.cases())
    def test_no_attacked_point_is_below_the_bound(self, case: strategies.Case) -> None:
        bound = self.lower_bounds(case.network, case.box, case.labels)
        start = case.box.center
        for point in oracles.pgd(case.network, start, case.labels, case.box, steps=5, step_size=0.5):
            differences = oracles.logit_differences(case.network(point), case.labels)
            assert (differences >= bound - BOUND_ROUNDING * (1 + bound.abs())).all()

    @inherited
    @given(case=strategies.cases())
    def test_a_point_box_gives_the_forward_pass(self, case: strategies.Case) -> None:
        bound = self.lower_bounds(case.network, Interval(case.images, case.images), case.labels)
        expected = oracles.logit_differences(case.network(case.images), case.labels)
        torch.testing.assert_close(bound, expected, rtol=BOUND_ROUNDING, atol=BOUND_ROUNDING)

    @inherited
    @given(case=strategies.cases())
    def test_shape_and_untouched_inputs(self, case: strategies.Case) -> None:
        before = [x.clone() for x in (case.box.lower, case.box.upper, case.labels, *case.network.state_dict().values())]
        bound = self.lower_bounds(case.network, case.box, case.labels)
        assert bound.shape == (len(case.labels), case.network.num_classes - 1)
        after = [case.box.lower, case.box.upper, case.labels, *case.network.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    @inherited
    @given(case=strategies.cases(batch=4))
    def test_images_do_not_mix(self, case: strategies.Case) -> None:
        together = self.lower_bounds(case.network, case.box, case.labels)
        box = Interval(case.box.lower[2:3], case.box.upper[2:3])
        alone = self.lower_bounds(case.network, box, case.labels[2:3])
        torch.testing.assert_close(together[2:3], alone, rtol=BOUND_ROUNDING, atol=BOUND_ROUNDING)

    def test_a_layer_used_twice_counts_twice(self) -> None:
        # x in [0, 1] -> relu(1 - x) in [0, 1] -> relu(-1 * that) = 0: both logits are their biases, 1 - 0 = 1.
        relu = nn.ReLU()
        first, second, head = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 2)
        network = Network(nn.Sequential(nn.Flatten(), first, relu, second, relu), head)
        with torch.no_grad():
            for layer, weight, bias in ((first, -1.0, 1.0), (second, -1.0, 0.0)):
                layer.weight.fill_(weight)
                layer.bias.fill_(bias)
            head.weight.copy_(torch.tensor([[1.0], [0.0]]))
            head.bias.copy_(torch.tensor([1.0, 0.0]))
        box = Interval(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
        assert self.lower_bounds(network, box, torch.tensor([0])).item() == 1.0

    def test_linear_layers_of_several_rows(self) -> None:
        """A Linear over the last of several dimensions, as many rows as other classes, as PyTorch allows."""
        generator = torch.Generator().manual_seed(0)
        layers = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Flatten())
        network = strategies.randomize(Network(layers, nn.Linear(9, 4)), generator)
        images = torch.rand((3, 3, 2), generator=generator, dtype=torch.float64)
        labels = torch.tensor([0, 1, 3])
        bound = self.lower_bounds(network, Interval(images, images), labels)
        expected = oracles.logit_differences(network(images), labels)
        torch.testing.assert_close(bound, expected, rtol=BOUND_ROUNDING, atol=BOUND_ROUNDING)

    def test_a_layer_without_a_rule_is_refused_by_name_and_place(self) -> None:
        network = Network(nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(2), nn.Flatten()), nn.Linear(1, 2))
        box = Interval(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
        with pytest.raises(UnsupportedLayerError, match=r"MaxPool2d at .*features.1"):
            self.lower_bounds(network, box, torch.tensor([0]))

    def test_train_mode_is_refused(self) -> None:
        network = Network(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)).train()
        box = Interval(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        with pytest.raises(ValueError, match="train mode"):
            self.lower_bounds(network, box, torch.tensor([0]))
