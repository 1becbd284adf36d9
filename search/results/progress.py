"""The live table of a search: the front so far, the trials that run, and how far the search is."""

import time
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from search.pareto import front, hypervolume
from search.studies.records import TrialResult


@dataclass
class _Running:
    started: float = field(default_factory=time.monotonic)
    phase: str = "starting"
    done: int = 0
    of: int = 0


@dataclass
class Progress:
    """Shows a search on a terminal as one table that changes, elsewhere as one line for each event.

    Args:
        results: (standard, certified) of trials that were COMPLETE before.
        shows_front: whether trials are compared with one another.
    """

    console: Console
    target: int
    reference: tuple[float, float]
    results: dict[str, tuple[float, float]] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)
    num_stopped: int = 0  # trials whose training was stopped, before and now
    num_failed: int = 0
    shows_front: bool = True

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def started(self, key: str) -> None:
        self.running[key] = _Running()

    def lost(self, key: str, reason: str, *, goes_on: bool = True) -> None:
        self.running.pop(key, None)
        line = f"{key}  {reason}: it {'goes on from its last state' if goes_on else 'keeps what it has'}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def advanced(self, key: str, phase: str, done: int, of: int) -> None:
        trial = self.running.setdefault(key, _Running())
        trial.phase, trial.done, trial.of = phase, done, of

    def finished(self, key: str, result: TrialResult) -> None:
        self.running.pop(key, None)
        self.results[key] = (result.standard_accuracy, result.certified_accuracy)
        members = self._front()
        mark = "  on the front" if key in members else ""
        if result.verification_state == "stopped":
            mark += f"  ({result.reason})"
        self.console.print(
            f"[{self._num_done}/{self.target}] {key}  standard {result.standard_accuracy:.3f}  adversarial "
            f"{result.adversarial_accuracy:.3f}  certified {_interval(result)}  "
            f"{result.seconds:.0f} s{mark}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def stopped(self, key: str, reason: str) -> None:
        self.running.pop(key, None)
        self.num_stopped += 1
        line = f"[{self._num_done}/{self.target}] {key}  STOPPED  {reason}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @property
    def _num_done(self) -> int:
        return len(self.results) + self.num_stopped

    def failed(self, key: str, reason: str) -> None:
        self.running.pop(key, None)
        self.num_failed += 1
        self.console.print(f"{key}  FAILED  {reason}", highlight=False, markup=False, soft_wrap=True)

    def _front(self) -> list[str]:
        keys = list(self.results) if self.shows_front else []
        return [keys[index] for index in front([self.results[key] for key in keys])] if keys else []

    def _render(self) -> RenderableType:
        elapsed = time.monotonic() - self._started
        area = hypervolume(list(self.results.values()), self.reference) if self.results else 0.0
        counts = {"stopped": self.num_stopped, "failed": self.num_failed}
        others = "".join(f", {number} {name}" for name, number in counts.items() if number)
        title = f"{self._num_done} of {self.target} trials{others}, {elapsed:.0f} s, hypervolume {area:.4f}"
        table = Table(title=title, title_justify="left", expand=False)
        for column in ("trial", "state", "standard", "certified"):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        for key in sorted(self._front(), key=lambda key: self.results[key]):
            standard, certified = self.results[key]
            table.add_row(key, "front", f"{standard:.3f}", f"{certified:.3f}")
        for key, trial in list(self.running.items()):
            share = f" {trial.done}/{trial.of}" if trial.of else ""
            table.add_row(key, f"{trial.phase}{share}", "", "", style="dim")
        return Group(table, Text("Ctrl-C stops; the same command goes on", style="dim"))


def _interval(result: TrialResult) -> str:
    lower, upper = f"{result.certified_accuracy:.3f}", f"{result.certified_upper:.3f}"
    return lower if lower == upper else f"{lower} to {upper}"
