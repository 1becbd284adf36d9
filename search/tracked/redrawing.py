"""The files of a study drawn again while it goes on, in a thread, seldom enough that the search does not notice."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from search.studies.records import StudyRecord

log = logging.getLogger(__name__)

Artifacts = Mapping[str, Path]

INTERVAL_S = 30.0
# A drawing that took t seconds is followed by at least RESTS * t without one: it may have 2 % of a core.
RESTS = 50.0


class Redrawing:
    """Draws when it is wanted and due; one drawing at a time, and none is waited for but at the end.

    Args:
        draw: writes the files of a record; runs in a thread.
        interval_s: at least so long from the end of one drawing to the next.
    """

    def __init__(self, draw: Callable[[StudyRecord], Artifacts], interval_s: float = INTERVAL_S) -> None:
        self._draw, self._interval_s = draw, interval_s
        self._is_wanted = False
        self._due = time.monotonic()
        self._thread: threading.Thread | None = None
        self._drawn: Artifacts | None = None
        self._has_failed = False

    def want(self) -> None:
        """What is drawn is out of date."""
        self._is_wanted = True

    def poll(self, record: Callable[[], StudyRecord]) -> Artifacts | None:
        """Start a drawing if it is time for one.

        Args:
            record: the study as it is now; asked only if a drawing starts.

        Returns:
            What was drawn since the last call, each drawing once.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._thread = None
            drawn, self._drawn = self._drawn, None
            return drawn
        if self._is_wanted and time.monotonic() >= self._due:
            self._is_wanted = False
            self._thread = threading.Thread(target=self._run, args=(record(),), name="redrawing", daemon=True)
            self._thread.start()
        return None

    def close(self) -> None:
        """Wait for the drawing that goes on, if there is one: whoever draws next has the files for itself."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, record: StudyRecord) -> None:
        started = time.monotonic()
        try:
            self._drawn = self._draw(record)
        except Exception as error:  # figures must not end a search, and its end draws them once more
            if not self._has_failed:
                log.warning("report and figures are not up to date (%s: %s)", type(error).__name__, error)
            self._has_failed = True
        ended = time.monotonic()
        self._due = ended + max(self._interval_s, RESTS * (ended - started))
