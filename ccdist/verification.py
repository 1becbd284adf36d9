"""The verification ladder: clean prediction, attacks, bounds, branch and bound. One row for each image.

Each rung takes only the images that are still open, all of them as batches. What the verdicts mean stands in
`ccdist.verdicts`, what the rungs do in `ccdist.rungs`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.bounds import logit_difference_lower_bounds
from ccdist.branch_and_bound import Counts, Outcome, branch_and_bound
from ccdist.config import ThreatModel, VerifyConfig
from ccdist.device_memory import is_out_of_memory
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.rungs import LARGEST_CHUNK, RUNGS, Chunk, Verified
from ccdist.threats import perturbation_set
from ccdist.verdict_store import LadderState, Position, identity_of
from ccdist.verdicts import SCHEMA as SCHEMA
from ccdist.verdicts import Accuracies as Accuracies
from ccdist.verdicts import CounterExample, Finding, Rows
from ccdist.verdicts import Progress as Progress
from ccdist.verdicts import Verdict as Verdict
from ccdist.verdicts import accuracies as accuracies

BRANCH_AND_BOUND = "branch_and_bound"
# Between two states of a rung at least, so that writing them costs next to nothing.
SAVE_INTERVAL_S = 2.0

OnRung = Callable[[str, int], None]
OnProgress = Callable[[Progress], None]
OnCounterExample = Callable[[int, str, Tensor], None]
OnRows = Callable[[pa.Table], None]


def verify(
    network: Network,
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    config: VerifyConfig,
    *,
    on_rung: OnRung | None = None,
    on_progress: OnProgress | None = None,
    on_counterexample: OnCounterExample | None = None,
    on_rows: OnRows | None = None,
    state: Path | None = None,
    save_interval: float | None = None,
) -> pa.Table:
    """Decide for each image whether every perturbed image that the threat allows keeps the label.

    A rung takes `batch_size` images at once, the ensemble 32 at most, so that it is told and saved how far it is. The
    random starts of an attack are drawn for each such chunk: another batch size draws others, as another seed does.
    A batch that memory does not suffice for is halved; an image for which it does not suffice alone stays open. What
    was told before a kill is told again by the call that goes on: finished rungs, counter-examples, decided rows.

    Args:
        network: as deployed; read in eval mode, on any device.
        images: pixels in [0, 1], in the network's dtype, float32 or float64.
        labels: integers, classes of the network counted from 0.
        config: threat, rungs and their limits.
        on_rung: called after each rung with its name and the number of images still open.
        on_progress: called when a rung begins, after each batch, each round of branch and bound, and when it ends.
        on_counterexample: called with index, method and point of each image that is falsified by another than itself.
        on_rows: called now and then with the rows decided since the last call, after they are in the state.
        state: a folder from which a killed call goes on; a finished one stays, and answers at once.
        save_interval: seconds between two states within a rung, and two calls of `on_rows`; None: SAVE_INTERVAL_S.

    Returns:
        A table of `SCHEMA` with one row for each image, in order. A misclassified clean image is falsified by
        "clean". `branches` counts branch and bound nodes.

    Raises:
        ValueError: images or labels are not as above, the network is in train mode, or the state is damaged or about
            another network, other images or another config.
        UnsupportedLayerError: a bound rung meets a layer without a rule (for l2: see `ccdist.bounds.propagate`).
    """
    if any(module.training for module in network.modules()):
        raise ValueError("the network is in train mode; call .eval() on it, a verdict is about the deployed network")
    _check_images(network, images)
    _check_labels(network, images, labels)
    labels = labels.long()  # which indexing takes
    saved = None if state is None else LadderState(state, identity_of(network, images, labels, config))
    position, found = (None if saved is None else saved.load()) or (Position(Rows.undecided(labels.tolist())), [])
    device = next(network.parameters()).device
    listeners = _Listeners(on_rung, on_progress, on_counterexample, on_rows)
    verified = Verified(network, tuple(images.shape[1:]))
    interval = SAVE_INTERVAL_S if save_interval is None else save_interval
    ladder = _Ladder(verified, images.to(device), labels.to(device), config, position, saved, listeners, interval)
    with exact_float32(), torch.no_grad():
        ladder.climb(found)
    return position.rows.table()


def stored_rows(state: Path) -> pa.Table | None:
    """All rows as the state of a verification has them now, finished or not; None: nothing was stored yet."""
    try:
        return pq.read_table(state / "rows.parquet").replace_schema_metadata()
    except FileNotFoundError:
        return None


def _check_images(network: Network, images: object) -> None:
    """Refuse what is no batch of pixels in [0, 1]: about that, a verdict would say nothing."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images are a {type(images).__name__}; expected a tensor [N, C, H, W]")
    if images.dtype == torch.uint8:
        raise ValueError("images are uint8; ccdist.data.to_pixels(images) makes them pixels in [0, 1]")
    dtype = next(network.parameters()).dtype
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images are {images.dtype}; expected {dtype}, as the network is")
    if images.dtype != dtype:
        raise ValueError(f"images are {images.dtype}, the network is {dtype}; images.to({dtype}) makes them alike")
    if images.ndim != 4:
        raise ValueError(f"images have the shape {list(images.shape)}; expected [N, C, H, W]")
    for part in images.split(256):
        if not bool(((part >= 0) & (part <= 1)).all()):  # NaN is neither
            finite = bool(part.isfinite().all())
            found = f"from {float(part.min()):.4g} to {float(part.max()):.4g}" if finite else "that are not finite"
            raise ValueError(f"images have pixels {found}; expected all in [0, 1], the network normalises them itself")


def _check_labels(network: Network, images: Tensor, labels: object) -> None:
    """Refuse what are no classes of the network, one for each image."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels are a {type(labels).__name__}; expected a tensor [N] of integers")
    if labels.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"labels are {labels.dtype}; expected torch.int64")
    if labels.ndim != 1:
        raise ValueError(f"labels have the shape {list(labels.shape)}; expected [N]")
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; expected as many labels as images")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < network.num_classes:
        raise ValueError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but the network has {network.num_classes} "
            "classes, counted from 0"
        )


def check_rungs(
    network: Network, images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"], config: VerifyConfig
) -> None:
    """Try each rung that proves, in short, so that what it cannot do is refused before anything is begun.

    The bounds meet the first image only, the slopes of alpha-CROWN are left out, branch and bound meets no image.

    Raises:
        UnsupportedLayerError: a layer has no rule for a rung or the threat.
        ValueError: the network's values are not finite, or in train mode.
    """
    verified = Verified(network, tuple(images.shape[1:]))
    chunk = Chunk(verified, images[:1], labels[:1], config, 0)
    bounds = {"ibp": "ibp", "crown": "crown", "alpha_crown": "crown", BRANCH_AND_BOUND: "crown"}
    try:
        with exact_float32(), torch.no_grad():
            for rung in dict.fromkeys(bounds[each] for each in config.rungs if each in bounds):
                RUNGS[rung](chunk)
            if BRANCH_AND_BOUND in config.rungs:
                branch_and_bound(network, images[:0], labels[:0], threat=config.threat, config=config.branch_and_bound)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):  # an image that memory does not suffice for stays open
            raise


@dataclass(frozen=True)
class _Listeners:
    on_rung: OnRung | None
    on_progress: OnProgress | None
    on_counterexample: OnCounterExample | None
    on_rows: OnRows | None

    def rung(self, done: Progress) -> None:
        if self.on_rung is not None:
            self.on_rung(done.rung, done.open)

    def progress(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)

    def counterexample(self, found: CounterExample) -> None:
        if self.on_counterexample is not None:
            self.on_counterexample(found.index, found.method, found.point)

    def rows(self, rows: pa.Table) -> None:
        if self.on_rows is not None and rows.num_rows:
            self.on_rows(rows)


@dataclass
class _Ladder:
    """A verification while it runs. Whatever it does twice after a kill gives the same rows."""

    verified: Verified
    images: Tensor
    labels: Tensor
    config: VerifyConfig
    position: Position
    state: LadderState | None
    listeners: _Listeners
    save_interval: float
    found: list[CounterExample] = field(default_factory=list)  # since the last save
    told: set[int] = field(default_factory=set)  # indices of the rows that on_rows has had
    saved_at: float = field(default_factory=time.monotonic)

    def climb(self, found_before: Sequence[CounterExample]) -> None:
        """Run the rungs that are not finished yet."""
        for each in found_before:
            self.listeners.counterexample(each)
        self._tell_rows()
        finished = len(self.position.finished)
        if BRANCH_AND_BOUND in self.config.rungs[max(0, finished - 1) :]:
            self._branch([])  # of no images: what it has no rule for is refused before hours of other rungs
        for done in self.position.finished:
            self.listeners.progress(done)
            self.listeners.rung(done)
        for rung in ("clean", *self.config.rungs)[finished:]:
            self._climb(rung)

    def _climb(self, rung: str) -> None:
        position = self.position
        if position.ahead is None:
            position.ahead = position.rows.open()
            position.entered, position.seconds = len(position.ahead), 0.0
        self.listeners.progress(self._progress(rung, position.entered - len(position.ahead)))
        if rung == BRANCH_AND_BOUND:
            self._branch_and_bound()
        else:
            self._in_chunks(rung)
        done = self._progress(rung, position.entered)
        position.finished.append(done)
        position.ahead = None
        self._save()
        if self.state is not None:
            self.state.forget_branch_and_bound()
        self.listeners.progress(done)
        self.listeners.rung(done)

    def _in_chunks(self, rung: str) -> None:
        size = min(self.config.batch_size, LARGEST_CHUNK.get(rung, self.config.batch_size))
        while self.position.ahead:
            indices = self.position.ahead[:size]
            started = time.perf_counter()
            sufficed = self._attempt(rung, indices)
            seconds = time.perf_counter() - started
            self.position.seconds += seconds
            if not sufficed and len(indices) > 1:
                size = len(indices) // 2
                continue
            for index in indices:
                self.position.rows.seconds[index] += seconds / len(indices)
            self.position.ahead = self.position.ahead[len(indices) :]
            self.listeners.progress(self._progress(rung, self.position.entered - len(self.position.ahead)))
            self._save_now_and_then()

    def _attempt(self, rung: str, indices: list[int]) -> bool:
        """Run a rung on some images; False, and nothing changed, when memory does not suffice."""
        try:
            chunk = self._chunk(indices)
            self._take(indices, _shown(chunk, RUNGS[rung](chunk)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        # Outside of the handler: the error held on to the tensors that were too many.
        if self.images.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _branch_and_bound(self) -> None:
        """All images that entered in one call, which batches them itself, and has a state of its own."""
        position, entered = self.position, list(self.position.ahead or ())
        if not entered:
            return
        handled = {place for place, index in enumerate(entered) if not position.rows.is_open(index)}
        before, started = position.seconds, time.perf_counter()

        def decide(outcomes: Sequence[Outcome], *, last: bool) -> None:
            for outcome in outcomes:
                index = entered[outcome.position]
                if not position.rows.is_open(index):
                    continue
                self._take([index], _shown(self._chunk([index]), [_finding(outcome)]))
                if last or not position.rows.is_open(index):  # once for each image
                    position.rows.seconds[index] += outcome.seconds

        def on_round(counts: Counts, outcomes: list[Outcome]) -> None:
            decide(outcomes, last=False)
            handled.update(outcome.position for outcome in outcomes)
            position.seconds = before + time.perf_counter() - started
            self.listeners.progress(self._progress(BRANCH_AND_BOUND, len(handled)))
            self._save_now_and_then()

        try:
            outcomes = self._branch(
                entered, state=None if self.state is None else self.state.branch_and_bound, on_round=on_round
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            outcomes = []  # what was decided is, the others stay open
        decide(outcomes, last=True)
        position.seconds = before + time.perf_counter() - started

    def _branch(self, indices: list[int], **options: Any) -> list[Outcome]:
        return branch_and_bound(
            self.verified.network,
            self.images[indices],
            self.labels[indices],
            threat=self.config.threat,
            config=self.config.branch_and_bound,
            **options,
        )

    def _chunk(self, indices: list[int]) -> Chunk:
        return Chunk(self.verified, self.images[indices], self.labels[indices], self.config, indices[0])

    def _take(self, indices: list[int], findings: Sequence[Finding]) -> None:
        """Put findings into the rows that are open."""
        rows = self.position.rows
        for index, finding in zip(indices, findings, strict=True):
            if not rows.is_open(index):
                continue
            if finding.point is not None:  # told before its row is decided: a kill between the two loses nothing
                example = CounterExample(index, finding.method, finding.point)
                self.found.append(example)
                self.listeners.counterexample(example)
            rows.add(index, finding)

    def _progress(self, rung: str, handled: int) -> Progress:
        rows, position = self.position.rows, self.position
        proved, falsified = rows.count(Verdict.CERTIFIED), rows.count(Verdict.FALSIFIED)
        left = len(rows) - proved - falsified
        return Progress(rung, proved, falsified, left, position.entered, handled, position.seconds)

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self.saved_at >= self.save_interval:
            self._save()

    def _save(self) -> None:
        if self.state is not None:
            self.state.save(self.position, self.found)
        self.found = []
        self._tell_rows()
        self.saved_at = time.monotonic()

    def _tell_rows(self) -> None:
        rows = self.position.rows
        fresh = [index for index in range(len(rows)) if not rows.is_open(index) and index not in self.told]
        self.told.update(fresh)
        if fresh and self.listeners.on_rows is not None:
            self.listeners.rows(rows.table().take(fresh))


def _shown(chunk: Chunk, findings: list[Finding]) -> list[Finding]:
    """The findings of a chunk, without the points that are no counter-examples after all."""
    positions = [position for position, finding in enumerate(findings) if finding.point is not None]
    if not positions:
        return findings
    points = torch.stack([point for finding in findings if (point := finding.point) is not None])
    points = points.detach().to(chunk.images)
    some = replace(chunk, images=chunk.images[positions], labels=chunk.labels[positions])
    for position, point, holds in zip(positions, points, some.confirmed(points), strict=True):
        finding = findings[position]
        kept = replace(finding, point=point.cpu()) if holds else Finding(prediction=finding.prediction)
        findings[position] = replace(kept, lower_bound=finding.lower_bound, branches=finding.branches)
    return findings


def _finding(outcome: Outcome) -> Finding:
    common = Finding(lower_bound=outcome.lower_bound, branches=outcome.branches)
    if outcome.certified:
        return replace(common, verdict=Verdict.CERTIFIED, method=BRANCH_AND_BOUND)
    if outcome.falsified and outcome.counterexample is not None:
        point = outcome.counterexample
        return replace(common, verdict=Verdict.FALSIFIED, method=BRANCH_AND_BOUND, point=point)
    return common


def quick_accuracies(
    network: Network, images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"], threat: ThreatModel
) -> tuple[float, float]:
    """(standard accuracy, IBP certified accuracy) in one pass each: a curve to watch, not a verdict."""
    with exact_float32(), torch.no_grad():
        standard = (network(images).argmax(1) == labels).float().mean()
        region = perturbation_set(images, threat.norm, threat.radius)
        lower = logit_difference_lower_bounds(network, region, labels)
        return float(standard), float((lower.amin(1) > 0).float().mean())
