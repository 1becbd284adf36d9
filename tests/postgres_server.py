"""A PostgreSQL server of the tests' own, one for a file of tests."""

from collections.abc import Iterator

import pytest

from benchmarks.postgres_server import PostgresServer, programs, running_postgres


@pytest.fixture(scope="module")  # a longer life would end in the time limit of a test of another file
def postgres_server() -> Iterator[PostgresServer]:
    if programs() is None:
        pytest.skip("no PostgreSQL server is installed (initdb and postgres): apt-get install postgresql")
    # Signs with a meaning in URLs.
    with running_postgres("p@ss/word", shared_buffers="16MB") as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """The database that is there from the start; tests that share a server share it, locks, tables and all."""
    return postgres_server.url()
