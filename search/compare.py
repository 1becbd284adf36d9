"""python -m search.compare STUDY STUDY ...: the fronts of several studies on one page, from what is stored."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from search.comparing.comparability import ComparisonError
from search.comparing.comparison import Comparison, compare
from search.comparing.comparison_text import ComparisonTable, comparison_json
from search.config import find_space_file, load_search_config
from search.errors import UserError
from search.storage import DEFAULT_STORAGE, Storage, StorageError, default_study_url
from search.studies.database import StudyError
from search.studies.study_record import StoredStudy, load_stored

PAGES = (".html", ".htm")


class _Asked(NamedTuple):
    """A study as it was asked for, and where it was found."""

    text: str
    stored: StoredStudy
    folder: Path


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        asked = [_find(text, args.storage or [DEFAULT_STORAGE], args.study_url) for text in args.studies]
        comparison = compare(_titled(asked), _labels(args.label))
        folder = Path(args.storage[0]).resolve() if args.storage else asked[0].folder
        page = _page_path(args.out, folder, comparison)
        _write(comparison, page)
        told = None if args.no_mlflow else _log(comparison, folder, page)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(comparison_json(comparison), indent=1, allow_nan=False))
        print(told or "", end="\n" if told else "", file=sys.stderr)
    else:
        console = Console()
        console.print(ComparisonTable(comparison))
        for line in (f"comparison: {page}", told):
            if line:
                console.print(line, soft_wrap=True, highlight=False, markup=False)
    return 0


# ---- what was asked for --------------------------------------------------------------------------------------------


def _find(text: str, folders: Sequence[str], url: str | None) -> _Asked:
    """A study by its name, DIR:NAME, or its space file.

    Raises:
        UserError: there is no such study, or more than one.
    """
    directory, _, last = text.rpartition(":")
    name = _study_name(last)
    if directory:
        folder = Path(directory).resolve()
        return _Asked(text, load_stored(default_study_url(folder), name), folder)
    if url is not None:
        return _Asked(text, load_stored(url, name), Path(folders[0]).resolve())
    found: list[tuple[str, _Asked]] = []
    errors: list[StudyError] = []
    for place in folders:
        try:
            folder = Path(place).resolve()
            found.append((place, _Asked(text, load_stored(default_study_url(folder), name), folder)))
        except StudyError as error:
            errors.append(error)
    if not found:
        raise StudyError("; ".join(str(error) for error in errors))
    if len(found) > 1:
        places = [place for place, _ in found]
        raise ComparisonError(f"study {name} is in {' and in '.join(places)}; write {places[0]}:{name} for the first")
    return found[0][1]


def _study_name(text: str) -> str:
    """A study's name, or that of the study of a space file."""
    is_file = text.endswith((".yaml", ".yml"))
    return load_search_config(find_space_file(text)).study_name if is_file else text


def _titled(asked: Sequence[_Asked]) -> dict[str, StoredStudy]:
    """The studies by name, or as they were asked for where two have one name.

    Raises:
        ComparisonError: one was asked for twice.
    """
    names = [each.stored.record.name for each in asked]
    titles = [name if names.count(name) == 1 else each.text for name, each in zip(names, asked, strict=True)]
    for title in titles:
        if titles.count(title) > 1:
            raise ComparisonError(f"{title} is named {titles.count(title)} times; name each study once")
    return {title: each.stored for title, each in zip(titles, asked, strict=True)}


def _labels(texts: Sequence[str]) -> dict[str, str]:
    labels = {}
    for text in texts:
        name, sign, label = text.partition("=")
        if not (name and sign and label.strip()):
            raise ComparisonError(f"--label {text}: expected NAME=TEXT, for example --label digits='no stopping'")
        labels[name] = label.strip()
    return labels


# ---- what is written -----------------------------------------------------------------------------------------------


def _page_path(out: str | None, folder: Path, comparison: Comparison) -> Path:
    path = Path(out).resolve() if out else folder / "artifacts" / "comparisons" / comparison.name / "compare.html"
    if path.suffix not in PAGES:
        raise StorageError(f"--out {out}: expected a file that ends in .html; the numbers go beside it as .json")
    return path


def _write(comparison: Comparison, page: Path) -> None:
    """The page, and its numbers beside it; each replaced in one step.

    Raises:
        StorageError: the place cannot be written.
    """
    # Imported here: it takes a second, which wrong input need not pay.
    from search.comparing.comparison_page import write_comparison
    from search.results.figure_style import replace_file

    numbers = json.dumps(comparison_json(comparison), indent=1, allow_nan=False) + "\n"
    try:
        write_comparison(comparison, page)
        replace_file(_numbers_path(page), lambda temporary: temporary.write_text(numbers, encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"comparison {page} cannot be written ({error.strerror}); choose another place with --out FILE"
        ) from error


def _numbers_path(page: Path) -> Path:
    return page.with_suffix(".json")


def _log(comparison: Comparison, folder: Path, page: Path) -> str | None:
    """Tell MLflow, unless none of the studies is there; returns a line about it."""
    from search.comparing.comparison_log import deliver, record, tracked_config

    config = tracked_config(comparison)
    if config is None:
        return None
    storage = Storage.of(config, str(folder))
    files = {"compare.html": page, "compare.json": _numbers_path(page)}
    try:
        journals = record(comparison, config, storage, files)
    except OSError as error:
        raise StorageError(
            f"{storage.artifacts} cannot be written ({error.strerror}); --no-mlflow does without its journal"
        ) from error
    return deliver(config, storage, journals)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.compare",
        description="Compare studies: their fronts with attainment bands over seeds, and hypervolume per "
        "accelerator-hour, as an HTML page, a table and an MLflow run.",
    )
    parser.add_argument(
        "studies",
        metavar="STUDY",
        nargs="+",
        help="a study's name, DIR:NAME for one in another folder, or a space file",
    )
    parser.add_argument(
        "--storage",
        metavar="DIR",
        action="append",
        help=f"a storage folder to look in, may be given several times (default: {DEFAULT_STORAGE})",
    )
    parser.add_argument("--study-url", metavar="URL", help="the studies' database, when it is not in that folder")
    parser.add_argument(
        "--label",
        metavar="NAME=TEXT",
        action="append",
        default=[],
        help="how to call the runs of the space file NAME, or of the study NAME",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: DIR/artifacts/comparisons/NAME/compare.html); its numbers go beside it as .json",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--no-mlflow", action="store_true", help="log no MLflow run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
