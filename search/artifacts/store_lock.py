"""One driver for a study's folder in an object store, whatever its database: a lease that the driver keeps.

The lock in the study's database already keeps out every other driver of that database. The lease is about copies of it,
such as a study.db that was copied to another machine: they know nothing of each other's locks and write one folder.
"""

import hashlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.leases import EXPIRY_S, Lease, Leases
from search.artifacts.locks import LockedError
from search.studies.database import POSTGRES_CONNECTION, is_postgres, postgres_url, sqlite_file, without_password

log = logging.getLogger(__name__)

_POLL_S = 2.0
_MACHINE_ID = Path("/etc/machine-id")
_WHICH = """
    SELECT system_identifier, (SELECT oid FROM pg_database WHERE datname = current_database()) FROM pg_control_system()
"""


@dataclass(frozen=True)
class StoreLock:
    """The lease of a driver."""

    lease: Lease

    def still_held(self) -> bool:
        """Whether nobody has taken this driver for dead."""
        return not self.lease.lost


@contextmanager
def store_lock(
    place: ArtifactPlace,
    study: str,
    study_url: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[StoreLock]:
    """The lease of a study in a store.

    A driver that holds the lock in a database knows that every other holder of that database's name is dead.

    Args:
        clock, sleep: monotonic seconds, and what waits for some.

    Raises:
        LockedError: a driver with another database has it.
        UnreachableError: the store does not answer.
    """
    filesystem, root = place.open()
    watched, holder = Leases(filesystem, f"{root}/{study}/lock", clock=clock, sleep=sleep), _holder(study_url)
    until, told = clock() + EXPIRY_S + 2 * _POLL_S, False
    while not isinstance(lease := watched.acquire("driver", holder), Lease):
        if clock() >= until:
            raise LockedError(
                f"study {study} in {place} is held by a search with the database {lease.holder}, which still runs; "
                "wait for it, or stop it first"
            )
        if not told:
            log.warning("study %s in %s is held by a search with the database %s: waiting up to %.0f s for a sign of "
                        "life", study, place, lease.holder, EXPIRY_S)  # fmt: skip
            told = True
        sleep(_POLL_S)
    with lease:
        yield StoreLock(lease)


def _holder(study_url: str) -> str:
    """The database by a name that no other has, and the same wherever the search runs."""
    file = sqlite_file(study_url)
    if file is not None:
        return f"{file.resolve()} on {socket.gethostname()}{_machine()}"
    return _postgres_holder(study_url) if is_postgres(study_url) else without_password(study_url)


def _machine() -> str:
    """What tells two machines of one name apart, where the system has it; not the number itself, which is private."""
    try:
        content = _MACHINE_ID.read_bytes().strip()
    except OSError:
        return ""
    return f" ({hashlib.sha256(content).hexdigest()[:8]})" if content else ""


def _postgres_holder(url: str) -> str:
    """A server's own number with the database's, whatever address it was reached by.

    Where the server keeps it to itself: the address; after a crash on a machine with another address for the same
    server, the lease of the dead driver is then waited for.
    """
    engine = create_engine(postgres_url(url), poolclass=NullPool, connect_args=POSTGRES_CONNECTION)
    try:
        with engine.connect() as connection:
            server, database = connection.execute(text(_WHICH)).one()
    except SQLAlchemyError:
        return without_password(url)
    return f"postgresql server {server} database {database}"
