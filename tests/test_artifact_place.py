"""An object store's address, and what is said of one that cannot be used."""

import errno
import os
from pathlib import Path

import pytest
import torch
from object_store import Disk, Store
from pyarrow.fs import LocalFileSystem
from studies import config_of
from trial_moments import (
    Told,
    at,
    state,
    trained,
    work,
)

from ccdist.networks import build_network
from ccdist.training import TrainingResult
from search.artifacts import remote_files, workplace
from search.artifacts.artifact_place import ArtifactPlace, PlaceError, probe
from search.artifacts.disk_space import StorageAwayError
from search.artifacts.leases import Lease, Leases
from search.artifacts.remote_files import UnreachableError
from search.errors import UserError
from search.storage import Storage
from search.teachers import TeacherStore

pytest_plugins = ("trial_fixtures",)
pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://AKIA:hush@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://hush@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("gs://hush@bucket/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("abfs://box:hush@account.dfs.core.windows.net/x", "holds a login"),
        ("s3://bucket/x?secret_key=hush", "an option that is not known"),
        ("s3://bucket/x#hush", "expected a folder, or an address"),
        ("s3://", "expected a folder, or an address"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_it(tmp_path: Path, uri: str, text: str) -> None:
    with pytest.raises(PlaceError, match=text) as refused:
        Storage.of(config_of(tmp_path, storage={"artifacts": uri}), None)
    assert "hush" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_addresses_that_are_read(tmp_path: Path) -> None:
    options = "endpoint_override=localhost:1&scheme=http&region=eu-west-1"
    for uri in (f"s3://bucket/a/b?{options}", "gs://anonymous@bucket/a", "abfs://box@a.dfs.core.windows.net/x"):
        storage = Storage.of(config_of(tmp_path, storage={"artifacts": uri}), None)
        assert storage.workers_artifacts == uri
    storage = Storage.of(config_of(tmp_path, storage={"artifacts": f"s3://bucket/a/?{options}"}), None)
    assert storage.teachers == f"s3://bucket/a/teachers?{options}"


def test_a_storage_is_tried_in_one_line(tmp_path: Path) -> None:
    assert probe(f"file://{tmp_path}/store") is None
    assert list((tmp_path / "store").iterdir()) == []
    (tmp_path / "file").touch()
    told = probe(f"file://{tmp_path}/file/below")
    assert told is not None
    assert "cannot be used" in told
    assert "\n" not in told
    assert "is no storage that can be used" in str(probe("nosuch://bucket/x"))


def test_a_store_that_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Store(Disk(), before=lambda number: at(number, OSError("AWS Error NO_SUCH_BUCKET\nhush"))(number))
    monkeypatch.setattr(ArtifactPlace, "open", lambda _self: (refusing, "bucket/x"))
    told = str(probe("s3://bucket/x?region=eu-west-1"))
    assert told.startswith("storage s3://bucket/x?*** cannot be used (AWS Error NO_SUCH_BUCKET")
    assert "AWS_ACCESS_KEY_ID" in told
    assert "\n" not in told


def test_a_refusal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE_S", 100.0)
    calls: list[int] = []

    def refuse(number: int) -> None:
        calls.append(number)
        raise OSError("AWS Error ACCESS_DENIED during HeadObject (Request ID: 123)")

    with pytest.raises(UnreachableError, match=r"ACCESS_DENIED during HeadObject$"):
        remote_files.exists(Store(Disk(), before=refuse), "bucket/x")
    assert calls == [0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_mount_that_comes_back_is_waited_for(number: int) -> None:
    store = Store(Disk(), before=at(0, OSError(number, os.strerror(number))))
    assert not remote_files.exists(store, "bucket/x")


class NoFolders(Store):
    """A store in which to make a folder fails once, as one that was away for a moment."""

    failed = False

    def create_dir(self, path: str, *, recursive: bool) -> None:
        if not self.failed:
            self.failed = True
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")


def test_a_lease_and_a_teacher_survive_an_outage_at_the_making_of_a_folder() -> None:
    assert isinstance(Leases(NoFolders(Disk()), "bucket/teachers").acquire("key", "trial"), Lease)
    disk = Disk()
    lease = TeacherStore(Store(disk), "bucket/teachers").acquire("key", "trial")
    assert isinstance(lease, Lease)
    network = build_network("mlp", input_shape=(1, 2, 2), num_classes=2, width=2, seed=0).eval()
    store = TeacherStore(NoFolders(disk), "bucket/teachers")
    store.train(lease, lambda _state: TrainingResult(network, [], 1.0))
    assert torch.equal(store.load("key").network(torch.ones(1, 1, 2, 2)), network(torch.ones(1, 1, 2, 2)))


class Resolver:
    """In place of `FileSystem`: its first answers are errors."""

    def __init__(self, folder: Path, errors: list[str]) -> None:
        self.folder, self.errors, self.calls = folder, errors, 0

    def from_uri(self, uri: str) -> tuple[LocalFileSystem, str]:
        self.calls += 1
        if self.errors:
            raise OSError(self.errors.pop(0))
        return LocalFileSystem(), f"{self.folder}/{uri.partition('://')[2].partition('?')[0]}"


REGION = "When resolving region for bucket 'b': AWS Error NETWORK_CONNECTION during HeadBucket operation: curlCode: 6"


def test_a_worker_waits_for_a_store_that_cannot_beopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised in the end says that the store is away: no trial fails of it."""
    monkeypatch.setenv(workplace.SCRATCH, str(tmp_path / "scratch"))
    resolver = Resolver(tmp_path, [REGION] * 3)
    monkeypatch.setattr(remote_files, "FileSystem", resolver)
    work("s3://b/waited", 1, lambda places, _: state(places, "last"), Told(lambda: None))
    assert resolver.calls == 4
    resolver.errors = [REGION] * 2
    assert not TeacherStore.of("s3://b/waited/teachers").has("key")
    resolver.errors = [REGION] * 10_000
    for act in (lambda: work("s3://b/away", 1, trained, Told(lambda: None)), lambda: TeacherStore.of("s3://b/t")):
        with pytest.raises(StorageAwayError, match="NETWORK_CONNECTION"):
            act()


def test_a_driver_does_not_wait_for_a_store_that_cannot_beopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE_S", 100.0)
    resolver = Resolver(tmp_path, [REGION] * 3)
    monkeypatch.setattr(remote_files, "FileSystem", resolver)
    assert "cannot be used (When resolving region" in str(probe("s3://b/driver"))
    monkeypatch.chdir(tmp_path)
    storage = Storage.of(config_of(tmp_path, storage={"artifacts": "s3://b/driver"}), None)
    for act in (storage.prepare, lambda: storage.mirror("tiny")):
        with pytest.raises(UserError, match=r"^storage s3://b/driver cannot be used \(When resolving region") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert resolver.calls == 3


def test_a_bucket_that_is_not_there_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "PATIENCE_S", 100.0)
    resolver = Resolver(tmp_path, ["Bucket 'b' not found"])
    monkeypatch.setattr(remote_files, "FileSystem", resolver)
    with pytest.raises(UnreachableError, match="not found"):
        TeacherStore.of("s3://b/none")
