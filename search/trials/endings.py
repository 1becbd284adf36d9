"""How a trial ends: in its files, and in its journal, from which tracking is told.

A trial that is stopped is ended by the driver while its worker is still blocked in the report that stopped it: the
worker does nothing more, so the trial's lock, which it holds to the last, is not asked for.
"""

from collections.abc import Mapping
from dataclasses import replace

import pyarrow.parquet as pq
import torch

from ccdist import atomic_files
from ccdist.atomic_files import write_table
from ccdist.device_memory import is_out_of_memory as lacks_memory
from ccdist.training import NonFiniteLossError
from search.artifacts.places import TrialPlaces, discard, load_result, save_result
from search.studies.records import TrialResult
from search.tracked import run_names
from search.trials.student_model import journal_model
from search.trials.verifying import partial_verdicts
from tracking.journal import Journal
from tracking.tables import table_json, tables_tag

# Rows of the table of verdicts that MLflow's page shows; the whole table is in the Parquet file beside it.
HEAD_ROWS = 100


def conclude(places: TrialPlaces, journal: Journal, result: TrialResult, seconds: Mapping[str, float]) -> None:
    """End a trial that has verdicts: the artefacts first, then the result, so that who finds it finds everything.

    Args:
        seconds: what else the trial spent its time on, by name.
    """
    journal.artifact(places.student, run_names.STUDENT_FOLDER)
    tags = run_names.end_tags("COMPLETE", result.reason) | {run_names.VERIFICATION: result.verification_state}
    if places.verdicts.exists():  # a verification that was stopped may have stored none
        tags |= _tell_verdicts(places, journal)
    tags |= journal_model(places, journal, result)
    tags |= {f"cert.{name}": value for name, value in result.provenance.items()}
    before = load_result(places)
    if before is not None and before.reason is not None and result.reason is None:
        tags[run_names.REASON] = ""  # its verification has gone on, and a tag stays until it gets another text
    journal.end("FINISHED", run_names.result_metrics(result, seconds), tags)
    save_result(places, result)
    discard(places)


def _tell_verdicts(places: TrialPlaces, journal: Journal) -> dict[str, str]:
    """The table of verdicts, and its first rows as a page shows them; returns the tag that says so."""
    head = pq.read_table(places.verdicts).slice(0, HEAD_ROWS)
    rows = zip(*(column.to_pylist() for column in head.columns), strict=True)
    atomic_files.write_text(places.verdicts_shown, table_json(head.column_names, rows))
    for path in (places.verdicts, places.verdicts_shown):
        journal.artifact(path, run_names.VERIFICATION_FOLDER)
    return tables_tag(f"{run_names.VERIFICATION_FOLDER}/{places.verdicts_shown.name}")


def conclude_stopped(places: TrialPlaces, result: TrialResult, reason: str | None = None) -> TrialResult:
    """End a trial whose verification was stopped with the result that it reported last.

    Args:
        reason: why it was stopped; None: the result says so.

    Returns:
        The result as it is stored: that of an earlier call, if there was one.
    """
    stored = load_result(places)
    if stored is not None:
        return stored
    result = result if reason is None else replace(result, reason=reason)
    verdicts = partial_verdicts(places)
    if verdicts is not None:
        write_table(places.verdicts, verdicts)
    with Journal(places.journal) as journal:
        conclude(places, journal, result, {})
    return result


def conclude_training_stopped(places: TrialPlaces, reason: str) -> None:
    """End a trial whose training was stopped; of its files nothing stays that is of use to a training only."""
    with Journal(places.journal) as journal:
        journal.end("FINISHED", {}, run_names.end_tags("STOPPED", reason))
    discard(places)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a trial that is run again with more memory may succeed."""
    return isinstance(error, Exception) and not isinstance(error, NonFiniteLossError) and lacks_memory(error)


def is_of_gpu(error: BaseException) -> bool:
    """Whether it is a GPU's memory that was too little, and not the host's."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "CUDA" in told or "_STATUS_ALLOC_FAILED" in told


def failure_reason(error: BaseException) -> str:
    """One line for the study: what kind of failure, and its text."""
    if is_out_of_memory(error):
        kind = "out of memory"
    elif isinstance(error, NonFiniteLossError):
        kind = "not finite"
    else:
        kind = type(error).__name__
    text = " ".join(str(error).split())
    return f"{kind}: {text[:500]}" if text else kind
