"""Several studies side by side: what may be compared, which of them are runs of one method, and what each attained.

Studies that differ in nothing but their seed are runs of one method. Numbers of different data, threats, splits or
references mean different things and are refused; what only makes them less comparable is said in a note.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from ccdist.config import fingerprint
from search.comparing.attainment import Attainment, Course, MeanCourse, attainment, mean_course
from search.comparing.comparability import ComparisonError, check_comparable, differs, flat
from search.config import ResourcesConfig
from search.results.configurations import Front, hypervolume_course, study_front
from search.scheduling.budget import accelerator_hours
from search.studies.records import StudyRecord
from search.studies.study_record import StoredStudy

ENDED = ("COMPLETE", "STOPPED", "FAILED")  # their costs are known
NAME_LENGTH = 100  # a longer name of a comparison is cut; a folder's may have 255 characters
LISTED = 3  # more differences than this are counted, not listed


@dataclass(frozen=True)
class ComparedStudy:
    """A study of a comparison: its front, and its hypervolume over the accelerator-hours that it had spent."""

    title: str  # as people call it: its name, or how it was asked for where two have one name
    stored: StoredStudy
    front: Front
    course: Course

    @classmethod
    def of(cls, title: str, stored: StoredStudy) -> "ComparedStudy":
        return cls(title, stored, study_front(stored.record), cost_course(stored.record, stored.config.resources))

    @property
    def record(self) -> StudyRecord:
        return self.stored.record

    @property
    def seed(self) -> int:
        return self.stored.config.search.seed


@dataclass(frozen=True)
class Method:
    """The runs of one method: studies that differ in their seed only."""

    label: str
    slug: str  # its name in metrics, which may not hold every sign
    studies: tuple[ComparedStudy, ...]  # by seed

    @property
    def num_runs(self) -> int:
        return len(self.studies)

    @cached_property
    def attained(self) -> Attainment:
        """Of the lower ends of the configurations' certified accuracies."""
        return attainment([[member.objectives for member in study.front.members] for study in self.studies])

    @cached_property
    def course(self) -> MeanCourse:
        return mean_course([study.course for study in self.studies])

    @property
    def hypervolumes(self) -> list[tuple[float, float]]:
        """Of each run, as an interval: lower ends count, undecided images could raise it to the upper."""
        return [study.front.hypervolume_bounds for study in self.studies]

    @property
    def hypervolume(self) -> float:
        """The mean of the lower ends."""
        return float(np.mean([low for low, _ in self.hypervolumes]))

    @property
    def hours(self) -> float:
        """The mean of what the runs spent."""
        return float(np.mean([study.course.total for study in self.studies]))


@dataclass(frozen=True)
class Comparison:
    """Methods whose numbers mean the same."""

    name: str
    methods: tuple[Method, ...]  # in the order they were asked for

    @property
    def studies(self) -> list[ComparedStudy]:
        return [study for method in self.methods for study in method.studies]

    @property
    def reference(self) -> tuple[float, float]:
        return self.studies[0].record.reference

    @property
    def common_hours(self) -> float:
        """The most accelerator-hours that every study spent."""
        return min(float(method.course.spent[-1]) for method in self.methods)

    def at_common_hours(self, method: Method) -> float:
        """The mean hypervolume of a method after those hours."""
        course = method.course
        return float(Course(course.spent, course.mean).at(self.common_hours))

    def hours_to_reach(self, method: Method, other: Method) -> float | None:
        """Accelerator-hours until the mean hypervolume of a method is the final one of another; None: never."""
        return method.course.first_to_reach(other.hypervolume)


# ---- one study -----------------------------------------------------------------------------------------------------


def cost_course(record: StudyRecord, resources: ResourcesConfig) -> Course:
    """Hypervolume of the lower ends after each trial that ended, over the accelerator-hours of these trials.

    In the order in which they ended; those whose time is not known, of studies of older versions, come first.
    """
    ended = [trial for trial in record.trials if trial.state in ENDED]
    ended.sort(key=lambda trial: (trial.finished_at or 0.0, trial.number))
    hours = list(accumulate(accelerator_hours([trial], resources) for trial in ended))
    complete = [trial for trial in ended if trial.objectives is not None]
    after = [0.0, *hypervolume_course(complete, record.reference).tolist()]
    counts = accumulate(trial.objectives is not None for trial in ended)
    return Course(np.array(hours), np.array([after[count] for count in counts]))


# ---- runs of one method --------------------------------------------------------------------------------------------


def compare(studies: Mapping[str, StoredStudy], labels: Mapping[str, str] | None = None) -> Comparison:
    """Group studies by method and compare them.

    Args:
        studies: by title.
        labels: of methods, by the name of their space file or of one of their studies, or its title.

    Raises:
        ComparisonError: they may not be compared, or a label belongs to none or several methods.
    """
    check_comparable(studies)
    grouped: dict[str, list[tuple[str, StoredStudy]]] = defaultdict(list)
    for title, stored in studies.items():
        grouped[fingerprint(_method_of(stored))].append((title, stored))
    groups = [sorted(group, key=lambda item: item[1].config.search.seed) for group in grouped.values()]
    methods = [
        Method(label, slug, tuple(ComparedStudy.of(*item) for item in group))
        for group, label, slug in zip(groups, _labels(groups), _slugs(groups), strict=True)
    ]
    return Comparison(_name(list(studies.values())), tuple(_relabelled(methods, labels or {})))


def _method_of(stored: StoredStudy) -> dict[str, Any]:
    """What runs of one method share: all that a result depends on, and how it was searched, but no seed."""
    config = stored.config
    search = config.search.model_dump(mode="json", exclude={"seed"})
    return config.identity | {"search": search, "stopping": config.stopping.model_dump(mode="json")}


_Group = list[tuple[str, StoredStudy]]


def _slugs(groups: Sequence[_Group]) -> list[str]:
    """The names of their space files, numbered where two have one."""
    seen: Counter[str] = Counter()
    slugs = []
    for group in groups:
        name = group[0][1].config.name
        seen[name] += 1
        slugs.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return slugs


def _labels(groups: Sequence[_Group]) -> list[str]:
    """The names of their space files; where two have one, with what tells them apart."""
    names = [group[0][1].config.name for group in groups]
    labels = list(names)
    for name, count in Counter(names).items():
        if count == 1:
            continue
        alike = [index for index, other in enumerate(names) if other == name]
        values = [dict(flat(_method_of(groups[index][0][1]))) for index in alike]
        differing = [path for path in dict.fromkeys(p for each in values for p in each) if differs(path, values)]
        for index, each in zip(alike, values, strict=True):
            shown = [f"{path.removeprefix('search.')} = {each.get(path)}" for path in differing[:LISTED]]
            labels[index] = f"{name} ({', '.join(shown)})"
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    slugs = _slugs(groups)
    return [f"{label}, {slugs[index]}" if label in repeated else label for index, label in enumerate(labels)]


def _relabelled(methods: Sequence[Method], labels: Mapping[str, str]) -> Iterator[Method]:
    """The methods with the labels that were asked for.

    Raises:
        ComparisonError: a label belongs to none or several methods, or two have one.
    """
    chosen: dict[int, str] = {}
    for name, label in labels.items():
        meant = [index for index, method in enumerate(methods) if name in _names_of(method)]
        if len(meant) != 1:
            known = ", ".join(dict.fromkeys(study.title for method in methods for study in method.studies))
            why = "names no method" if not meant else f"names {len(meant)} methods"
            raise ComparisonError(f"--label {name}={label}: {name} {why}; use one of {known}")
        chosen[meant[0]] = label
    result = [replace(method, label=chosen.get(index, method.label)) for index, method in enumerate(methods)]
    for label, count in Counter(method.label for method in result).items():
        if count > 1:
            raise ComparisonError(f"{count} methods have the label {label}; give each its own with --label NAME=TEXT")
    yield from result


def _names_of(method: Method) -> set[str]:
    names = {name for study in method.studies for name in (study.title, study.record.name)}
    return names | {method.slug, method.studies[0].stored.config.name}


def _name(studies: Sequence[StoredStudy]) -> str:
    """The comparison's name: the same for the same studies in any order."""
    names = sorted(stored.record.name for stored in studies)
    name = "-vs-".join(names)
    if len(set(names)) == len(names) and len(name) <= NAME_LENGTH:
        return name
    identifiers = sorted(stored.identifier for stored in studies)
    return f"{name[: NAME_LENGTH - 9]}-{fingerprint({'studies': identifiers})[:8]}"
