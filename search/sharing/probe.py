"""A trial in small: a few batches of teacher and student at the target epsilon, some images through every rung.

What `search.run --dry-run`, `search.pack` and `search.doctor --cluster` measure before a search is started.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ccdist.config import NetworkConfig, StudentConfig, VerifyConfig
from ccdist.data import Dataset, ImageSet, load_dataset, num_batches, to_pixels
from ccdist.device_usage import Usage, used
from ccdist.networks import Network, build_network
from ccdist.recipe import Recipe
from ccdist.training import train_student, train_teacher
from ccdist.verification import verify
from search.config import SearchConfig
from search.errors import UserError
from search.scheduling.budget import SECONDS_PER_HOUR
from search.space import Space
from search.trials.verifying import LARGEST_CHUNK

# Batches of an epoch that is measured: a few seconds on a laptop. The first of two epochs pays for warming up.
PROBE_BATCHES, PROBE_EPOCHS = 3, 2
# Its time is a limit, and its memory is chosen by what is free: neither tells anything here.
_NOT_PROBED = "branch_and_bound"


@dataclass(frozen=True)
class TrialSample:
    """What a probe computes on, and what the whole trial would.

    part: some batches to train on, and one chunk of images to verify.
    steps, teacher_steps, images: of the whole trial; teacher_steps are 0 where trials share one teacher.
    data_bytes: of all images, which a trial holds on its GPU.
    """

    name: str  # what of the space it is
    recipe: Recipe
    part: Dataset
    steps: int
    teacher_steps: int
    images: int
    data_bytes: int

    @classmethod
    def of(
        cls, name: str, recipe: Recipe, dataset: Dataset, *, own_teacher: bool, batches: int = PROBE_BATCHES
    ) -> "TrialSample":
        """The sample of a trial with its own teacher, or one that others have trained."""
        teacher_steps = num_batches(len(dataset.train), recipe.teacher.batch_size) * recipe.teacher.epochs
        chunk = min(len(dataset.validation), max(LARGEST_CHUNK, recipe.verification.batch_size))
        part = replace(training_part(dataset, recipe, batches), validation=_first(dataset.validation, chunk))
        return cls(
            name,
            recipe,
            part,
            num_batches(len(dataset.train), recipe.student.batch_size) * recipe.student.epochs,
            teacher_steps if own_teacher and recipe.needs_teacher else 0,
            len(dataset.validation),
            sum(part.images.nbytes for part in (dataset.train, dataset.validation)),
        )

    @property
    def batches(self) -> int:
        """Steps of an epoch of the sample's student."""
        return num_batches(len(self.part.train), self.recipe.student.batch_size)

    def chunk(self, device: torch.device) -> torch.Tensor:
        """Pixels of the images that a trial verifies at once on this device."""
        size = self.recipe.verification.batch_size
        size = min(size, LARGEST_CHUNK) if device.type == "cpu" else size
        return to_pixels(self.part.validation.images[:size]).to(device)

    def trial_seconds(self, step: float, image: float, teacher_step: float) -> float:
        """Seconds of a whole trial from those of a step of its student, an image, and a step of its teacher."""
        return self.steps * step + self.images * image + self.teacher_steps * teacher_step


@dataclass(frozen=True)
class TrialUsage:
    """What one trial took, alone on its device.

    phases: teacher (if it reads one), student, and each rung.
    """

    sample: str
    phases: Mapping[str, Usage]
    step: float  # seconds
    teacher_step: float
    image: float  # seconds through every rung
    seconds: float  # of a whole trial

    @property
    def host_bytes(self) -> int:
        return max(usage.host_bytes for usage in self.phases.values())

    @property
    def device_bytes(self) -> int:
        return max(usage.device_bytes for usage in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """Where most memory was held: of the GPU, if there is one."""
        by_device = self.device_bytes > 0
        return max(self.phases, key=lambda name: _bytes(self.phases[name], by_device=by_device))

    @property
    def cores(self) -> float:
        """Cores that a step of the student kept busy."""
        return self.phases["student"].cores

    @property
    def per_hour(self) -> float:
        """Trials of one slot in an hour."""
        return SECONDS_PER_HOUR / self.seconds


class DataError(UserError):
    """The data set cannot be used as asked."""


def searched_data(config: SearchConfig) -> Dataset:
    """The images of a search.

    Raises:
        DataError: they are not to be found, or not as asked.
    """
    try:
        return load_dataset(config.data)
    except ValueError as error:
        raise DataError(" ".join(str(error).split())) from error


def trial_samples(space: Space, dataset: Dataset) -> tuple[TrialSample, TrialSample | None]:
    """A typical trial, and the largest corner of a space whose trials differ in size."""
    recipe = space.recipe(typical(space), 0)
    own_teacher = searches_teacher(space)
    sample = TrialSample.of(f"first point: {network_name(recipe)}", recipe, dataset, own_teacher=own_teacher)
    corner = largest_corner(space, dataset)
    if corner is None:
        return sample, None
    largest = space.recipe(corner, 0)
    name = f"largest corner: {network_name(largest)}"
    return sample, TrialSample.of(name, largest, dataset, own_teacher=own_teacher)


def measure_trial(sample: TrialSample, device: torch.device) -> TrialUsage:
    """Run the sample in this process, which should do nothing else.

    Raises:
        torch.OutOfMemoryError, MemoryError: it does not fit.
    """
    recipe, part, phases = sample.recipe, sample.part, dict[str, Usage]()
    teacher, teacher_step = None, 0.0
    if recipe.needs_teacher:
        with used(device) as phases["teacher"]:
            teacher_step, teacher = timed_teacher(part, recipe, device)
    with used(device) as phases["student"]:
        step, network = timed_student(part, recipe, teacher, device)
    images, image = sample.chunk(device), 0.0
    for rung, climb in rungs(network, images, recipe.verification):
        with used(device) as phases[rung]:
            climb()
        image += phases[rung].seconds / len(images)
    if device.type == "cuda":  # a trial has all images there
        rest = max(0, sample.data_bytes - part.train.images.nbytes)
        for usage in phases.values():
            usage.device_bytes += rest
    seconds = sample.trial_seconds(step, image, teacher_step)
    return TrialUsage(sample.name, phases, step, teacher_step, image, seconds)


def timed_teacher(part: Dataset, recipe: Recipe, device: torch.device) -> tuple[float, Network]:
    """Seconds of a batch, and a teacher that has seen a few."""
    epochs: list[float] = []
    config = recipe.teacher.model_copy(update={"epochs": PROBE_EPOCHS})
    result = train_teacher(
        part, recipe.threat, config, device=device, on_epoch=lambda report: epochs.append(report.seconds)
    )
    return epochs[-1] / num_batches(len(part.train), config.batch_size), result.network


def timed_student(
    part: Dataset, recipe: Recipe, teacher: Network | None, device: torch.device
) -> tuple[float, Network]:
    """Seconds of a batch at the target epsilon, and a network as the search would train them."""
    epochs: list[float] = []
    config = at_target(recipe.student, PROBE_EPOCHS)
    result = train_student(
        part, recipe.threat, config, teacher, device=device, on_epoch=lambda report: epochs.append(report.seconds)
    )
    return epochs[-1] / num_batches(len(part.train), config.batch_size), result.network


def at_target(config: StudentConfig, epochs: int) -> StudentConfig:
    """So many epochs, all of them at the target epsilon, where a step computes everything that it ever does."""
    schedule = config.epsilon_schedule.model_copy(update={"warm_up": 0.0, "ramp": 0.0})
    return config.model_copy(update={"epochs": epochs, "epsilon_schedule": schedule})


def rungs(network: Network, images: torch.Tensor, config: VerifyConfig) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each rung with all images open, which is the most that it can cost; branch and bound is left out.

    The labels are the network's own predictions: one that has seen a few batches would misclassify most images, and
    its rungs would have nothing to do.
    """
    with torch.no_grad():
        labels = network(images).argmax(dim=1).cpu()
    for rung in config.rungs:
        if rung != _NOT_PROBED:
            alone = config.model_copy(update={"rungs": (rung,)})
            yield rung, partial(verify, network, images, labels, alone)


def training_part(dataset: Dataset, recipe: Recipe, batches: int = PROBE_BATCHES) -> Dataset:
    """The first batches of the training images."""
    return replace(
        dataset, train=_first(dataset.train, batches * max(recipe.student.batch_size, recipe.teacher.batch_size))
    )


def typical(space: Space) -> dict[str, Any]:
    """The first point that says enough for a trial, else a corner."""
    corner = next(iter(space.corners()))
    return next((point for point in space.points() if set(corner) <= set(point)), corner)


def searches_teacher(space: Space) -> bool:
    """Whether something that a teacher depends on is searched, so that each trial trains one of its own."""
    return any(parameter.path[0] in ("teacher", "network") for parameter in space.parameters.values())


def largest_corner(space: Space, dataset: Dataset) -> dict[str, Any] | None:
    """The corner that should take most memory; None where all trials have the same network and batch."""
    paths = [parameter.path for parameter in space.parameters.values()]
    if not any(path[0] == "network" or path[-1] == "batch_size" for path in paths):
        return None
    sizes: dict[tuple[NetworkConfig, int], int] = {}

    def size(params: Mapping[str, Any]) -> tuple[int, bool]:
        recipe = space.recipe(params, 0)
        key = (recipe.student.network, recipe.student.batch_size)
        if key not in sizes:
            sizes[key] = _numbers(recipe.student, dataset)
        return sizes[key], recipe.needs_teacher

    return max(space.corners(), key=size)


def network_name(recipe: Recipe) -> str:
    """The network and the batch as a reader knows them: cnn7, width 64, batches of 128."""
    network = recipe.student.network
    width = "" if network.width is None else f", width {network.width}"
    return f"{network.name}{width}, batches of {recipe.student.batch_size}"


def _numbers(student: StudentConfig, dataset: Dataset) -> int:
    """Numbers that a step holds, by order of size: weights, and the outputs of all layers for each image."""
    config = student.network
    network = build_network(
        config.name,
        width=config.width,
        activation=config.activation,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
    )
    outputs: list[int] = []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.numel()))
    with torch.no_grad():
        network(torch.zeros(1, *dataset.input_shape))
    return sum(parameter.numel() for parameter in network.parameters()) + student.batch_size * sum(outputs)


def _first(images: ImageSet, count: int) -> ImageSet:
    """A copy: a view would be sent to another process with all that lies behind it."""
    return ImageSet(images.images[:count].clone(), images.labels[:count].clone())


def _bytes(usage: Usage, *, by_device: bool) -> int:
    return usage.device_bytes if by_device else usage.host_bytes
