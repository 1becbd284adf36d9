"""The study's database and the sampler at a size: SQLite as a search opens it, and a PostgreSQL server of its own.

    open      a driver reads the study, at its start
    store     a suggestion becomes a WAITING trial; start: it is RUNNING
    rungs     three rungs; tell: the result
    size      of the database, MB
    suggest   a sampler's suggestion, by kind; SLOW ones run in a thread of the driver

PostgreSQL runs here without fsync, as in the tests: what is measured is the driver's side and the server's work, and a
commit to a server's disk is to be added. SQLite's commits are on the disk.
"""

import secrets
import sqlite3
import tempfile
from collections import deque
from pathlib import Path

from benchmarks.bookkeeping import FINGERPRINT, Stopwatch, one_trial
from benchmarks.postgres_server import running_postgres
from benchmarks.scale_driver import config_of, filled
from benchmarks.scale_measure import Measured, apart, measured, timed
from search.config import SearchConfig
from search.space import Space
from search.studies.database import open_storage, postgres_url
from search.study import Study

PART = "database"
PARTS = ("store", "start", "rungs", "tell")
SAMPLERS = ("random", "tpe", "nsga2", "gp")
RUNNING = 16
# In the order in which foreign keys want them.
TABLES = ("trials", "trial_params", "trial_values", "trial_user_attributes", "trial_system_attributes")


def measure(space: str, trials: int, repeats: int, *, postgres: bool) -> list[Measured]:
    """Both databases, and the samplers, at one size."""
    config = config_of(space, 10 * trials)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = apart(filled, folder, config, trials, 0)
        megabytes = (folder / "study.db").stat().st_size / 2**20
        found = [measured(PART, "SQLite: size", trials, [megabytes], "MB")]
        if postgres:
            with running_postgres(secrets.token_hex()) as server:
                found += apart(_copied, config, folder / "study.db", server.url(), trials)
                found += apart(_driven, config, server.url(), "PostgreSQL", trials, repeats)
        found += apart(_driven, config, url, "SQLite", trials, repeats)
        found += apart(_suggested, space, url, trials, repeats)
    return found


def _driven(config: SearchConfig, url: str, database: str, trials: int, repeats: int) -> list[Measured]:
    opened: list[Study] = []
    found = [timed(PART, f"{database}: open", trials, lambda: opened.append(_open(config, url)), 1, uncounted=0)]
    study = opened[0]
    running = deque(study.ask().number for _ in range(RUNNING))
    clocks = []
    for _ in range(repeats + 1):
        clocks.append(Stopwatch())
        one_trial(study, running, clocks[-1])
    return found + [
        measured(PART, f"{database}: {part}", trials, [clock.seconds[part] for clock in clocks[1:]]) for part in PARTS
    ]


def _suggested(space: str, url: str, trials: int, repeats: int) -> list[Measured]:
    """Each sampler on the study, which is opened once: to open it takes longer than all of them."""
    study = _open(config_of(space, 10 * trials), url)
    found = [timed(PART, "snapshot for a sampler", trials, study.prepare, repeats)]
    for sampler in SAMPLERS:
        study.config = config_of(space, 10 * trials, sampler)
        name, times = f"suggest by {sampler}", max(3, repeats // 4)
        found.append(timed(PART, name, trials, lambda: study.prepare().suggest(), times))
    return found


def _open(config: SearchConfig, url: str) -> Study:
    return Study.open(config, Space(config), url, FINGERPRINT)


def _copied(config: SearchConfig, database: Path, url: str, trials: int) -> list[Measured]:
    """Put the SQLite study's trials into PostgreSQL; returns the size there."""
    import psycopg

    study = _open(config, url)  # makes tables and study
    open_storage(url).engine.dispose()
    source = sqlite3.connect(database)
    with psycopg.connect(postgres_url(url).replace("+psycopg", ""), autocommit=True) as target:
        (study_id,) = target.execute("SELECT study_id FROM studies").fetchone() or (None,)
        for table in TABLES:
            columns = source.execute(f"PRAGMA table_info({table})").fetchall()
            # The server numbers rows itself; other tables refer to trials by their number.
            own = [row[1] for row in columns if not row[5] or table == "trials"]
            names = ", ".join(own)
            with target.cursor().copy(f"COPY {table} ({names}) FROM STDIN") as copy:  # type: ignore[arg-type]
                for row in source.execute(f"SELECT {names} FROM {table} ORDER BY trial_id"):
                    values = list(row)
                    if table == "trials":
                        values[own.index("study_id")] = study_id
                    copy.write_row(values)
        target.execute(
            "SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), (SELECT max(trial_id) FROM trials))"
        )
        target.execute("ANALYZE")
        (size,) = target.execute("SELECT pg_database_size(current_database())").fetchone() or (0,)
    source.close()
    assert not study.trials()
    return [measured(PART, "PostgreSQL: size", trials, [size / 2**20], "MB")]
