"""How a study's numbers are spelled, in the terminal, on the page and in its figures."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from search.results.configurations import Configuration, Front, open_share
from search.studies.records import StudyRecord, TrialRecord

ABSENT = "-"  # in tables: the trial does not have the parameter
DOUBTFUL = "?"  # behind a member that may not be on the front
LISTED = 5  # more configurations than this are counted, not listed


# ---- What is shown ---------------------------------------------------------------------------------------------


def by_standard_accuracy(members: Iterable[Configuration]) -> list[Configuration]:
    """The best standard accuracy first."""
    return sorted(members, key=lambda member: (-member.standard_accuracy, member.number))


def spread(members: Sequence[Configuration], most: int) -> list[Configuration]:
    """At most so many members of a front in the order given: both ends, and between them equally far apart on it."""
    if len(members) <= most:
        return list(members)
    points = np.array([member.objectives for member in members])
    # Distances in shares of what the front spans in either objective, so that units and ranges do not matter.
    steps = np.abs(np.diff(points, axis=0)) / np.maximum(np.ptp(points, axis=0), np.finfo(float).tiny)
    places = np.concatenate([[0.0], np.cumsum(steps.sum(axis=1))])
    wanted = np.linspace(0.0, places[-1], most)
    return [members[index] for index in sorted({int(np.abs(places - place).argmin()) for place in wanted})]


def varied_parameters(trials: Iterable[TrialRecord]) -> list[str]:
    """Names of the parameters with more than one value among these trials (of one trial: all), in order."""
    given = [trial.params for trial in trials if trial.params]
    names = dict.fromkeys(name for params in given for name in params)
    if len(given) < 2:
        return list(names)
    return [name for name in names if any(repr(a.get(name)) != repr(b.get(name)) for a, b in pairwise(given))]


def shared_parameters(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """The parameters that `varied_parameters` leaves out, which have one value in all these trials."""
    varied = set(varied_parameters(trials))
    return {name: value for trial in trials for name, value in trial.params.items() if name not in varied}


# ---- The study -------------------------------------------------------------------------------------------------


def setting(found: Front) -> str:
    """What every figure and table has to say about its numbers."""
    study, counts = found.study, [each.num_seeds for each in found.configurations]
    fewest, most = min(counts, default=1), max(counts, default=1)
    seeds = f"{fewest} to {most}" if fewest < most else f"{most}"
    point = "n = 1 seed" if most == 1 else f"the mean of n = {seeds} seeds"
    return (
        f"{images_text(study)} of {study.dataset}; threat: {study.threat}; "
        f"verifier: {study.verifier}; each point: {point}."
    )


def images_text(study: StudyRecord) -> str:
    """How many images of which split the accuracies are fractions of; without a number while no trial has told it."""
    return f"{study.num_images:,} {study.split} images" if study.num_images else f"{study.split} images"


def front_summary(found: Front) -> str:
    trials, points = len(found.study.complete), len(found.configurations)
    if not trials:
        return "no complete trial yet"
    of = f"{trials:,} complete {_plural('trial', trials)}"
    if points < trials:
        of = f"{points:,} {_plural('configuration', points)} ({of})"
    return f"{len(found.members):,} of {of} on the front"


def hypervolume_summary(found: Front) -> str:
    x, y = found.study.reference
    return f"hypervolume {hypervolume_text(found)} above ({x:g}, {y:g})"


def hypervolume_text(found: Front) -> str:
    """The hypervolume, or its bounds where undecided images could still change it."""
    low, high = (f"{bound:.4f}" for bound in found.hypervolume_bounds)
    return low if low == high else f"{low} to {high}"


def stopped_summary(study: StudyRecord) -> str:
    """How many trials were stopped early and what share of a finished one's seconds they took; empty if none were."""
    stopped = [trial for trial in study.trials if trial.state == "STOPPED"]
    if not stopped:
        return ""
    text = f"{len(stopped):,} of {len(study.done):,} {_plural('trial', len(study.done))} stopped early"
    spent = [seconds for trial in stopped if (seconds := seconds_spent(trial)) is not None]
    whole = [trial.seconds for trial in study.complete if trial.seconds is not None]
    if not spent or not sum(whole):
        return text
    share = (sum(spent) / len(spent)) / (sum(whole) / len(whole))
    return f"{text} after {100 * share:.0f} % of the seconds of a finished one"


def seconds_spent(trial: TrialRecord) -> float | None:
    """Seconds of a trial; of one that was stopped without a total, those up to its last rung."""
    if trial.seconds is None and trial.rungs:
        return list(trial.rungs.values())[-1].seconds
    return trial.seconds


def doubts(found: Front) -> list[str]:
    """What undecided images leave open about the front, in sentences; none when all of it is certain."""
    sentences = []
    if found.doubtful:
        sentences.append(f"\u201c{DOUBTFUL}\u201d: undecided images of another trial could push it off the front.")
    if found.possible:
        likeliest = sorted(found.possible, key=lambda each: (-each.certified_upper, each.number))
        listed = [_interval_text(each) for each in likeliest[:LISTED]]
        more = f", and {len(likeliest) - LISTED:,} more" if len(likeliest) > LISTED else ""
        sentences.append(f"Possibly on the front, by their undecided images: {', '.join(listed)}{more}.")
    return sentences


def _interval_text(member: Configuration) -> str:
    certified = _interval(member.certified_accuracy, member.certified_upper)
    return f"{member.trials[0].key} ({member.standard_accuracy:.4f}, {certified})"


def open_text(trial: TrialRecord, num_images: int) -> str:
    """Why the certified accuracy of a trial is an interval; empty if it is not."""
    undecided = round(open_share(trial) * (trial.num_images or num_images))
    if not undecided:
        return ""
    text = f"{undecided:,} {_plural('image', undecided)} undecided"
    return f"{text}; verification stopped: {trial.reason}" if trial.verification_state == "stopped" else text


def rungs_text(trial: TrialRecord) -> str:
    """What a trial had shown when its training reached its last rung; empty without one."""
    if not trial.rungs:
        return ""
    name, values = list(trial.rungs.items())[-1]
    standard, certified = _fraction(values.standard_accuracy), _fraction(values.certified_accuracy)
    return f"at {name}: standard {standard}, certified {certified}, after {_seconds(values.seconds)} s"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def keys_text(found: Front, member: Configuration) -> str:
    """The keys of a member's trials, one a line, and whether its place on the front is in doubt."""
    first, *others = (trial.key for trial in member.trials)
    mark = f" {DOUBTFUL}" if member.number in found.doubtful else ""
    return "\n".join([first + mark, *others])


# ---- One trial -------------------------------------------------------------------------------------------------


def value_text(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def parameters_text(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value_text(value)}" for name, value in params.items())


def parameter_text(trial: TrialRecord, name: str, digits: int = 4) -> str:
    return value_text(trial.params[name], digits) if name in trial.params else ABSENT


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class ResultsText(NamedTuple):
    """A trial's results, each empty while it is unknown; of several seeds the means, and below them the range."""

    standard: str
    adversarial: str
    certified: str  # the proved share, and what it could still become where images are left undecided
    seconds: str


def results_text(trial: TrialRecord) -> ResultsText:
    return ResultsText(
        _fraction(trial.standard_accuracy),
        _fraction(trial.adversarial_accuracy),
        _interval(trial.certified_accuracy, trial.certified_upper),
        _seconds(trial.seconds),
    )


def means_text(member: Configuration) -> ResultsText:
    if member.num_seeds == 1:
        return results_text(member.trials[0])
    return ResultsText(
        f"{_fraction(member.standard_accuracy)}\n{_range(member.standard_range)}",
        _fraction(_mean([trial.adversarial_accuracy for trial in member.trials])),
        f"{_interval(member.certified_accuracy, member.certified_upper)}\n{_range(member.certified_range)}",
        _seconds(_mean([trial.seconds for trial in member.trials])),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _interval(low: float | None, high: float | None) -> str:
    lower, upper = _fraction(low), _fraction(high)
    return f"{lower}\u2013{upper}" if lower and upper and lower != upper else lower


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}"


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
