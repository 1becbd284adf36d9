"""The locks of `ccdist.locks`, refused in a search's own words."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ccdist import locks
from search.errors import UserError

# What a file system says that has no locks, such as Lustre mounted without the option flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(UserError):
    """Another process holds the lock; the text names it."""


class NoLocksError(UserError):
    """Files cannot be locked there."""


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file for the time of the context.

    Args:
        wait: wait for the holder to finish or die; else refuse at once.

    Raises:
        LockedError: it is held and `wait` is False.
        NoLocksError: the file system has no locks.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.exclusive(path, wait=wait))
        except locks.LockedError as error:
            raise LockedError(
                f"{path} is held by process {error.holder}: that search still runs; wait for it, or stop it first"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise NoLocksError(
                f"{path} cannot be locked ({error.strerror}); choose a folder on another file system, or mount this "
                "one with locks"
            ) from error
        yield
