"""No secret is written or told, and nobody listens but on this machine."""

import os
import re
import runpy
import socket
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from studies import config_of, tree, write_space

from benchmarks.live_search import LiveSearch, processes_of
from ccdist import checkpoint
from ccdist.networks import build_network
from search import run as search_run
from search.clusters.cluster import connected
from search.clusters.local_ray import keys_stay_here, private_token
from search.config import ResourcesConfig
from search.storage import Storage
from search.tracked.bookkeeping import study_info
from search.tracked.study_files import describe_environment, write_settings
from tracking import ui

# ---- secrets -------------------------------------------------------------------------------------------------------

SECRETS = {
    "RAY_AUTH_TOKEN": "ray-t0ken-of-the-test",
    "AWS_ACCESS_KEY_ID": "AKIAOFTHETEST",
    "AWS_SECRET_ACCESS_KEY": "aws/s3cret+of=the-test",
    "AWS_SESSION_TOKEN": "aws-sess10n-of-the-test",
    "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/g00gle-of-the-test.json",
    "PGPASSWORD": "pg-passw0rd-of-the-test",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-passw0rd-of-the-test",
}


def marks_in(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret.encode() in content]


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    config = config_of(tmp_path)
    storage = Storage.of(config, str(tmp_path / "storage"))
    files = write_settings(config, tmp_path / "written")
    told = f"{storage} {study_info(config, storage)} {describe_environment()}".encode()
    assert marks_in(told + b"".join(path.read_bytes() for path in files.values())) == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_login_in_an_object_storages_address_is_never_told(
    scheme: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address = f"{scheme}://AKIAOFTHETEST:s3cret-of-the-test@bucket/artifacts"
    space = write_space(tmp_path / "space.yaml", tree(storage={"artifacts": address}))
    code = search_run.main([str(space), "--dry-run"])
    told = "".join(capfd.readouterr())
    assert "s3cret" not in told
    assert code == 2
    assert told.count("\n") == 1


def test_tune_puts_no_key_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would: what Tune passes on to workers is an argument of theirs."""
    from ray.tune.execution import class_cache

    assert class_cache.__spec__ is not None
    unchanged = runpy.run_path(str(class_cache.__spec__.origin))  # an earlier test's search may have taken them out
    passed_on = set(unchanged["ENV_VARS_TO_PROPAGATE"])
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", passed_on)
    assert passed_on & SECRETS.keys()
    keys_stay_here()
    assert not passed_on & SECRETS.keys()
    assert not any(re.search("KEY|TOKEN|SECRET|PASS", name) for name in passed_on)


def test_temporary_files_are_for_their_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever mask the user has: weights on their way, and Ray's token."""
    modes: list[int] = []
    move = checkpoint._move

    def looking(staging: Path, directory: Path) -> None:
        modes.append(stat.S_IMODE(staging.stat().st_mode))
        move(staging, directory)

    monkeypatch.setattr(checkpoint, "_move", looking)
    before = os.umask(0)
    try:
        checkpoint.save(tmp_path / "student", build_network("mlp", input_shape=(1, 4, 4), num_classes=3, width=4))
        private_token(tmp_path / ".ray" / "auth_token")
        (tmp_path / "wide").write_text("t0ken")
        private_token(tmp_path / "wide")
    finally:
        os.umask(before)
    made = tmp_path / ".ray" / "auth_token"
    assert modes == [0o700]
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}", made.read_text())
    assert [path.name for path in made.parent.iterdir()] == ["auth_token"]
    assert stat.S_IMODE((tmp_path / "wide").stat().st_mode) == 0o600
    assert (tmp_path / "wide").read_text() == "t0ken"


# ---- who listens ---------------------------------------------------------------------------------------------------


def test_a_ray_of_ones_own_has_no_address_but_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray decides by a variable that its processes inherit; a connection to a cluster afterwards is not concerned."""
    from ray._private import ray_constants, services

    seen: list[tuple[str | None, str]] = []

    def init(**options: Any) -> None:
        seen.append((os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"), services.get_node_ip_address()))
        assert options["include_dashboard"] is False

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("search.clusters.addresses.read_ray_address", lambda: None)
    monkeypatch.setattr("search.clusters.cluster.ray.init", init)
    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr("search.clusters.cluster.ray.nodes", lambda: [node])
    monkeypatch.setattr("search.clusters.cluster.ray.shutdown", lambda: None)
    with connected(ResourcesConfig(), 1000):
        pass
    assert seen == [("0", "127.0.0.1")]
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    assert ray_constants.ENABLE_RAY_CLUSTER
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_the_pages_are_for_this_machine_unless_asked_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def started(program: str, command: list[str], *more: Any) -> None:
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(ui.os, "execv", started, raising=False)
    monkeypatch.setattr(ui.os, "execve", started, raising=False)
    monkeypatch.setattr(ui, "stored_pages", lambda storage: [])
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").touch()
    with pytest.raises(SystemExit):
        ui.main(["--storage", str(tmp_path), "--port", "5999"])
    (command,) = commands
    assert command[command.index("--host") + 1] == "127.0.0.1"


# As the kernel spells 127.0.0.1, ::1, and the first as an address of the second's kind.
LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


def listening(pid: int) -> set[str]:
    """The addresses on which a process listens, as the kernel spells them."""
    sockets = set()
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    except OSError:  # it has ended meanwhile
        return set()
    rows = [row.split() for table in tables for row in table]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


def test_who_listens_is_seen() -> None:
    with socket.socket() as own, socket.socket() as wide:
        own.bind(("127.0.0.1", 0))
        own.listen()
        assert listening(os.getpid()) <= LOOPBACK
        wide.bind(("0.0.0.0", 0))
        wide.listen()
        assert listening(os.getpid()) - LOOPBACK == {"00000000"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_search_leaves_no_secret_and_listens_on_this_machine_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    small = ["student.epochs=3", "teacher.epochs=2", "data.train_images=300", "data.validation_images=60"]
    secrets = {name: secret for name, secret in SECRETS.items() if name != "RAY_AUTH_TOKEN"}
    log = tmp_path / "log"
    foreign: set[str] = set()
    num_seen = 0
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray, log.open("w") as output:
        search = LiveSearch("digits", tmp_path / "storage", Path(ray), small, secrets | {"HOME": str(home)})
        try:
            driver = search.start(2, output)
            while driver.poll() is None:
                for process in processes_of(driver.pid):
                    places = listening(process.pid)
                    num_seen += len(places)
                    foreign |= places - LOOPBACK
                    assert marks_in(process.title.encode()) == [], process.title
                time.sleep(0.2)
            assert driver.returncode == 0, log.read_text()
        finally:
            search.clean_up()
    assert num_seen > 10
    assert foreign == set()
    token = home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    files = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [
        path for path in (*files, log) if marks_in(path.read_bytes()) or token.read_bytes() in path.read_bytes()
    ] == []
