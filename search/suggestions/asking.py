"""Suggestions computed beside the search: a slow sampler never holds up the results of running trials."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from search.study import Proposal, Study
from search.suggestions.sampling import Suggested

# Samplers that take longer for a suggestion than a driver may be away from its results.
SLOW_SAMPLERS = ("gp",)


class Pool(Protocol):
    """Where suggestions are computed."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]: ...
    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None: ...


class Inline:
    """Computes at once."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        pass


class Asker:
    """One suggestion at a time, stored as a WAITING trial as soon as it is known.

    A fast sampler is asked when a trial is wanted, so that it knows every result until then. A slow one is asked in
    a thread, and again as soon as a suggestion was taken: the next one waits for its slot, not the slot for it.
    """

    def __init__(self, pool: Pool, *, ahead: bool) -> None:
        self._pool, self._ahead = pool, ahead
        self._asked: tuple[Proposal, Future[Suggested]] | None = None

    @classmethod
    def of(cls, sampler: str) -> "Asker":
        """The asker that suits a sampler."""
        if sampler in SLOW_SAMPLERS:
            return cls(ThreadPoolExecutor(1, "suggestions"), ahead=True)
        return cls(Inline(), ahead=False)

    def take(self, study: Study) -> int | None:
        """Store the next suggestion and give its trial's number; None while it is being computed."""
        if self._asked is None:
            self._ask(study)
        assert self._asked is not None
        proposal, future = self._asked
        if not future.done():
            return None
        number = study.enqueue(proposal, future.result())
        self._asked = None  # not before: a suggestion that could not be stored is not lost
        return number

    def look_ahead(self, study: Study) -> None:
        """Start computing the next suggestion, if that is slow."""
        if self._ahead and self._asked is None:
            self._ask(study)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, study: Study) -> None:
        proposal = study.prepare()
        self._asked = proposal, self._pool.submit(proposal.suggest)
