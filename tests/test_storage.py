"""Where a search keeps things: whose folder it is, and how many drivers it takes."""

import errno
import os
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem, _MockFileSystem
from studies import config_of, open_study, tree, write_space

from search import doctor, front, run
from search.artifacts import artifact_place
from search.artifacts.locks import LockedError, NoLocksError
from search.artifacts.mounts import current_mounts, file_system, network_file_system
from search.storage import Storage, StorageError, check_local, stored_address


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    """Trials are trusted by their keys, so the results of a study whose database is gone must not become another's."""
    storage = Storage.of(config_of(tmp_path), str(tmp_path / "runs"))
    storage.claim("tiny", "one")
    storage.claim("tiny", "one")
    with pytest.raises(StorageError, match="holds the trials of another study"):
        storage.claim("tiny", "two")
    storage.claim("other", "two")


def test_the_artefacts_are_found_where_the_last_search_kept_them(tmp_path: Path) -> None:
    url, first = f"sqlite:///{tmp_path}/study.db", "s3://bucket/first"
    config = config_of(tmp_path, storage={"study": url, "artifacts": first})
    assert stored_address(url, "tiny") is None
    open_study(config, tmp_path / "study.db")
    assert stored_address(url, "tiny") == first  # by its space file: nothing was kept yet
    for place, expected in (("gs://bucket/second", "gs://bucket/second"), (str(tmp_path), None), (first, first)):
        for _ in range(2):
            study = open_study(config, tmp_path / "study.db")
            study.note_artifacts(place)
            assert stored_address(url, "tiny") == expected


def test_a_folder_with_trials_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    storage = Storage.of(config_of(tmp_path), str(tmp_path / "runs"))
    (storage.study_folder("tiny") / "trials" / "tiny-0000").mkdir(parents=True)
    with pytest.raises(StorageError, match="holds the trials of another study"):
        storage.claim("tiny", "one")


def test_one_driver_for_a_database_from_whatever_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"study": f"sqlite:///{tmp_path}/study.db", "artifacts": str(tmp_path / "artifacts")}
    config = config_of(tmp_path, storage=places)
    storages = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        storages.append(Storage.of(config, None))
    with storages[0].only_driver("tiny") as lock:
        assert lock.still_held()
        with pytest.raises(LockedError, match="still runs"), storages[1].only_driver("tiny"):
            pass
        with storages[1].only_driver("other"):
            pass
    with storages[1].only_driver("tiny"):
        pass


@pytest.mark.parametrize("uri", ["garbage", "ftp://x/y"])
def test_a_tracking_address_that_is_none_is_refused(tmp_path: Path, uri: str) -> None:
    config = config_of(tmp_path, tracking={"uri": uri})
    with pytest.raises(StorageError, match="expected a server"):
        Storage.of(config, None)


def test_a_driver_notices_that_its_lock_file_is_gone(tmp_path: Path) -> None:
    """The deleted file stays locked, but the next driver would lock a new one of that name."""
    storage = Storage.of(config_of(tmp_path), str(tmp_path / "runs"))
    storage.prepare()
    with storage.only_driver("tiny") as lock:
        assert lock.still_held()
        (tmp_path / "runs" / "study.db.tiny.lock").unlink()
        assert not lock.still_held()
        with pytest.raises(LockedError), storage.only_driver("tiny"):  # the one beside the artefacts still holds
            pass
        assert not lock.still_held()


def test_one_database_has_one_lock_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()
    (tmp_path / "link.db").symlink_to("study.db")
    storages = []
    for name in ("study", "link"):
        places = {"study": f"sqlite:///{tmp_path}/{name}.db", "artifacts": str(tmp_path / name)}
        storages.append(Storage.of(config_of(tmp_path, storage=places), None))
    with storages[0].only_driver("tiny"), pytest.raises(LockedError), storages[1].only_driver("tiny"):
        pass


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("ccdist.locks.fcntl.flock", no_locks)
    storage = Storage.of(config_of(tmp_path), str(tmp_path / "runs"))
    storage.prepare()
    with pytest.raises(NoLocksError, match=r"cannot be locked \(No locks available\)"), storage.only_driver("tiny"):
        pass


# As /proc/mounts shows it: a container's root, a home directory on NFS with a local disk below it, and more.
MOUNTS = r"""
overlay / overlay rw,relatime,lowerdir=/a:/b 0 0
proc /proc proc rw 0 0
/dev/sda1 /data ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/nvme0n1 /home/me/scratch xfs rw 0 0
//server/share /mnt/with\040space cifs rw 0 0
systemd-1 /auto autofs rw 0 0
server:/auto /auto nfs rw 0 0
me@host:/ /mnt/ssh fuse.sshfs rw 0 0
10.0.0.1@tcp:/fs /lustre lustre rw 0 0
beegfs_nodev /beegfs beegfs rw 0 0
mon:6789:/ /ceph ceph rw 0 0
vol /gluster fuse.glusterfs rw 0 0
drvfs /mnt/c 9p rw,aname=drvfs 0 0
host /mnt/shared virtiofs rw 0 0
/dev/sdb1 /mnt/ntfs fuseblk rw 0 0
appimage /mnt/app fuse.squashfuse ro 0 0
server:/old /covered nfs rw 0 0
/dev/sdc1 /covered ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/runs/study.db", "nfs4"),
        ("/mnt/with space/study.db", "cifs"),
        ("/auto/study.db", "nfs"),
        ("/mnt/ssh/study.db", "fuse.sshfs"),
        ("/lustre/a/b/study.db", "lustre"),
        ("/beegfs/study.db", "beegfs"),
        ("/ceph/study.db", "ceph"),
        ("/gluster/study.db", "fuse.glusterfs"),
    ],
)
def test_sqlite_on_a_network_file_system_is_refused(path: str, kind: str) -> None:
    found = network_file_system(Path(path), MOUNTS)
    assert found is not None
    assert found[1] == kind
    with pytest.raises(StorageError, match=rf"a network file system \({kind}\).*postgresql://") as caught:
        check_local(Path(path), MOUNTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/opt/study.db", "overlay"),
        ("/homes/study.db", "overlay"),  # no part of /home
        ("/data/study.db", "ext4"),
        ("/home/me/scratch/study.db", "xfs"),
        ("/mnt/c/study.db", "9p"),
        ("/mnt/shared/study.db", "virtiofs"),
        ("/mnt/ntfs/study.db", "fuseblk"),
        ("/mnt/app/study.db", "fuse.squashfuse"),
        ("/covered/study.db", "ext4"),
    ],
)
def test_a_disk_of_the_own_machine_is_taken(path: str, kind: str) -> None:
    found = file_system(Path(path), MOUNTS)
    assert found is not None
    assert found[1] == kind
    check_local(Path(path), MOUNTS)


def test_without_a_table_of_mounts_every_disk_is_taken(tmp_path: Path) -> None:
    assert network_file_system(tmp_path, "") is None
    assert network_file_system(tmp_path, "nonsense\n\n") is None
    assert network_file_system(tmp_path.resolve(), current_mounts()) is None


def test_prepare_looks_at_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.storage.current_mounts", lambda: f"server:/ {tmp_path} nfs rw 0 0\n")
    places = {"study": f"sqlite:///{tmp_path}/study.db", "artifacts": str(tmp_path / "artifacts")}
    with pytest.raises(StorageError, match=rf"lies on {tmp_path}, a network file system \(nfs\)"):
        Storage.of(config_of(tmp_path, storage=places), None).prepare()


# ---- In an object store --------------------------------------------------------------------------------------------


def refusals(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the doctor and the front say of a study whose artefacts are there, each in one line."""
    open_study(config_of(tmp_path), tmp_path / "study.db")
    where = ["tiny", "--study-url", f"sqlite:///{tmp_path}/study.db", "--storage", str(tmp_path), "--artifacts", place]
    told = []
    for command, more in ((doctor.main, "--no-mlflow"), (front.main, "--from-verdicts")):
        assert command([*where, more]) == 2
        told.append(capsys.readouterr().err)
        assert told[-1].count("\n") == 1
    return told


def test_a_store_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listing would be that of an empty one, and the local copy then taken for all that there is."""
    for line in refusals(tmp_path, f"file://{tmp_path}/nowhere", capsys):
        assert f"storage file://{tmp_path}/nowhere: there is no folder {tmp_path}/nowhere" in line
    assert not (tmp_path / "nowhere").exists()

    def opened(uri: str) -> tuple[FileSystem, str]:
        return _MockFileSystem(), "missing/runs"

    monkeypatch.setattr(artifact_place, "_opened", opened)
    for line in refusals(tmp_path, "s3://missing/runs", capsys):
        assert "storage s3://missing/runs: there is no bucket or container missing" in line


def test_a_damaged_manifest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "store/tiny/manifests/tiny-0000/000001-00000000000000000001-000000.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    for line in refusals(tmp_path, f"file://{tmp_path}/store", capsys):
        assert f"{manifest} is no manifest" in line


@pytest.mark.parametrize(
    "setting", ["storage.artifacts=s3://bucket/runs", "storage.study=sqlite:///study.db", "storage={study: null}"]
)
def test_a_place_is_named_once(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--storage would win over both, without a word; over the space file it does so on purpose."""
    space = write_space(tmp_path / "space.yaml", tree(storage={"artifacts": "s3://bucket/runs"}))
    folder = str(tmp_path / "runs")
    for way in ("--dry-run", "--detach"):
        assert run.main([str(space), way, "--storage", folder, "--set", setting]) == 2
        told = capsys.readouterr().err
        assert told == f"error: --storage sets what --set {setting.partition('=')[0]} does; leave one of them out\n"
    config = config_of(tmp_path, storage={"artifacts": "s3://bucket/runs"})
    assert Storage.asked_for(config, folder, ["name=storage.study"]).artifacts_uri is None
