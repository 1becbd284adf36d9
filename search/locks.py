"""The locks of `ccdist.locks`, refused in a search's own words."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ccdist import locks
from search.errors import UserError


class LockedError(UserError):
    """Another process holds the lock; the text names it."""


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file for the time of the context.

    Args:
        wait: wait for the holder to finish or die; else refuse at once.

    Raises:
        LockedError: it is held and `wait` is False.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.exclusive(path, wait=wait))
        except locks.LockedError as error:
            raise LockedError(
                f"{path} is held by process {error.holder}: that search still runs; wait for it, or stop it first"
            ) from None
        yield
