"""How far a training is: bars on a terminal, elsewhere a line for each epoch."""

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from ccdist.training import EpochReport

# What an epoch's line shows of its row, if it is there.
SHOWN = {
    "loss": "loss",
    "adversarial_accuracy": "adversarial",
    "ibp_certified_accuracy": "IBP",
    "validation_standard_accuracy": "validation standard",
    "validation_ibp_certified_accuracy": "IBP",
}


class TrainProgress:
    """A `Listener` that prints."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started: dict[str, float] = {}  # when the first epoch that was seen of a phase began
        self._seen: dict[str, int] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description:7}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}", table_column=Column(no_wrap=True)),
        )
        self._last = ""  # the metrics of the last epoch
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> "TrainProgress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def epoch(self, report: EpochReport, row: dict[str, Any]) -> None:
        metrics = "  ".join(f"{label} {row[name]:.3f}" for name, label in SHOWN.items() if name in row)
        pace = self._pace(report, row["images_per_second"])
        if not self.console.is_terminal:
            self.note(f"{report.phase} {report.epoch}/{report.epochs}  {metrics}  {pace}")
            return
        if report.phase not in self._tasks:
            self._tasks[report.phase] = self._bars.add_task(report.phase, total=report.epochs, pace="")
        self._bars.update(self._tasks[report.phase], completed=report.epoch, pace=pace)
        self._last = metrics

    def _pace(self, report: EpochReport, images_per_second: float) -> str:
        """The rate, and what is left at the mean pace of the epochs that this process has seen."""
        phase = report.phase
        self._started.setdefault(phase, time.monotonic() - report.seconds)
        self._seen[phase] = self._seen.get(phase, 0) + 1
        elapsed = time.monotonic() - self._started[phase]
        left = (report.epochs - report.epoch) * elapsed / self._seen[phase]
        return f"{images_per_second:.0f} images/s  {duration(elapsed)} elapsed  {duration(left)} left"

    def rung(self, network: str, rung: str, still_open: int, num_images: int) -> None:
        self.note(f"{network}, {rung}: {num_images - still_open} of {num_images} images decided")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(self._bars, Text(self._last, style="dim"))


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
