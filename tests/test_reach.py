"""Nodes that do not see the artefacts' folder, or another one by its name: told before anything starts, and after."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray_heads import HOST, PORT, Head, needs_namespaces, only_child, ray_head
from studies import tree, write_space

from benchmarks.live_search import wait_for
from search.artifacts import artifact_place
from search.artifacts.disk_space import StorageAwayError
from search.artifacts.workplace import Workplace
from search.clusters import reach, sight
from search.clusters.addresses import ClusterError
from search.clusters.reach import Answer, answer, check_nodes, survey, versions

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


class FakeNodes:
    """Nodes that answer at once; those of `views` have another folder in place of the artefacts'."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, views: dict[str, Path | str | dict[str, str]]) -> None:
        self.views = views
        monkeypatch.setattr(reach, "_asked", self.asked)

    def asked(self, question: tuple[str, str], limit_s: float) -> list[tuple[dict[str, Any], Answer | str]]:
        place, word = question
        found: list[tuple[dict[str, Any], Answer | str]] = []
        for name, view in self.views.items():
            node = {"NodeID": name, "NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1"}
            if isinstance(view, str):
                found.append((node, view))
            elif isinstance(view, dict):
                found.append((node, Answer(answer(place, word, name).problem, view)))
            else:
                found.append((node, answer(str(view / Path(place).name), word, name)))
        return found


def test_all_nodes_see_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "artifacts"
    FakeNodes(monkeypatch, {"one": folder, "two": folder})
    check_nodes(folder)
    assert [finding.problem for finding in survey(folder)] == [None, None]
    assert list(folder.iterdir()) == []  # nothing is left


def test_nodes_that_do_not_see_it_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tmp_path / "artifacts", tmp_path / "other"
    other.mkdir()
    views = {"one": folder, "two": tmp_path / "nowhere", "three": other, "four": "no answer within 30 s"}
    FakeNodes(monkeypatch, views)
    with pytest.raises(ClusterError) as caught:
        check_nodes(folder)
    text = str(caught.value)
    assert f"artefacts folder {folder} is not seen by 3 nodes (two (10.0.0.1): it has none; " in text
    assert "three (10.0.0.1): it has another folder by that name; four (10.0.0.1): no answer within 30 s)" in text
    assert "mount one folder there on every node, or set storage.artifacts to an object store" in text
    assert "\n" not in text


def test_an_answer_that_the_driver_does_not_find_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is brought over has the driver's word, and never brings the answer back."""
    folder, copied = tmp_path / "artifacts", tmp_path / "copied"

    class Copied(FakeNodes):
        def asked(self, question: tuple[str, str], limit_s: float) -> list[tuple[dict[str, Any], Answer | str]]:
            (copied / Path(question[0]).name).mkdir(parents=True)
            (copied / Path(question[0]).name / "word").write_text(question[1])
            return super().asked(question, limit_s)

    Copied(monkeypatch, {"one": copied})
    with pytest.raises(ClusterError, match=r"1 node \(one \(10\.0\.0\.1\): it has another folder by that name\)"):
        check_nodes(folder)


def test_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNodes(monkeypatch, {"one": versions(), "two": versions() | {"torch": "1.0"}})
    with pytest.raises(ClusterError) as caught:
        check_nodes(tmp_path)
    assert f"this driver has python {versions()['python']}, torch {versions()['torch']}, other than 1 node (two" in str(
        caught.value
    )
    assert "torch 1.0); install the same" in str(caught.value)


def test_builds_of_one_torch_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "version", lambda name: "2.14.1+cpu")
    assert versions()["torch"] == "2.14.1"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="cannot be written"):
        check_nodes(tmp_path / "file")


def test_what_goes_wrong_behind_it_is_not_the_folders(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^of the nodes$"), reach._left_there(tmp_path):
        raise OSError("of the nodes")
    assert list(tmp_path.iterdir()) == []


def test_each_node_tries_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(artifact_place, "probe", tried.append)
    FakeNodes(monkeypatch, {"one": versions(), "two": versions(), "three": "storage s3://b/f cannot be used (403)"})
    with pytest.raises(ClusterError, match=r"1 node \(three .*403\)\) cannot use storage\.artifacts"):
        check_nodes("s3://b/f")
    assert tried == ["s3://b/f"] * 2


# ---- A node that came later ----------------------------------------------------------------------------------------


def test_a_worker_makes_no_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight, "MOUNT_S", 0.0)
    workplace = Workplace(str(tmp_path), "tiny", identifier="0123")
    with pytest.raises(StorageAwayError, match=r"node \S+ does not see the study's folder .*; mount it there"):
        workplace.trial("tiny-0000", 0, None).__enter__()  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / sight.STUDY_MARK).write_text("another's")
    with pytest.raises(StorageAwayError):
        workplace.trial("tiny-0000", 0, None).__enter__()  # type: ignore[arg-type]
    (tmp_path / "tiny" / sight.STUDY_MARK).write_text("0123")
    with workplace.trial("tiny-0000", 0, None) as (places, _):  # type: ignore[arg-type]
        assert places.folder == tmp_path / "tiny" / "trials" / "tiny-0000"


def test_a_mount_that_is_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []

    def mounted(seconds: float) -> None:
        slept.append(seconds)
        (tmp_path / sight.STUDY_MARK).write_text("0123")

    monkeypatch.setattr(sight.time, "sleep", mounted)
    sight.check_sight(tmp_path, "0123")
    assert slept == [sight._LOOK_S]


# ---- Real nodes ----------------------------------------------------------------------------------------------------


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_with_a_folder_of_its_own(tmp_path: Path) -> None:
    """The second node mounts an empty disk where the artefacts are; a third one sees them."""
    space, storage = write_space(tmp_path / "tiny.yaml", tree()), tmp_path / "storage"
    (storage / "artifacts").mkdir(parents=True)
    search = ("search.run", str(space), "--storage", str(storage), "--trials", "3", "--address", "auto")
    join = f"exec ray start --address={HOST}:{PORT} --num-cpus=1 --object-store-memory=100000000 --block"
    with ray_head(tmp_path / "head", cpus=0) as head:
        blind = head.command("unshare", "-m", "sh", "-c", f"mount -t tmpfs none {storage}/artifacts && {join}")
        _wait_for_nodes(head, 2)
        refused = head.python(*search)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1, refused.stderr
        assert f"artefacts folder {storage}/artifacts is not seen by 1 node (" in refused.stderr
        assert not (storage / "study.db").exists()
        assert list((storage / "artifacts").glob("*/study.id")) == []
        _end(blind)
        _wait_for_nodes(head, 1)
        seeing = head.command("sh", "-c", join)
        _wait_for_nodes(head, 2)
        done = head.python(*search)
        assert done.returncode == 0, done.stdout + done.stderr
        _end(seeing)
    assert list((storage / "artifacts").glob(".reach-*")) == []


def _end(node: subprocess.Popen[str]) -> None:
    """A node that `ray start --block` has started, with its processes."""
    os.kill(only_child(node.pid), signal.SIGTERM)
    node.communicate()


def _wait_for_nodes(head: Head, number: int) -> None:
    count = "import ray; ray.init('auto', log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    wait_for(lambda: head.run("python", "-c", count).stdout.strip() == str(number), f"there are {number} nodes", 90)
