"""The verification of a trial: images in the common order, an interval told all the time, a state to go on from.

A ladder takes its images in `common_order`, so that what it has decided at any time is about a fair sample of them;
tables of verdicts are in the order of the validation images.
"""

import functools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from ccdist.activations import Activation
from ccdist.atomic_files import write_table
from ccdist.config import KINKED, VerifyConfig
from ccdist.data import ImageSet, to_pixels
from ccdist.networks import Network
from ccdist.verdict_store import StateError
from ccdist.verification import BRANCH_AND_BOUND, SCHEMA, Progress, Verdict, accuracies, stored_rows, verify
from search.artifacts.places import TrialPlaces
from search.studies.records import TrialResult, VerificationState
from search.trials.reports import Reports
from search.trials.rung_values import common_order

# Seconds between two reports within a rung, at least: each one passes through the driver's loop.
REPORT_INTERVAL_S = 1.0
# A report waits until the driver has handled it. One that took t seconds is followed by RESTS * t without one, at most
# LONGEST_REST_S: thousands of trials ask a driver no more than it can answer, and wait for it 5 % of their time.
RESTS, LONGEST_REST_S = 20.0, 60.0
# Images of a chunk on a processor, where larger ones are no faster, bounds even slower, and stopped later.
LARGEST_CHUNK = 64


@dataclass(frozen=True)
class Spent:
    """What a result says beside its accuracies: seconds before this verification, by part, and what made it."""

    costs: Mapping[str, float]  # teacher, student, verification
    provenance: Mapping[str, str]


def result_of(
    table: pa.Table,
    spent: Spent,
    verification_seconds: float,
    *,
    state: VerificationState = "finished",
    share: float | None = None,
) -> TrialResult:
    """The result of a table of verdicts (their columns suffice).

    Args:
        verification_seconds: of this verification.
        share: proved share of the images that the last rung decided; None where nothing is left to guess.
    """
    measured = accuracies(table)
    costs = dict(spent.costs) | {"verification": spent.costs.get("verification", 0.0) + verification_seconds}
    expected = None
    if share is not None:
        expected = measured.certified + (measured.certified_upper - measured.certified) * share
    return TrialResult(
        standard_accuracy=measured.standard,
        adversarial_accuracy=measured.adversarial,
        certified_accuracy=measured.certified,
        certified_upper=measured.certified_upper,
        verification_state=state,
        num_images=measured.num_images,
        costs=costs,
        seconds=sum(costs.values()),
        provenance=dict(spent.provenance),
        expected_certified=expected,
    )


def rest_after(waited_s: float) -> float:
    """Seconds without a report after one that took so many."""
    return min(LONGEST_REST_S, RESTS * waited_s)


@dataclass
class _Listener:
    """Follows a ladder and reports the interval that its stored rows prove.

    verdicts, methods: of all validation images, as far as the state on disk has them: whoever stops the trial at a
        report finds there exactly the verdicts that the report counts.
    """

    spent: Spent
    reports: Reports
    order: Sequence[int]  # ladder's position -> validation image
    verdicts: list[str]
    methods: list[str]
    clean_is_done: bool  # before, standard accuracy is not known
    seconds: dict[str, float] = field(default_factory=dict)  # by rung, interrupted runs included
    progress: Progress | None = None
    before_rung: tuple[int, int] = (0, 0)  # proved, falsified
    share: float = 0.0  # proved share of what the last rung that decided anything has decided
    reported_at: float = 0.0
    rest_s: float = 0.0  # after the last report

    def on_progress(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds[progress.rung] = progress.seconds
        # Rows come at most once an interval: what they bring is told before an interval that has stayed the same.
        self._report_after(2 * REPORT_INTERVAL_S)

    def on_rows(self, rows: pa.Table) -> None:
        columns = (rows[name].to_pylist() for name in ("index", "verdict", "method"))
        for position, verdict, method in zip(*columns, strict=True):
            self.verdicts[self.order[position]] = verdict
            self.methods[self.order[position]] = method
        self._report_after(REPORT_INTERVAL_S)

    def on_rung(self, rung: str, _open: int) -> None:
        self.clean_is_done = True
        self._report()
        assert self.progress is not None  # told before each rung's end
        self.share, self.before_rung = self._share(), (self.progress.proved, self.progress.falsified)

    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def _share(self) -> float:
        if self.progress is None:
            return self.share
        proved = self.progress.proved - self.before_rung[0]
        decided = proved + self.progress.falsified - self.before_rung[1]
        return proved / decided if decided else self.share

    def _report_after(self, interval: float) -> None:
        if self.clean_is_done and time.monotonic() - self.reported_at >= max(interval, self.rest_s):
            self._report()

    def _report(self) -> None:
        if self.progress is None:  # rows of an earlier run, told before its rungs
            return
        table = pa.table({"verdict": self.verdicts, "method": self.methods})
        result = result_of(table, self.spent, self.total_seconds(), state="stopped", share=self._share())
        num_open = self.verdicts.count(str(Verdict.UNDECIDED))
        began = time.monotonic()
        self.reports.verifying(result, self.progress.rung, len(self.verdicts) - num_open, len(self.verdicts))
        self.reported_at = time.monotonic()
        self.rest_s = rest_after(self.reported_at - began)


def verify_trial(
    network: Network,
    validation: ImageSet,
    config: VerifyConfig,
    places: TrialPlaces,
    *,
    spent: Spent,
    reports: Reports,
    known: pa.Table | None = None,
) -> TrialResult:
    """Verify a trial's student on the validation images, and leave the verdicts in `places`.

    Goes on from the state in `places`; the caller deletes it once the result is stored.

    Args:
        known: verdicts of an earlier verification; its undecided images alone are verified.
    """
    order = _open_images(known, len(validation))
    listener = _Listener(
        spent,
        reports,
        order,
        [str(Verdict.UNDECIDED)] * len(validation) if known is None else known["verdict"].to_pylist(),
        [""] * len(validation) if known is None else known["method"].to_pylist(),
        clean_is_done=known is not None,
    )
    if next(network.parameters()).device.type == "cpu":
        config = config.model_copy(update={"batch_size": min(config.batch_size, LARGEST_CHUNK)})
    climb = functools.partial(
        verify,
        network,
        to_pixels(validation.images[order]),
        validation.labels[order],
        config,
        on_rung=listener.on_rung,
        on_progress=listener.on_progress,
        on_rows=listener.on_rows,
        state=places.verification,
        save_interval=REPORT_INTERVAL_S,
    )
    try:
        fresh = climb()
    except StateError:  # damaged, or begun with other limits or on another device: nothing was told of it yet
        shutil.rmtree(places.verification)
        fresh = climb()
    table = merged(known, fresh)
    write_table(places.verdicts, table)
    return result_of(table, spent, listener.total_seconds())


def partial_verdicts(places: TrialPlaces) -> pa.Table | None:
    """The verdicts of a trial whose verification is not finished, one for each image; None: it has none yet."""
    rows = stored_rows(places.verification)
    return None if rows is None else merged(None, rows)


def merged(known: pa.Table | None, fresh: pa.Table) -> pa.Table:
    """Verdicts in the order of the validation images, from rows in the common order of those that were open.

    A verdict that is known stays; seconds are added up, of bounds and branches the larger one is kept.
    """
    rows = {} if known is None else {row["index"]: row for row in known.to_pylist()}
    order = _open_images(known, fresh.num_rows)
    for row in fresh.to_pylist():
        index = order[row["index"]]
        if (before := rows.get(index)) is not None:
            row["seconds"] += before["seconds"]
            row["branches"] = max(row["branches"], before["branches"])
            bounds = [bound for bound in (row["lower_bound"], before["lower_bound"]) if bound is not None]
            row["lower_bound"] = max(bounds, default=None)
        rows[index] = row | {"index": index}
    return pa.Table.from_pylist([rows[index] for index in sorted(rows)], SCHEMA)


def _open_images(known: pa.Table | None, num_images: int) -> list[int]:
    """The images that a verification is about, in the common order."""
    if known is None:
        return common_order(num_images)
    verdicts = known["verdict"].to_pylist()
    return [index for index in common_order(known.num_rows) if verdicts[index] == Verdict.UNDECIDED]


def with_larger_limits(
    config: VerifyConfig, factor: float, activation: Activation, *, rungs_are_done: bool
) -> VerifyConfig:
    """The ladder for images that an earlier one left open, with the limits of branch and bound times the factor.

    Args:
        activation: the network's; branch and bound is left out where it has no form for it.
        rungs_are_done: the earlier ladder came to its end, so that its other rungs would find nothing new, and branch
            and bound is all that is left, also where the ladder does without. Else that ladder is climbed to its end.
    """
    limits = config.branch_and_bound
    larger = limits.model_copy(
        update={
            "timeout_s": limits.timeout_s and limits.timeout_s * factor,
            "total_timeout_s": limits.total_timeout_s and limits.total_timeout_s * factor,
            "max_branches": limits.max_branches and max(1, round(limits.max_branches * factor)),
        }
    )
    others = () if rungs_are_done else tuple(rung for rung in config.rungs if rung != BRANCH_AND_BOUND)
    branches = activation in KINKED and (rungs_are_done or BRANCH_AND_BOUND in config.rungs)
    rungs = (*others, BRANCH_AND_BOUND) if branches else others
    return config.model_copy(update={"branch_and_bound": larger, "rungs": rungs})


def load_verdicts(places: TrialPlaces) -> pa.Table:
    """The verdicts that a finished or stopped trial left behind."""
    return pq.read_table(places.verdicts)
