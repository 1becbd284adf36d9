"""What is shown of a large study: read from its database, drawn, and how large the files are.

record    the study as `search.front` reads it
counts    front and hypervolume of the record
files     everything that is drawn again in the background of a search: page, figures, tables
page      report.html alone
memory    of a process that has done all of this
"""

import tempfile
from pathlib import Path

from benchmarks.scale_driver import config_of, filled
from benchmarks.scale_measure import Measured, apart, measured, resident_mb, timed
from search.results.configurations import study_front
from search.results.page import write_report
from search.studies.records import StudyRecord
from search.study import load_record
from search.tracked.study_files import draw

PART = "reports"


def measure(space: str, trials: int, repeats: int) -> list[Measured]:
    """One size, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        config = config_of(space, 10 * trials)
        url = apart(filled, Path(name), config, trials, 0)
        found: list[Measured] = apart(_measure, url, config.study_name, Path(name), trials, repeats)
    return found


def _measure(url: str, study: str, folder: Path, trials: int, repeats: int) -> list[Measured]:
    records: list[StudyRecord] = []
    read = timed(PART, "record", trials, lambda: records.append(load_record(url, study)), 1, uncounted=0)
    record = records[0]
    pages = folder / "pages"
    counts = timed(PART, "counts", trials, lambda: study_front(record).hypervolume_bounds, repeats, uncounted=0)
    files = timed(PART, "files", trials, lambda: draw(record, pages), repeats, uncounted=0)
    page = timed(PART, "page", trials, lambda: write_report(record, folder / "report.html"), repeats, uncounted=0)
    sizes = [
        measured(PART, f"{path.name}: size", trials, [path.stat().st_size / 2**20], "MB")
        for path in sorted(pages.iterdir())
    ]
    memory = measured(PART, "memory", trials, [resident_mb()], "MB")
    return [read, counts, files, page, *sizes, memory]
