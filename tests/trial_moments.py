"""The life of a trial with an object store: what it has on its disk at the moments at which it is stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_store import Disk, Store

from search.artifacts.artifact_place import ArtifactPlace
from search.artifacts.manifests import StoredFiles
from search.artifacts.mirror import Mirror
from search.artifacts.places import TrialPlaces
from search.artifacts.trial_copies import LocalFiles, Writer, pull
from search.artifacts.workplace import Workplace
from search.studies.records import RungValues, TrialResult
from tracking.journal import Journal

KEY = "tiny-0003"
FOLDER = f"trials/{KEY}"
JOURNAL = f"journal/{KEY}.jsonl"

# What a trial has on its disk at the moments at which it is stored.
MOMENTS: list[dict[str, str]] = [
    {JOURNAL: "start\n", f"{FOLDER}/state.safetensors": "epoch 1"},
    {JOURNAL: "start\n1\n2\n", f"{FOLDER}/state.safetensors": "epoch 2", f"{FOLDER}/rungs.json": "{}"},
    {
        JOURNAL: "start\n1\n2\n3\n",
        f"{FOLDER}/rungs.json": "{}",
        f"{FOLDER}/student/network.json": "mlp",
        f"{FOLDER}/verification/rows.parquet": "rows",
    },
    {
        JOURNAL: "start\n1\n2\n3\nend\n",
        f"{FOLDER}/student/network.json": "mlp",
        f"{FOLDER}/verdicts.parquet": "all",
        f"{FOLDER}/result.json": "0.9",
    },
]


every = pytest.mark.parametrize("step", [5, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(200)])])


def stored(store: Store) -> StoredFiles:
    return StoredFiles(store, "bucket/tiny", KEY)


def put(root: Path, content: dict[str, str]) -> None:
    """Make these a trial's local files, as code that writes whole files does."""
    for path in LocalFiles(root, KEY).paths():
        if path not in content:
            (root / path).unlink()
    for path, text in content.items():
        file = root / path
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / ".new").write_text(text)
            (file.parent / ".new").replace(file)


def got(root: Path) -> dict[str, str]:
    return {path: (root / path).read_text() for path in LocalFiles(root, KEY).paths()}


def writer(store: Store, root: Path, start: int, epoch: int = 1) -> Writer:
    return Writer(stored(store), LocalFiles(root, KEY), (epoch, start))


def live(store: Store, root: Path, start: int, moments: list[dict[str, str]] = MOMENTS) -> list[dict[str, str]]:
    """A worker's life, from what the store has on; returns what it found."""
    own = writer(store, root, start)
    own.begin()
    found = got(root)
    for moment in moments:
        put(root, moment)
        own.push()
    return [found]


def counted(disk: Disk, tmp_path: Path) -> dict[str, str]:
    """What somebody finds who looks now."""
    tmp_path.mkdir(exist_ok=True)
    folder = tmp_path / f"look {len(list(tmp_path.iterdir()))}"
    return got(folder) if pull(stored(Store(disk)), LocalFiles(folder, KEY), lambda _: lambda _path: True) else {}


def garbage(disk: Disk) -> list[str]:
    """Objects that no manifest that counts names."""
    newest = stored(Store(disk)).newest()
    assert newest is not None
    named = {
        f"bucket/tiny/trials/{KEY}/{each.version}/{path.removeprefix(f'{FOLDER}/')}"
        for path, each in newest.files.items()
    }
    return sorted(disk.objects.keys() - named - {f"bucket/tiny/manifests/{KEY}/{newest.version}.json"})


def at(number: int, error: BaseException) -> Callable[[int], None]:
    def hook(operation: int) -> None:
        if operation == number:
            raise error

    return hook


class Told:
    """Reports, with what the store has when each is told."""

    def __init__(self, look: Callable[[], Any], stop_at: str = "") -> None:
        self._look, self._stop_at = look, stop_at
        self.seen: list[tuple[str, Any]] = []

    def _tell(self, kind: str) -> None:
        self.seen.append((kind, self._look()))
        if kind == self._stop_at:
            raise SystemExit

    def advanced(self, phase: str, done: int, of: int) -> None:
        self._tell("advanced")

    def rung(self, name: str, values: RungValues) -> None:
        self._tell("rung")

    def verifying(self, result: TrialResult, phase: str, done: int, of: int) -> None:
        self._tell("verifying")


def mirror(uri: str, folder: Path, destination: str | None = None) -> Mirror:
    return Mirror(ArtifactPlace.of(uri), "tiny", folder, destination)


def own(mirror: Mirror) -> None:
    """As a driver does that has claimed the study."""
    mirror.set_owner("id")
    mirror.root.mkdir(parents=True, exist_ok=True)
    (mirror.root / "study.id").write_text("id")


def work(uri: str, start: int, act: Callable[[TrialPlaces, Any], None], told: Told) -> None:
    with Workplace(uri, "tiny", 1).trial(KEY, start, told) as (places, reports):
        act(places, reports)


def state(places: TrialPlaces, text: str) -> None:
    places.folder.mkdir(parents=True, exist_ok=True)
    places.state.with_name(".new").write_text(text)
    places.state.with_name(".new").replace(places.state)


def opened(uri: str) -> tuple[Any, str]:
    filesystem, root = ArtifactPlace.of(uri).open()
    return filesystem, f"{root}/tiny"


def trained(places: TrialPlaces, _reports: Any) -> None:
    """A trial with a student, in the middle of its verification."""
    with Journal(places.journal) as journal:
        journal.start(KEY, {"alpha": 0.5}, {})
        journal.metrics(1, {"loss": 1.0})
    state(places, "last")
    places.student.mkdir()
    for name in ("network.json", "weights.safetensors"):
        (places.student / name).write_text(name)
