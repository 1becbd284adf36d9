"""How far a verification is: one live line on a terminal, elsewhere a line now and then."""

import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ccdist.train_progress import duration
from ccdist.verdicts import Progress

# Between two lines where there is no terminal.
LINE_INTERVAL_S = 10.0


class VerifyProgress:
    """Prints what `verify` reports.

    total_timeout_s: of branch and bound, which ends then whatever its pace is; None: no limit.
    """

    def __init__(self, console: Console, *, total_timeout_s: float | None = None) -> None:
        self.console = console
        self._total_timeout_s = total_timeout_s
        self._told_at = time.monotonic()
        self._decided = 0  # before the rung that runs
        self._last: Progress | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> "VerifyProgress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def progress(self, progress: Progress) -> None:
        """After each batch or round."""
        self._last = progress
        if not self.console.is_terminal and time.monotonic() - self._told_at >= LINE_INTERVAL_S:
            self.note(self.line(progress))

    def rung(self, rung: str, still_open: int) -> None:
        """After each rung, whose last `progress` came just before."""
        assert self._last is not None
        assert self._last.rung == rung
        decided = self._last.proved + self._last.falsified
        self.note(
            f"{rung}: {decided - self._decided} of {self._last.entered} images decided, {still_open} open, "
            f"{duration(self._last.seconds)}"
        )
        self._decided = decided

    def going_on(self, decided: int, num_images: int) -> None:
        """Before anything else, when an earlier call was stopped."""
        self.note(f"going on: {decided} of {num_images} images decided")

    def note(self, text: str) -> None:
        self._told_at = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line(self, progress: Progress) -> str:
        """Counts of all images; pace and time left of the rung."""
        counts = f"proved {progress.proved}  falsified {progress.falsified}  open {progress.open}"
        pace = progress.handled / max(progress.seconds, 1e-9)
        left = self._left(progress)
        told = "" if left is None else f"  {duration(left)} left"
        return f"{progress.rung}  {counts}  {pace:.3g} images/s{told}"

    def _left(self, progress: Progress) -> float | None:
        """At the mean pace of the rung's images so far; None where nothing is known yet."""
        estimates = []
        if progress.handled:
            estimates.append((progress.entered - progress.handled) * progress.seconds / progress.handled)
        if progress.rung == "branch_and_bound" and self._total_timeout_s is not None:
            estimates.append(max(0.0, self._total_timeout_s - progress.seconds))
        return min(estimates, default=None)

    def _render(self) -> Text:
        return Text("" if self._last is None else self.line(self._last), no_wrap=True, overflow="ellipsis")
