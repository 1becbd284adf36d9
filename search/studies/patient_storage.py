"""A study's storage as its driver uses it: each operation is effective exactly once, also across outages.

What was asked of a database when its connection broke may have been done or not. So an operation is asked again in a
way that finds out: what sets a value is repeated, and what starts, ends or makes a trial looks first whether it was
done. That only the driver of a study writes it makes this an answer.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from search.studies.database import DatabaseAwayError, DatabaseGoneError, StudyError
from search.studies.patience import PATIENCE, Patience, interruptible

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class PatientStorage:
    """What a driver needs of a study's storage, each operation effective once however often its connection breaks.

    Args:
        storage: raises DatabaseAwayError where it cannot tell whether an operation was done.
        study_id: the storage's own.
        regained: asked after a connection broke: whether nobody else can have written the study since it was opened;
            waits until that can be told, and until what was under way then is done, or will never be, or raises
            DatabaseAwayError.

    Raises:
        DatabaseAwayError: by every operation, if the database stays away.
        StudyError: by every operation that was interrupted, if another driver may have the study now.
    """

    def __init__(
        self, storage: BaseStorage, study_id: int, regained: Callable[[], bool], patience: Patience = PATIENCE
    ) -> None:
        self._storage, self._study_id = storage, study_id
        self._regained, self._patience = regained, patience

    # ---- What may be done twice --------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        return self._do(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))

    def trial(self, trial_id: int) -> FrozenTrial:
        return self._do(lambda: self._storage.get_trial(trial_id))

    def set_study_attribute(self, name: str, value: Any) -> None:
        self._do(lambda: self._storage.set_study_user_attr(self._study_id, name, value))

    def set_attribute(self, trial_id: int, name: str, value: Any) -> None:
        self._do(lambda: self._storage.set_trial_user_attr(trial_id, name, value))

    def set_system_attribute(self, trial_id: int, name: str, value: Any) -> None:
        self._do(lambda: self._storage.set_trial_system_attr(trial_id, name, value))

    def set_param(self, trial_id: int, name: str, value: Any, distribution: BaseDistribution) -> None:
        """Optuna takes no notice of a parameter that is there already."""
        internal = distribution.to_internal_repr(value)
        self._do(lambda: self._storage.set_trial_param(trial_id, name, internal, distribution))

    # ---- What may be done once -----------------------------------------------------------------------------------

    def set_state(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's `set_trial_state_values`: False where a trial that is to be started does not wait."""

        def attempt() -> bool:
            return bool(self._storage.set_trial_state_values(trial_id, state, values))

        def again() -> bool:
            return self._storage.get_trial(trial_id).state == state or attempt()

        return self._do(attempt, again)

    def create(self, number: int, template: FrozenTrial) -> int | None:
        """Make the study's next trial, in one transaction.

        Returns:
            The storage's id of it; None where the study has trials that this driver does not know.
        """

        def attempt() -> int:
            return int(self._storage.create_new_trial(self._study_id, template))

        def again() -> int:
            try:
                made = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
            except KeyError:
                return attempt()
            is_ours = self._storage.get_trial(made).user_attrs == template.user_attrs
            return int(made) if is_ours else attempt()

        trial_id = self._do(attempt, again)
        stored = self._do(lambda: self._storage.get_trial_number_from_id(trial_id))
        return trial_id if stored == number else None

    def _do(self, first: Callable[[], _T], again: Callable[[], _T] | None = None) -> _T:
        """Do it; where the connection breaks, find out with `again` whether it was done, and do it if not."""
        try:
            return first()
        except DatabaseAwayError as error:
            away = error
        again, told = again or first, False
        with interruptible():
            for waited in self._patience.attempts():
                try:
                    if self._regained():
                        return again()
                except DatabaseGoneError:
                    raise
                except DatabaseAwayError as error:
                    away = error
                else:
                    raise StudyError(f"the lock on the study was lost while its database was away: {away}")
                if waited and not told:
                    log.warning("%s; the search waits for it", away)
                    told = True
        raise away
