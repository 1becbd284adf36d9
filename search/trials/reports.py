"""What a trial tells while it runs, and the two ways in which it steps aside. Whoever listens implements `Reports`."""

from typing import Protocol

from search.studies.records import RungValues, TrialResult


class Reports(Protocol):
    """Whoever follows a trial. Each call may raise SystemExit: the trial was stopped, and everything is on disk."""

    def advanced(self, phase: str, done: int, of: int) -> None:
        """An epoch is over; told after every one."""

    def rung(self, name: str, values: RungValues) -> None:
        """A rung is reached; told again by a trial that goes on from there."""

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        """What the verification has shown up to now, as the result that it has if it is stopped here."""


class WaitingForTeacher(Exception):
    """Another process trains the teacher that the trial needs; the trial can be run again when it is there."""

    def __init__(self, key: str, holder: str) -> None:
        super().__init__(f"teacher {key} is being trained by {holder}")
        self.key = key
