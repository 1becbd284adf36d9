"""The rungs of a training: when a trial is compared with others, and the cheap values that it is compared by.

Mode `rungs`: moments of one training after epsilon has reached its target. Mode `fractions`: trainings of their own
with a share of the epochs; durations in a recipe are shares too, so a short training is the same one, compressed.
"""

import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist import atomic_files
from ccdist.bounds import Trace, logit_difference_lower_bounds, propagate
from ccdist.config import StudentConfig, ThreatModel
from ccdist.data import ImageSet, to_pixels
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.threats import perturbation_set
from ccdist.training_step import EpsilonSchedule
from search.studies.records import RungValues

# Shares of the epochs after the ramp's end, and of a recipe's epochs.
AFTER_RAMP = {"after-ramp 0": Fraction(0), "after-ramp 1/3": Fraction(1, 3), "after-ramp 2/3": Fraction(2, 3)}
STAGES = {"1/9": Fraction(1, 9), "1/3": Fraction(1, 3)}
# Enough to tell trials apart that all see the same images; linear bounds of so many cost less than most epochs.
RUNG_IMAGES = 512
# Images whose interval bounds are computed at once, and bytes of the linear functions of a batch in CROWN.
BATCH, CROWN_BYTES = 128, 64 * 2**20


def common_order(num_images: int) -> list[int]:
    """One random order of the validation images for all trials and studies: each prefix is a fair and equal sample."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(0)).tolist()


def rung_epochs(student: StudentConfig, threat: ThreatModel, steps_per_epoch: int) -> dict[int, str]:
    """The epochs (from 1) that end at a rung, and the rungs' names.

        rung of share s: the first epoch that ends at or after R + s (E - R)

    with E epochs, and R the moment in epochs when epsilon reaches its target. Of rungs that fall together the earliest
    stays; one on the last epoch is none, since the trial is complete there.
    """
    schedule = EpsilonSchedule(student.epsilon_schedule, threat, student.epochs * steps_per_epoch)
    ramp_end = Fraction(schedule.start + schedule.length, steps_per_epoch)
    rungs: dict[int, str] = {}
    for name, share in AFTER_RAMP.items():
        epoch = max(1, math.ceil(ramp_end + share * (student.epochs - ramp_end)))
        if epoch < student.epochs:
            rungs.setdefault(epoch, name)
    return rungs


def stages(student: StudentConfig) -> dict[str, StudentConfig]:
    """The shortened recipes that come first, by the rung at their end; none without an epoch, no two alike."""
    lengths: dict[int, str] = {}
    for name, share in STAGES.items():
        epochs = round(share * student.epochs)
        if 1 <= epochs < student.epochs:
            lengths.setdefault(epochs, name)
    return {name: student.model_copy(update={"epochs": epochs}) for epochs, name in lengths.items()}


class Judge:
    """Measures networks on the first `RUNG_IMAGES` validation images of the common order."""

    def __init__(self, validation: ImageSet, threat: ThreatModel, device: torch.device) -> None:
        chosen = common_order(len(validation))[:RUNG_IMAGES]
        self._images = to_pixels(validation.images[chosen]).to(device)
        self._labels = validation.labels[chosen].to(device)
        self._threat = threat

    def accuracies(self, network: Network) -> tuple[float, float]:
        """(standard accuracy, share certified by IBP or CROWN)."""
        correct, certified = 0, 0
        with exact_float32(), torch.no_grad():
            for images, labels in zip(self._images.split(BATCH), self._labels.split(BATCH), strict=True):
                right = network(images).argmax(1) == labels
                correct += int(right.sum())
                certified += _num_certified(network, images[right], labels[right], self._threat)
        return correct / len(self._labels), certified / len(self._labels)


def _num_certified(
    network: Network, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"], threat: ThreatModel
) -> int:
    """How many images IBP certifies, and CROWN of those that it leaves open: never fewer than by both on all."""
    if len(labels) == 0:
        return 0
    region = perturbation_set(images, threat.norm, threat.radius)
    proved = logit_difference_lower_bounds(network, region, labels).amin(1) > 0
    count, left = int(proved.sum()), ~proved
    size = _crown_batch(network, images[:1], threat)
    for some, theirs in zip(images[left].split(size), labels[left].split(size), strict=True):
        if len(theirs):  # of no images split() makes one empty part
            lower = crown_lower_bounds(network, perturbation_set(some, threat.norm, threat.radius), theirs)
            count += int((lower.amin(1) > 0).sum())
    return count


def _crown_batch(network: Network, image: Float[Tensor, "1 C H W"], threat: ThreatModel) -> int:
    """How many images CROWN takes at once: it holds a function on the widest layer for each other class."""
    trace = Trace()
    propagate(network.features, perturbation_set(image, threat.norm, threat.radius), trace=trace, name="features")
    widest = max(box.lower.numel() for _, box in trace.steps)
    return max(1, CROWN_BYTES // (4 * widest * (network.num_classes - 1)))


@dataclass(frozen=True)
class PassedRung:
    """A rung that a trial has reached.

    other_seconds: spent on the student up to here beside the training that goes on after it.
    """

    values: RungValues
    other_seconds: float


class RungLog:
    """The rungs that a trial has reached, on disk, so that it can tell them again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def passed(self) -> dict[str, PassedRung]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        return {name: PassedRung(RungValues(**each["values"]), each["other_seconds"]) for name, each in content.items()}

    def note(self, name: str, rung: PassedRung) -> None:
        self.passed[name] = rung
        self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(self._path, json.dumps({key: asdict(each) for key, each in self.passed.items()}))
