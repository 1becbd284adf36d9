"""The accuracies and the front of a study, counted anew from the verdicts that its trials left, image by image.

Nothing but `verdicts.parquet` of each trial is read, and of it two columns, dictionary-encoded: 1,000 trials of 10,000
images take well under a second. What comes out is the study as its proofs have it, and where the study says otherwise.
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ccdist.verdicts import ATTACKS, Accuracies, Verdict
from search.artifacts.places import TrialPlaces
from search.results.configurations import study_front
from search.studies.records import StudyRecord, TrialRecord

COLUMNS = ["verdict", "method"]
# More than there are processors: reading waits for the disk.
THREADS = 4
_OTHER_COLUMNS = f"is damaged (expected columns of text {' and '.join(COLUMNS)})"
_COMPARED = ("standard_accuracy", "adversarial_accuracy", "certified_accuracy", "certified_upper", "num_images")


class DamagedVerdictsError(ValueError):
    """A file of verdicts cannot be read, or holds none."""


class Difference(NamedTuple):
    """What a trial's verdicts say otherwise than its study, or why they say nothing."""

    key: str
    text: str


@dataclass(frozen=True)
class VerdictFront:
    """A study whose results are those of its verdicts.

    Args:
        record: the study; a COMPLETE trial without readable verdicts is there without results.
        num_counted: trials whose verdicts were counted.
        differences: where the study says otherwise, by number of the trial; the front's own comes last.
    """

    record: StudyRecord
    num_counted: int
    differences: tuple[Difference, ...]


def front_from_verdicts(study: StudyRecord, artifacts: Path) -> VerdictFront:
    """Count the verdicts of all COMPLETE trials, and compare with what the study says.

    Args:
        artifacts: the folder of all studies' artefacts.
    """
    trials = study.complete
    files = [TrialPlaces.of(artifacts, study.name, trial.key).verdicts for trial in trials]
    with ThreadPoolExecutor(THREADS) as threads:
        found = dict(zip((trial.number for trial in trials), threads.map(_counted, files), strict=True))
    counted = replace(study, trials=tuple(_recounted(trial, found.get(trial.number)) for trial in study.trials))
    differences = [
        Difference(trial.key, text) for trial in trials if (text := _difference(trial, found[trial.number])) is not None
    ]
    if differences:
        differences += _front_difference(study, counted)
    return VerdictFront(counted, sum(isinstance(each, Accuracies) for each in found.values()), tuple(differences))


def file_accuracies(path: Path) -> Accuracies:
    """What `ccdist.verdicts.accuracies` gives of a file of verdicts, without its rows ever being Python objects.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedVerdictsError: it cannot be read, or has no rows.
    """
    try:
        with pq.ParquetFile(path, read_dictionary=COLUMNS) as file:
            # pyarrow's threads would work on one small file each; whole files beside each other are faster.
            table = file.read(COLUMNS, use_threads=False)
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise DamagedVerdictsError(_OTHER_COLUMNS) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DamagedVerdictsError(f"is damaged ({' '.join(str(error).split())})") from error
    if not all(pa.types.is_dictionary(field.type) for field in table.schema):
        raise DamagedVerdictsError(_OTHER_COLUMNS)
    if table.num_rows == 0:
        raise DamagedVerdictsError("has no rows")
    return accuracies_of_counts(pair_counts(table))


def pair_counts(table: pa.Table) -> Counter[tuple[str | None, str | None]]:
    """How many rows have each (verdict, method)."""
    counts: Counter[tuple[str | None, str | None]] = Counter()
    # Each chunk has dictionaries of its own; chunks of the two columns end at the same rows only by accident.
    for batch in table.to_batches():
        (verdicts, verdict_codes), (methods, method_codes) = (_codes(batch.column(name)) for name in COLUMNS)
        pairs = np.bincount(verdict_codes * len(methods) + method_codes, minlength=len(verdicts) * len(methods))
        for code in pairs.nonzero()[0].tolist():
            verdict, method = divmod(code, len(methods))
            counts[verdicts[verdict], methods[method]] += int(pairs[code])
    return counts


def _codes(column: pa.Array) -> tuple[list[str | None], NDArray[np.int64]]:
    """The values that occur in a column, and for each row the place of its own; null is a value like others."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    values = [*encoded.dictionary.to_pylist(), None]
    codes = encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
    return values, codes.astype(np.int64)


def accuracies_of_counts(counts: Mapping[tuple[str | None, str | None], int]) -> Accuracies:
    """The accuracies of `ccdist.verdicts.accuracies`: sums of counts, divided once.

    Raises:
        ValueError: nothing was counted.
    """
    total = sum(counts.values())
    if total == 0:
        raise ValueError("no images were verified; accuracies of an empty table are not defined")
    falsified = {method: count for (verdict, method), count in counts.items() if verdict == Verdict.FALSIFIED}
    clean, attacked = falsified.get("clean", 0), sum(falsified.get(attack, 0) for attack in ATTACKS)
    certified = sum(count for (verdict, _), count in counts.items() if verdict == Verdict.CERTIFIED)
    return Accuracies(
        standard=(total - clean) / total,
        adversarial=(total - clean - attacked) / total,
        certified=certified / total,
        certified_upper=(total - sum(falsified.values())) / total,
        num_images=total,
    )


def _counted(path: Path) -> Accuracies | str:
    """The accuracies of a file, or in words why there are none."""
    try:
        return file_accuracies(path)
    except FileNotFoundError:
        return "is missing"
    except DamagedVerdictsError as error:
        return str(error)


def _recounted(trial: TrialRecord, found: Accuracies | str | None) -> TrialRecord:
    """The trial with the results of its verdicts, or without any."""
    if found is None:
        return trial
    if isinstance(found, str):
        return replace(
            trial, standard_accuracy=None, adversarial_accuracy=None, certified_accuracy=None, certified_upper=None
        )
    return replace(
        trial,
        standard_accuracy=found.standard,
        adversarial_accuracy=found.adversarial,
        certified_accuracy=found.certified,
        certified_upper=found.certified_upper,
        num_images=found.num_images,
    )


def _difference(trial: TrialRecord, found: Accuracies | str) -> str | None:
    """What is wrong with a COMPLETE trial; None: nothing."""
    if isinstance(found, str):
        return f"verdicts.parquet {found}; only a verification of the student makes it anew"
    pairs = {name: (getattr(_recounted(trial, found), name), getattr(trial, name)) for name in _COMPARED}
    told = [
        f"{name} {_spelled(counted)}, not {_spelled(held)}"
        for name, (counted, held) in pairs.items()
        if counted != held
    ]
    return f"verdicts.parquet gives {', '.join(told)}" if told else None


def _spelled(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"


def _front_difference(study: StudyRecord, counted: StudyRecord) -> list[Difference]:
    """Whether trials come to the front or leave it when their verdicts are counted."""
    before, after = (_members(record) for record in (study, counted))
    parts = [
        f"without {_listed(before - after)}" * bool(before - after),
        f"with {_listed(after - before)}" * bool(after - before),
    ]
    changed = " and ".join(filter(None, parts))
    return [Difference("front", f"by the verdicts it is one {changed}")] if changed else []


def _members(study: StudyRecord) -> set[str]:
    return {trial.key for member in study_front(study).members for trial in member.trials}


def _listed(keys: set[str], most: int = 5) -> str:
    shown = sorted(keys)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most:,} more" if len(shown) > most else "")
