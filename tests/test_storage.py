"""Where a search keeps things: whose folder it is, and how many drivers it takes."""

from pathlib import Path

import pytest
from studies import config_of

from search.locks import LockedError
from search.storage import Storage, StorageError


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    """Trials are trusted by their keys, so the results of a study whose database is gone must not become another's."""
    storage = Storage.of(config_of(tmp_path), str(tmp_path / "runs"))
    storage.claim("tiny", "one")
    storage.claim("tiny", "one")
    with pytest.raises(StorageError, match="holds the trials of another study"):
        storage.claim("tiny", "two")
    storage.claim("other", "two")


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
    with storages[0].only_driver("tiny"):
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
