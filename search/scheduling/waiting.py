"""Who waits for whose teacher: in the driver, so that a trial that waits holds no GPU."""

import time
from collections.abc import Callable
from typing import Protocol

from search.study import Assignment

# Whether another search still trains a teacher is looked at after so many seconds.
RETRY_S = 5.0


class Teachers(Protocol):
    """The store of teachers, as the driver sees it."""

    def has(self, key: str) -> bool: ...

    def holder(self, key: str) -> str | None:
        """Who trains the teacher now. One store has to be asked again and again to notice a death."""

    def forget(self, key: str, holder: str) -> None:
        """Give back the lease of a trial whose process is dead."""


class TeacherQueue:
    """Lets one trial for each missing teacher start; the others of that teacher follow when it is there.

    A worker that finds its teacher's lease held, by a search that this driver knows nothing of, ends at once and
    waits here too.

    Args:
        teacher_of: the key of the teacher that a trial needs, or None.
        teachers: the store, the same one for the whole search.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        teacher_of: Callable[[Assignment], str | None],
        teachers: Teachers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._teacher_of, self._teachers, self._clock = teacher_of, teachers, clock
        self._present: set[str] = set()
        self._trained_by: dict[str, int] = {}  # teacher -> number of the trial that trains it
        self._elsewhere: dict[str, float] = {}  # teacher that another search trains -> when to look again

    def teacher_of(self, assignment: Assignment) -> str | None:
        """The key of the teacher that a trial needs."""
        return self._teacher_of(assignment)

    def may_start(self, assignment: Assignment) -> bool:
        """Whether the trial can start now; if it is to train its teacher, others wait for it from now on."""
        key = self._teacher_of(assignment)
        if key is None or key in self._present:
            return True
        if self._is_trained(key):
            return False
        if self._teachers.has(key):
            self._present.add(key)
        else:
            self._trained_by[key] = assignment.number
        return True

    def is_kept(self, assignment: Assignment) -> bool:
        """Whether the trial cannot start because its teacher is trained now; a look, which makes nobody wait."""
        key = self._teacher_of(assignment)
        return key is not None and key not in self._present and self._is_trained(key)

    def advanced(self, assignment: Assignment, phase: str) -> None:
        """The trial has reached a phase: whatever follows the teacher's shows that the teacher is there."""
        if phase != "teacher":
            self._release(assignment, is_present=True)

    def held_elsewhere(self, assignment: Assignment) -> None:
        """The trial found its teacher being trained by another search."""
        key = self._teacher_of(assignment)
        if key is not None:
            self._present.discard(key)
            self._elsewhere[key] = self._clock() + RETRY_S

    def ended(self, assignment: Assignment) -> None:
        """The trial is over, with or without a teacher: the next one may try, and waits for no dead one's lease."""
        key = self._release(assignment, is_present=False)
        if key is not None:
            self._teachers.forget(key, assignment.key)

    def _is_trained(self, key: str) -> bool:
        return key in self._trained_by or self._is_trained_elsewhere(key)

    def _is_trained_elsewhere(self, key: str) -> bool:
        if key not in self._elsewhere:
            return False
        if self._clock() < self._elsewhere[key]:
            return True
        self._elsewhere[key] = self._clock() + RETRY_S
        if not self._teachers.has(key) and self._teachers.holder(key) is not None:
            return True
        del self._elsewhere[key]
        return False

    def _release(self, assignment: Assignment, *, is_present: bool) -> str | None:
        """The teacher that others waited for it to train, if any."""
        if assignment.number not in self._trained_by.values():  # at most reports, and cheaper than to find its teacher
            return None
        key = self._teacher_of(assignment)
        if key is None or self._trained_by.get(key) != assignment.number:
            return None
        del self._trained_by[key]
        if is_present:
            self._present.add(key)
        return key
