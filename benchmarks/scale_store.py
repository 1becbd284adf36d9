"""Artefacts of many trials: single requests, and the driver's copy that follows what workers store.

    put, get      one file of 10 kB; list: all files of a folder
    look          the driver's mirror looks at so many trials, and nothing is new
    pull          the same when all of them have stored something; seconds of one trial

Where: a local disk, and an S3 server on this machine (moto, in Python: its own time is most of what is measured, so a
real store, which answers many requests at once, is faster; how many requests there are is the same).
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.s3_server import ENVIRONMENT, s3_server
from benchmarks.scale_measure import Measured, apart, timed
from search.artifacts import remote_files
from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.manifests import Entry, Manifest, StoredStudy, Version
from search.artifacts.mirror import Mirror

PART = "store"
STUDY = "scale"
CONTENT = b"x" * 10_000


def measure(trials: int, repeats: int, *, s3: bool) -> list[Measured]:
    """Both places, each in a process of its own."""
    found = list(apart(_measure, "disk", trials, repeats))
    return found + (list(apart(_measure, "S3", trials, repeats)) if s3 else [])


@contextmanager
def _place(kind: str, folder: Path) -> Iterator[str]:
    if kind == "disk":
        yield f"file://{folder}/store"
        return
    os.environ |= ENVIRONMENT
    with s3_server() as server:
        yield server.uri("scale")


def _measure(kind: str, trials: int, repeats: int) -> list[Measured]:
    with tempfile.TemporaryDirectory() as name, _place(kind, Path(name)) as uri:
        filesystem, root = ArtifactPlace.of(uri).open()
        names = iter(range(10**9))
        found = [
            timed(
                PART,
                f"{kind}: put",
                0,
                lambda: remote_files.publish(filesystem, f"{root}/a/{next(names)}", CONTENT),
                repeats,
            ),
            timed(PART, f"{kind}: get", 0, lambda: remote_files.read(filesystem, f"{root}/a/1"), repeats),
        ]
        stored = StoredStudy(filesystem, f"{root}/{STUDY}")
        file = Path(name) / "journal.jsonl"
        file.write_text(json.dumps({"t": 1.0, "kind": "metrics", "step": 1, "values": {"loss": 0.5}}) + "\n")
        _store(stored, trials, 1, file)
        mirror = Mirror(ArtifactPlace.of(uri), STUDY, Path(name) / "copy", None)
        mirror.pull()
        found.append(timed(PART, f"{kind}: list", trials, stored.newest, repeats))
        found.append(timed(PART, f"{kind}: look", trials, mirror.pull, repeats))
        rounds = max(1, repeats // 10)
        pulled = []
        for number in range(2, rounds + 2):
            _store(stored, trials, number, file)
            pulled.append(timed(PART, "", trials, mirror.pull, 1, each=trials, uncounted=0).median)
        return [*found, Measured(PART, f"{kind}: pull", trials, tuple(sorted(pulled)))]


def _store(stored: StoredStudy, trials: int, count: int, file: Path) -> None:
    """What workers do: a journal of each trial has grown."""
    version = Version(1, 1, count)
    with file.open("a") as journal:
        journal.write(file.read_text().splitlines()[0] + "\n")
    for number in range(trials):
        key = f"{STUDY}-{number:04d}"
        trial = stored.trial(key)
        entry: Entry = trial.upload(version, f"journal/{key}.jsonl", file)
        trial.publish(Manifest(version, {f"journal/{key}.jsonl": entry}))
