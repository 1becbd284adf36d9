"""The training of a trial's student, with the rungs on its way."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ccdist import checkpoint
from ccdist.config import StudentConfig, ThreatModel
from ccdist.data import Dataset, num_batches, to_pixels
from ccdist.networks import Network, build_network
from ccdist.training import EpochReport, OtherTrainingError, TrainingResult
from ccdist.training_loop import Phase
from ccdist.verification import quick_accuracies
from search.artifacts.places import TrialPlaces
from search.config import StoppingConfig
from search.recipe import Recipe
from search.studies.records import RungValues
from search.teachers import Teacher
from search.trials.reports import Reports
from search.trials.rung_values import Judge, PassedRung, RungLog, rung_epochs, stages
from tracking.journal import Journal

# Validation images behind the epoch curves: enough to see a trend, cheap next to an epoch.
PROBE_IMAGES = 512


class EpochLog:
    """Tells the journal and whoever follows the trial about every epoch."""

    def __init__(
        self, dataset: Dataset, threat: ThreatModel, device: torch.device, journal: Journal, reports: Reports
    ) -> None:
        images, labels = dataset.validation.images[:PROBE_IMAGES], dataset.validation.labels[:PROBE_IMAGES]
        # A curve over test images would be a look at them before the end.
        self._probe = None if dataset.split == "test" else (to_pixels(images).to(device), labels.to(device))
        self._threat, self._journal, self._reports = threat, journal, reports

    def __call__(self, report: EpochReport, stage: str | None = None) -> None:
        """Tell one epoch; stage: the rung that a shortened recipe leads to, None: it is the whole recipe."""
        prefix = _prefix(report.phase, stage)
        values = {f"{prefix}/{name}": value for name, value in report.metrics.items()}
        if report.phase == "student" and stage is None and self._probe is not None:
            standard, certified = quick_accuracies(report.network, *self._probe, self._threat)
            values |= {
                "validation/standard_accuracy": standard,
                "validation/ibp_certified_accuracy": certified,
            }
        values[f"{prefix}/epoch_seconds"] = report.seconds
        self._journal.metrics(report.epoch, values)
        phase = report.phase if stage is None else f"{report.phase} {stage}"
        self._reports.advanced(phase, report.epoch, report.epochs)

    def complete(self, phase: Phase, history: Sequence[Mapping[str, float]], stage: str | None = None) -> None:
        """Add the epochs that a kill kept from being told: a training saves its state, with their metrics, before."""
        prefix = _prefix(phase, stage)
        known = self._journal.steps(f"{prefix}/epoch_seconds")
        for epoch, metrics in enumerate(history, 1):
            if epoch not in known:
                self._journal.metrics(epoch, {f"{prefix}/{name}": value for name, value in metrics.items()})

    def rung(self, name: str, epoch: int, values: RungValues) -> None:
        """The rung at the end of an epoch: of the whole recipe's, or of a shortened one's last."""
        self._journal.metrics(
            epoch,
            {
                "rung/standard_accuracy": values.standard_accuracy,
                "rung/certified_accuracy": values.certified_accuracy,
                "rung/seconds": values.seconds,
            },
        )
        self._reports.rung(name, values)


def _prefix(phase: Phase, stage: str | None) -> str:
    return phase if stage is None else f"{phase}_{stage.replace('/', '_')}"


@dataclass
class StudentTraining:
    """Trains the student of one trial, from where an earlier run of it stopped.

    train: as `ccdist.training.train_student`.
    other_seconds: spent on the student beside its whole training: shortened recipes, measurements at rungs.
    """

    key: str
    recipe: Recipe
    stopping: StoppingConfig
    places: TrialPlaces
    dataset: Dataset
    device: torch.device
    teacher: Teacher | None
    log: EpochLog
    reports: Reports
    train: Callable[..., TrainingResult]
    other_seconds: float = 0.0
    training_seconds: float = 0.0
    passed: RungLog = field(init=False)

    def __post_init__(self) -> None:
        self.passed = RungLog(self.places.rungs)

    def run(self) -> tuple[Network, float]:
        """The trained student and its seconds, from disk if an earlier run of this trial finished it.

        A student that is there has been judged at all its rungs already, so none is told again.
        """
        places = self.places
        if places.student.exists():
            seconds = checkpoint.load_description(places.student)["metadata"]["seconds"]
            return checkpoint.load(places.student).to(self.device), seconds
        self.judge = Judge(self.dataset.validation, self.recipe.threat, self.device)
        if self.stopping.training == "fractions":
            for name, config in stages(self.recipe.student).items():
                self._stage(name, config)
        trained = self._whole()
        self.log.complete("student", trained.history)
        seconds = trained.seconds + self.other_seconds
        metadata = {
            "key": self.key,
            "seconds": seconds,
            "teacher": self.teacher.key if self.teacher else None,
            "recipe": self.recipe.model_dump(mode="json"),
            "history": trained.history,
        }
        checkpoint.save(places.student, trained.network, metadata)
        return trained.network, seconds

    def _whole(self) -> TrainingResult:
        student = self.recipe.student
        rungs: Mapping[int, str] = {}
        if self.stopping.training == "rungs":
            steps_per_epoch = num_batches(len(self.dataset.train), student.batch_size)
            rungs = rung_epochs(student, self.recipe.threat, steps_per_epoch)
            self._catch_up(rungs)

        def on_epoch(report: EpochReport) -> None:
            self.training_seconds += report.seconds
            self.log(report)
            if report.epoch in rungs:
                self._pass(rungs[report.epoch], report.epoch, report.network)

        return self._train(student, self.places.state, on_epoch)

    def _catch_up(self, rungs: Mapping[int, str]) -> None:
        """Tell the rungs again that an earlier run has passed, and judge the one that it was killed at."""
        for name in rungs.values():
            if (known := self.passed.passed.get(name)) is not None:
                self._tell_again(name, known)
        if not self.places.state.exists():
            return
        tensors, metadata = checkpoint.load_state(self.places.state)
        self.training_seconds, epoch = metadata["seconds"], metadata["epoch"]
        if epoch in rungs and rungs[epoch] not in self.passed.passed:
            self._pass(rungs[epoch], epoch, self._network_of(tensors))

    def _network_of(self, state: Mapping[str, torch.Tensor]) -> Network:
        config, dataset = self.recipe.student.network, self.dataset
        network = build_network(
            config.name,
            width=config.width,
            activation=config.activation,
            input_shape=dataset.input_shape,
            num_classes=dataset.num_classes,
            mean=dataset.mean,
            std=dataset.std,
        )
        own = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        network.load_state_dict(own)
        return network.to(self.device).eval()

    def _stage(self, name: str, config: StudentConfig) -> None:
        known = self.passed.passed.get(name)
        if known is not None:
            self._tell_again(name, known)
            return
        state = self.places.stages / name.replace("/", "-") / "state.safetensors"
        trained = self._train(config, state, lambda report: self.log(report, name))
        self.log.complete("student", trained.history, name)
        self.other_seconds += trained.seconds
        self._pass(name, config.epochs, trained.network)
        state.unlink(missing_ok=True)

    def _tell_again(self, name: str, known: PassedRung) -> None:
        self.other_seconds = known.other_seconds
        self.reports.rung(name, known.values)

    def _pass(self, name: str, epoch: int, network: Network) -> None:
        started = time.perf_counter()
        standard, certified = self.judge.accuracies(network)
        self.other_seconds += time.perf_counter() - started
        teacher_seconds = self.teacher.seconds if self.teacher else 0.0
        values = RungValues(standard, certified, teacher_seconds + self.training_seconds + self.other_seconds)
        self.passed.note(name, PassedRung(values, self.other_seconds))
        self.log.rung(name, epoch, values)

    def _train(self, config: StudentConfig, state: Path, on_epoch: Callable[[EpochReport], Any]) -> TrainingResult:
        train = partial(
            self.train,
            self.dataset,
            self.recipe.threat,
            config,
            self.teacher.network if self.teacher else None,
            device=self.device,
            state_path=state,
            on_epoch=on_epoch,
        )
        try:
            return train()
        except OtherTrainingError:  # begun by an earlier version of this program, or with a teacher that is lost
            state.unlink()
            self.training_seconds = 0.0
            return train()
