"""How a trial ends: in its files, and in its journal, from which tracking is told.

A trial that is stopped is ended by the driver while its worker is still blocked in the report that stopped it: the
worker does nothing more, so the trial's lock, which it holds to the last, is not asked for.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ccdist.atomic_files import write_table
from ccdist.training import NonFiniteLossError
from search.places import TrialPlaces, discard, load_result, save_result
from search.records import TrialResult
from search.verifying import partial_verdicts
from tracking.journal import Journal


def conclude(places: TrialPlaces, journal: Journal, result: TrialResult, seconds: Mapping[str, float]) -> None:
    """End a trial that has verdicts: the artefacts first, then the result, so that who finds it finds everything.

    Args:
        seconds: what else the trial spent its time on, by name.
    """
    journal.artifact(places.student, "student")
    journal.artifact(places.verdicts, "verification")
    metrics = {
        "standard_accuracy": result.standard_accuracy,
        "adversarial_accuracy": result.adversarial_accuracy,
        "certified_accuracy": result.certified_accuracy,
        "certified_upper": result.certified_upper,
        "seconds": result.seconds,
        **{f"cost/{name}_seconds": value for name, value in (*seconds.items(), *result.costs.items())},
    }
    tags = {"cert.state": "COMPLETE", "cert.verification": result.verification_state}
    if result.reason is not None:
        tags["cert.reason"] = result.reason
    journal.end("FINISHED", metrics, tags | {f"cert.{name}": value for name, value in result.provenance.items()})
    save_result(places, result)
    discard(places)


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
        journal.end("FINISHED", {}, {"cert.state": "STOPPED", "cert.reason": reason})
    discard(places)


def failure_reason(error: BaseException) -> str:
    """One line for the study: what kind of failure, and its text."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        kind = "out of memory"
    elif isinstance(error, NonFiniteLossError):
        kind = "not finite"
    else:
        kind = type(error).__name__
    text = " ".join(str(error).split())
    return f"{kind}: {text[:500]}" if text else kind
