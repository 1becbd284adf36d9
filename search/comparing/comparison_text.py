"""How a comparison is spelled: its setting, its notes, its tables for terminal and page, and its numbers as JSON."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from search.comparing.attainment import FEW, band_runs, median_runs
from search.comparing.comparability import differs, flat
from search.comparing.comparison import LISTED, ComparedStudy, Comparison, Method
from search.config import ResourcesConfig
from search.results.report_text import images_text

NEVER = "never"
NOTHING = "-"


# ---- what every figure has to say ----------------------------------------------------------------------------------


def setting(comparison: Comparison) -> str:
    """What every figure and table has to say about its numbers."""
    record, (x, y) = comparison.studies[0].record, comparison.reference
    trials = sum(len(study.record.complete) for study in comparison.studies)
    runs = ", ".join(f"{method.label} n = {method.num_runs}" for method in comparison.methods)
    verifiers = dict.fromkeys(study.record.verifier for study in comparison.studies)
    return (
        f"{trials:,} complete trials of {len(comparison.studies)} studies (seeds: {runs}); "
        f"{images_text(record)} of {record.dataset}; threat: {record.threat}; "
        f"verifier: {' or '.join(verifiers)}; hypervolume above ({x:g}, {y:g})."
    )


def band_text(num_runs: int) -> str:
    """What a band of so many runs is, in words."""
    if num_runs < FEW:
        return f"from the worst to the best of {num_runs} runs"
    upper, lower = band_runs(num_runs)
    return f"attained by at least {lower} of {num_runs} runs (lower edge) to at least {upper} (upper edge)"


def median_text(num_runs: int) -> str:
    return f"attained by at least half of the runs ({median_runs(num_runs)} of {num_runs})"


# ---- notes ---------------------------------------------------------------------------------------------------------


def notes(comparison: Comparison) -> list[str]:
    """What makes these numbers less comparable than they look, in sentences."""
    return [*_settings_notes(comparison), *_runs_notes(comparison), *_trials_notes(comparison)]


def _settings_notes(comparison: Comparison) -> Iterator[str]:
    studies = comparison.studies
    ladders = {study.title: dict(flat(study.stored.config.verification.model_dump(mode="json"))) for study in studies}
    if text := _differences(ladders):
        yield f"Verification differs, so certified accuracies are not proved with equal effort: {text}."
    shares = {study.title: _share(study.stored.config.resources) for study in studies}
    if len(set(shares.values())) > 1:
        held = ", ".join(f"{share} in {title}" for title, share in shares.items())
        yield f"Accelerator-hours are hours times what a trial holds, which differs: {held}."


def _runs_notes(comparison: Comparison) -> Iterator[str]:
    for method in comparison.methods:
        if method.num_runs == 1:
            yield f"{method.label} is one study (n = 1): another seed may differ as much as two methods do."
        if method.num_runs == 2:
            yield f"{method.label} has two studies: its line is the better of both at each place."
        for seed, count in Counter(study.seed for study in method.studies).items():
            if count > 1:
                yield f"{count} studies of {method.label} have the seed {seed}: they are not independent."
        done = {study.title: len(study.record.done) for study in method.studies}
        if len(set(done.values())) > 1:
            counts = ", ".join(f"{count} in {title}" for title, count in done.items())
            yield f"Runs of {method.label} have different numbers of finished trials: {counts}."


def _trials_notes(comparison: Comparison) -> Iterator[str]:
    studies = comparison.studies
    states = {study.title: Counter(trial.state for trial in study.record.trials) for study in studies}
    untimed = {study.title: sum(trial.finished_at is None for trial in study.record.complete) for study in studies}
    if text := _counts({title: count["RUNNING"] for title, count in states.items()}):
        yield f"Unfinished trials are neither shown nor counted: {text}."
    if text := _counts({title: count["FAILED"] for title, count in states.items()}):
        yield f"Failed trials count their cost up to their last rung only: {text}."
    if text := _counts(untimed):
        yield f"Trials whose time of finishing is not known come first: {text}."
    if any(low != high for method in comparison.methods for low, high in method.hypervolumes):
        yield "Undecided images leave certified accuracies as intervals: their lower ends, what is proved, count."


def _counts(counts: Mapping[str, int]) -> str:
    """How many in which study; empty if there are none."""
    listed = [f"{count:,} in {title}" for title, count in counts.items() if count]
    more = f" and {len(listed) - LISTED} more studies" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + more


def _share(resources: ResourcesConfig) -> str:
    return f"{resources.gpu:g} GPUs" if resources.gpu else f"{resources.cpu:g} cores"


def _differences(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Each setting that is not the same for all, with its values by title; empty if all are."""
    values = list(settings.values())
    paths = [path for path in dict.fromkeys(path for each in values for path in each) if differs(path, values)]
    texts = []
    for path in paths[:LISTED]:
        titles: dict[str, list[str]] = defaultdict(list)
        for title, each in settings.items():
            titles[str(each.get(path))].append(title)
        texts.append(f"{path} is " + ", ".join(f"{value} in {' and '.join(of)}" for value, of in titles.items()))
    more = f"; and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return "; ".join(texts) + more


# ---- tables --------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A table: the first column is text, the others are numbers."""

    heads: list[str]
    cells: list[list[str]]


def results_rows(comparison: Comparison) -> Rows:
    """What each method reached, and what it spent; trials are those that count, COMPLETE and STOPPED."""
    common = f"at {_hours_text(comparison.common_hours)} h"
    heads = ["method", "runs", "trials", "hypervolume", "up to", "range over runs", common, "hours"]
    rows = []
    for method in comparison.methods:
        lows, highs = zip(*method.hypervolumes, strict=True)
        rows.append(
            [
                method.label,
                f"{method.num_runs}",
                f"{sum(len(study.record.done) for study in method.studies):,}",
                f"{method.hypervolume:.4f}",
                f"{sum(highs) / method.num_runs:.4f}",
                f"{min(lows):.4f}\u2013{max(lows):.4f}" if method.num_runs > 1 else NOTHING,
                f"{comparison.at_common_hours(method):.4f}",
                _hours_text(method.hours),
            ]
        )
    return Rows(heads, rows)


def reach_rows(comparison: Comparison) -> Rows:
    """Accelerator-hours until each method's mean hypervolume reached the final one of each other."""
    heads = ["hours until", *(f"final of {method.label}" for method in comparison.methods)]
    rows = []
    for method in comparison.methods:
        cells = []
        for other in comparison.methods:
            hours = comparison.hours_to_reach(method, other)
            cells.append(NOTHING if other is method else NEVER if hours is None else _hours_text(hours))
        rows.append([method.label, *cells])
    return Rows(heads, rows)


def studies_rows(comparison: Comparison) -> Rows:
    """Each study by itself."""
    heads = ["study", "method", "seed", "complete", "stopped", "failed", "front", "hypervolume", "hours"]
    rows = []
    for method in comparison.methods:
        for study in method.studies:
            states: Counter[str] = Counter(trial.state for trial in study.record.trials)
            counts = [f"{states[state]:,}" for state in ("COMPLETE", "STOPPED", "FAILED")]
            interval = _interval_text(*study.front.hypervolume_bounds)
            members = f"{len(study.front.members):,}"
            hours = _hours_text(study.course.total)
            rows.append([study.title, method.label, f"{study.seed}", *counts, members, interval, hours])
    return Rows(heads, rows)


def _hours_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 1000 else f"{hours:.3g}"


def _interval_text(low: float, high: float) -> str:
    lower, upper = f"{low:.4f}", f"{high:.4f}"
    return lower if lower == upper else f"{lower}\u2013{upper}"


class ComparisonTable:
    """The tables of a comparison for a terminal, with its notes."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        # Text, not str: a label in square brackets is no markup.
        yield Text("Final hypervolume (mean of lower ends over runs) and accelerator-hours", style="bold")
        yield _terminal_table(results_rows(self._comparison))
        yield Text()
        if len(self._comparison.methods) > 1:
            yield Text("Accelerator-hours until the mean hypervolume reached another's final one", style="bold")
            yield _terminal_table(reach_rows(self._comparison))
            yield Text()
        yield Text("\n".join([setting(self._comparison), *notes(self._comparison)]), style="dim")


def _terminal_table(rows: Rows) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, head in enumerate(rows.heads):
        justify: Any = "left" if index == 0 else "right"
        table.add_column(Text(head), justify=justify, vertical="bottom", overflow="fold")
    for cells in rows.cells:
        table.add_row(*map(Text, cells))
    return table


# ---- as JSON -------------------------------------------------------------------------------------------------------


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers of a comparison as plain values; hours that were not reached are null."""
    first = comparison.studies[0]
    return {
        "name": comparison.name,
        "dataset": first.record.dataset,
        "threat": first.record.threat,
        "split": first.record.split,
        "num_images": first.record.num_images,
        "data_fingerprint": first.stored.data_fingerprint,
        "reference": list(comparison.reference),
        "common_accelerator_hours": comparison.common_hours,
        "notes": notes(comparison),
        "methods": [_method_json(comparison, method) for method in comparison.methods],
    }


def _method_json(comparison: Comparison, method: Method) -> dict[str, Any]:
    best, worst = band_runs(method.num_runs)
    surfaces = {"best": 1, "upper": best, "median": median_runs(method.num_runs), "lower": worst}
    surfaces["worst"] = method.num_runs
    course = method.course
    return {
        "label": method.label,
        "num_runs": method.num_runs,
        "hypervolume": method.hypervolume,
        "hypervolume_at_common_hours": comparison.at_common_hours(method),
        "accelerator_hours": method.hours,
        "hours_to_reach": {other.label: comparison.hours_to_reach(method, other) for other in comparison.methods},
        "attainment": {
            name: {"runs": runs, "corners": method.attained.corners(runs).tolist()} for name, runs in surfaces.items()
        },
        "course": {
            name: getattr(course, field).tolist()
            for name, field in {"accelerator_hours": "spent", "mean": "mean", "low": "low", "high": "high"}.items()
        },
        "studies": [_study_json(study) for study in method.studies],
    }


def _study_json(study: ComparedStudy) -> dict[str, Any]:
    return {
        "study": study.title,
        "identifier": study.stored.identifier,
        "seed": study.seed,
        "verifier": study.record.verifier,
        "num_trials": dict(Counter(trial.state for trial in study.record.trials)),
        "hypervolume_bounds": list(study.front.hypervolume_bounds),
        "accelerator_hours": study.course.total,
        "front": [
            [member.standard_accuracy, member.certified_accuracy, member.certified_upper]
            for member in study.front.members
        ],
    }
