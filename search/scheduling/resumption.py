"""Which verification goes on when all trials are done and budget remains."""

from collections.abc import Collection, Sequence

import numpy as np

from search.pareto import surely_dominated, uncertainty
from search.studies.records import TrialRecord


def resumption(
    trials: Sequence[TrialRecord], reference: tuple[float, float], *, without: Collection[int] = ()
) -> int | None:
    """The COMPLETE trial whose undecided images narrow the front's uncertainty most per expected second.

        gain = uncertainty of its box (`search.pareto.uncertainty`) / expected seconds

    Args:
        trials: the study's, in any order.
        reference: hypervolume reference (standard, certified), fractions.
        without: numbers that are not to be chosen: verified now, or no further effort is left to try.

    Returns:
        Its number, of equal gains the smallest. None: no open image of any other trial can move the hypervolume.
    """
    known = sorted((trial for trial in trials if trial.objectives is not None), key=lambda trial: trial.number)
    worst = np.array([trial.objectives for trial in known], dtype=np.float64).reshape(-1, 2)
    best = worst.copy()
    best[:, 1] = [_upper(trial) for trial in known]
    # Rounding may leave a trace of uncertainty where there is none.
    gains = np.where(
        surely_dominated(worst, best) | (best[:, 1] <= worst[:, 1]), 0, uncertainty(worst, best, reference)
    )
    rates = [
        0.0 if trial.number in without or gain <= 0 else gain / expected_seconds(trial)
        for trial, gain in zip(known, gains.tolist(), strict=True)
    ]
    chosen = max(range(len(known)), key=rates.__getitem__, default=None)
    return None if chosen is None or rates[chosen] <= 0 else known[chosen].number


def expected_seconds(trial: TrialRecord) -> float:
    """What deciding a COMPLETE trial's open images may take: as long for each as all took, per image decided.

        seconds = verification seconds / max(1, decided images) * open images

    Open images are harder than the decided ones, so the figure is too low; but seconds spent in vain stay in it, so a
    trial whose images resist becomes dearer with every attempt, and others get their turn. Only the ratio between
    trials matters. A trial without recorded cost counts as one second for each open image.
    """
    share = _upper(trial) - (trial.certified_accuracy or 0.0)
    num_images = trial.num_images or 1
    num_open = share * num_images
    spent = trial.costs.get("verification", 0.0)
    return num_open * (spent / max(1.0, num_images - num_open) if spent > 0 else 1.0)


def _upper(trial: TrialRecord) -> float:
    lower = trial.certified_accuracy or 0.0
    return lower if trial.certified_upper is None else trial.certified_upper
