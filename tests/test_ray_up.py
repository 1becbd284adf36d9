"""docs/clusters/local.yaml at work: `ray up` over three pretend machines, a search, a machine lost, and nothing left.

The machines are namespaces (`netlab`); ssh, rsync, Ray, MLflow, tokens and every command of the file are real. Two
things are stood in for: the package registry by uv's cache of this machine, which `make setup` has filled, and the
shared file system by one folder that all machines see at the same place.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from netlab import HOME, OUTSIDE, SSH_KEY, Lab, Machine, Plan, Process, lab, what_is_missing

from benchmarks.live_search import EPOCHS, SMALL_TRIALS, wait_for
from ccdist import checkpoint
from search.artifacts.places import TrialPlaces, load_result
from search.studies.records import StudyRecord
from search.studies.study_record import load_record

ROOT = Path(__file__).parent.parent
CLUSTER_FILE = ROOT / "docs/clusters/local.yaml"
BIN, UV = Path(sys.prefix) / "bin", Path(sys.prefix).parent / ".uv"  # as `make setup` leaves them

TRIALS, CPUS = 8, 2
SHARED, PACKAGES = "/srv", "/mnt"  # where the machines see the shared folder and the registry's stand-in
SETTINGS = [
    f"storage.artifacts={SHARED}/ccdist",
    *SMALL_TRIALS,  # the pretend machines share the real cores
    f"resources.cpu={CPUS}",
    "resources.concurrency=3",  # one for each machine
]
PATIENCE_S = 400.0
MLFLOW_PORT, DASHBOARD_PORT, RAY_PORT = 5000, 8265, 6379

# What MLflow holds, asked by the user's machine.
ASK_MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
experiments = [each.experiment_id for each in client.search_experiments() if each.name != "Default"]
runs = client.search_runs(experiments, max_results=1000)
models = client.search_logged_models(experiments, max_results=1000)
def steps(run):
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, "student/loss"))
print(json.dumps({
    "runs": [{"name": run.info.run_name, "kind": run.data.tags["cert.kind"], "status": run.info.status,
              "host": run.data.tags.get("cert.host"), "steps": steps(run)} for run in runs],
    "models": [{"trial": model.tags["cert.trial"], "status": model.status.name} for model in models],
}))
"""


def test_a_machine_with_a_public_address_is_refused_unless_it_has_a_firewall(tmp_path: Path) -> None:
    command = yaml.safe_load(CLUSTER_FILE.read_text())["setup_commands"][0]
    hostname = tmp_path / "hostname"

    def checked(addresses: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        hostname.write_text(f"#!/bin/sh\necho {addresses}\n")
        hostname.chmod(0o755)
        path = f"{tmp_path}:{BIN}:{os.defpath}"
        return subprocess.run(
            ["bash", "-c", command], env={"PATH": path} | environment, capture_output=True, text=True, check=False
        )

    private = "10.0.0.4 172.16.3.1 192.168.1.7 100.64.0.9 fd00::1 fe80::1"
    assert (checked(private).returncode, checked(private).stderr) == (0, "")
    for public in ("11.0.0.4", "2600::1"):
        refused = checked(f"{private} {public}")
        assert refused.returncode == 1
        assert refused.stderr == f"error: this machine has the public address {public}; see setup_commands\n"
        assert checked(f"{private} {public}", CCDIST_FIREWALLED="1").returncode == 0
    silent = checked("")
    assert silent.returncode == 1
    assert silent.stderr == "error: this machine does not say its addresses (hostname -I); see setup_commands\n"


# ---- The lab ---------------------------------------------------------------------------------------------------------


def needs_a_lab() -> None:
    if missing := what_is_missing():
        pytest.skip(f"no pretend machines here: {missing}")


@pytest.mark.timeout(60)
def test_nothing_of_a_lab_outlives_its_process(tmp_path: Path) -> None:
    needs_a_lab()
    program = (
        "import signal, time; from pathlib import Path; from netlab import Plan, lab\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background ignores it
        f"with lab(Path({str(tmp_path)!r}), ['one'], Plan()) as made:\n"
        "    made.user.start('sleep 1000'); made.machines[0].start('sleep 1000')\n"
        "    print(*[machine.first for machine in (*made.machines, made.user)], flush=True); time.sleep(1000)\n"
    )
    for end in (signal.SIGINT, signal.SIGKILL):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        owner = subprocess.Popen(
            [sys.executable, "-c", program], cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert owner.stdout is not None
            places = [os.readlink(f"/proc/{first}/ns/net") for first in owner.stdout.readline().split()]
            assert len(set(places)) == 2
            # unshare's child and what was started, on each; each of the latter has a shell
            wait_for(lambda there=places: in_networks(there) >= 6, "both run what they were told to", 20)
            owner.send_signal(end)
            owner.wait(timeout=20)
        finally:
            owner.kill()
            owner.communicate()
        wait_for(lambda there=places: in_networks(there) == 0, "nothing of it lives", 3)


def in_networks(places: list[str]) -> int:
    """How many living processes are in one of these networks."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            count += os.readlink(folder / "ns/net") in places
        except OSError:
            continue
    return count


def uv_wheel(folder: Path) -> None:
    """Pack the uv that `make setup` installed, for the machines' pip to install."""
    (info,) = UV.glob("uv-*.dist-info")
    stem = info.name.removesuffix(".dist-info")
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path in (path for place in (UV / "uv", info) for path in place.rglob("*") if path.is_file()):
            wheel.write(path, path.relative_to(UV))
        wheel.write(UV / "bin/uv", f"{stem}.data/scripts/uv")


def package_cache(folder: Path) -> Path:
    """The cache that `make setup` filled; skips the test where it lacks packages of the lock."""
    uv = UV / "bin/uv"
    if not uv.exists():
        pytest.skip("no packages for the pretend machines: run make setup")
    cache = Path(subprocess.check_output([uv, "cache", "dir"], text=True).strip())
    trial = folder / "empty-environment"
    subprocess.run([uv, "venv", "--quiet", "--offline", "--python", sys.executable, trial], check=True)
    lock = ["--require-hashes", ROOT / "requirements.lock"]
    sync = [uv, "pip", "sync", "--dry-run", "--offline", "--python", trial / "bin/python", *lock]
    found = subprocess.run(sync, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"uv's cache lacks packages of requirements.lock: {found.stderr.strip().splitlines()[-1]}")
    return cache


@contextmanager
def pretend_machines(folder: Path) -> Iterator[Lab]:
    """Three machines with Python, pip and uv's cache, a shared folder, and the user's with this repository."""
    cache = package_cache(folder)
    for name in ("shared", "packages", "machines"):
        (folder / name).mkdir()
    uv_wheel(folder / "packages")
    shell = [
        f"export PATH={sys.base_prefix}/bin:$PATH",
        f"export PIP_NO_INDEX=1 PIP_FIND_LINKS={PACKAGES} PIP_ROOT_USER_ACTION=ignore",
        f"export UV_OFFLINE=1 UV_CACHE_DIR={cache} UV_LINK_MODE=symlink",  # links: three environments take no room
    ]
    plan = Plan(
        keep=[ROOT, Path(sys.prefix), Path(sys.base_prefix), cache],
        binds={SHARED: folder / "shared", PACKAGES: folder / "packages"},
        shell="\n".join(shell) + "\n",
    )
    with lab(folder / "machines", ["head", "first", "second"], plan) as made:
        yield made


# ---- What a user types -----------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """The cluster of the filled-in file, as its user handles it."""

    lab: Lab
    shared: Path
    said: dict[str, str] = field(default_factory=dict)  # what the last command of each kind printed

    @property
    def head(self) -> Machine:
        return self.lab.machines[0]

    def fill_in(self) -> None:
        """docs/clusters/local.yaml with what is marked FILL IN, and nothing else, filled in."""
        head, *workers = (machine.address for machine in self.lab.machines)
        text = CLUSTER_FILE.read_text()
        for blank, value in {
            "head_ip: FILLIN": f"head_ip: {head}",
            "worker_ips: [FILLIN, FILLIN]": f"worker_ips: [{', '.join(workers)}]",
            "ssh_user: FILLIN": f"ssh_user: {HOME.owner()}",
            "ssh_private_key: FILLIN": f"ssh_private_key: {SSH_KEY}",
        }.items():
            assert text.count(blank) == 1
            text = text.replace(blank, value)
        assert "FILLIN" not in text
        (self.lab.user.home / "local.yaml").write_text(text)

    def ray(self, command: str, *, exit_code: int = 0, timeout_s: float = 300.0) -> str:
        """A `ray` command, typed in the repository; its output."""
        done = self.lab.user.run(self._line(command), timeout_s=timeout_s)
        self.said[command.split()[0]] = done.stdout
        assert done.returncode == exit_code, f"ray {command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def start(self, command: str, log: int) -> "subprocess.Popen[str]":
        """The same in the background."""
        return self.lab.user.start(self._line(command), log=log)

    def _line(self, command: str) -> str:
        return f"export PATH={BIN}:$PATH RAY_USAGE_STATS_ENABLED=0 COLUMNS=200; cd {ROOT} && ray {command}"

    def wait_for_machines(self) -> None:
        def are_there() -> bool:
            return " 3 local.cluster.node" in self.ray("exec ~/local.yaml 'ray status'")

        wait_for(are_there, "all machines are there", 120, lambda: self.said["exec"])

    def lock_holders(self) -> dict[str, int]:
        """Trial -> process that holds its lock, as the kernel tells it: who runs what at this moment."""
        files = {lock.stat().st_ino: lock.parent.name for lock in self.shared.glob("ccdist/digits/trials/*/lock")}
        held = {}
        for fields in (line.split() for line in Path("/proc/locks").read_text().splitlines()):
            if fields[1] == "FLOCK":
                inode = int(fields[5].rpartition(":")[2])
                if inode in files:
                    held[files[inode]] = int(fields[4])
        return held


@dataclass
class Story:
    """What was seen of a cluster from `ray up` to its end."""

    listeners: dict[str, set[tuple[str, int]]]  # of each machine, while the cluster is idle
    token_answers: dict[str, tuple[int, str]]
    reached_from_outside: list[int]  # ports of the head
    exit_code: int = -1
    output: str = ""
    ran_on: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # trial -> machines, in order
    threads_in_environment: set[str] = field(default_factory=set)
    cut_off: str = ""  # the trial that the lost machine ran
    missed: float = 0.0  # seconds until another machine went on with it
    record: StudyRecord | None = None
    tracked: dict[str, Any] = field(default_factory=dict)
    stopping: str = ""  # what stop.sh said
    left: dict[str, list[Process]] = field(default_factory=dict)
    left_listening: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story() -> Iterator[tuple[Story, Cluster]]:
    needs_a_lab()
    folder = Path(tempfile.mkdtemp(prefix="ccdist-lab-"))
    try:
        with pretend_machines(folder) as machines:
            cluster = Cluster(machines, folder / "shared")
            yield tell(cluster), cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(cluster: Cluster) -> Story:
    times = {"start": time.monotonic()}
    cluster.fill_in()
    cluster.ray("get-auth-token --generate")
    cluster.ray("up -y ~/local.yaml")
    cluster.wait_for_machines()
    times["up"] = time.monotonic()
    story = Story(
        listeners={machine.name: machine.listeners() for machine in cluster.lab.machines},
        token_answers=token_answers(cluster),
        reached_from_outside=reached_from_outside(cluster),
    )
    times["asked"] = time.monotonic()
    search(cluster, story)
    times["searched"] = time.monotonic()
    cluster.head.run(f"cp ccdist/runs/study.db* {SHARED}/")
    story.record = load_record(f"sqlite:///{cluster.shared / 'study.db'}", "digits")
    story.tracked = ask_mlflow(cluster)
    times["read"] = time.monotonic()
    story.stopping = cluster.ray("exec ~/local.yaml 'bash ~/ccdist/stop.sh'", exit_code=1)
    cluster.ray("down -y ~/local.yaml")
    alive = [machine for machine in cluster.lab.machines if machine.alive]
    story.left = {machine.name: machine.processes() for machine in alive}
    story.left_listening = {machine.name: machine.listeners() for machine in alive}
    times["down"] = time.monotonic()
    moments = list(times.items())
    story.seconds = {name: at - before for (_, before), (name, at) in pairwise(moments)}
    shown = story.seconds | {"missed": story.missed}
    print({name: round(seconds) for name, seconds in shown.items()})  # shown by -s, and where a test fails
    return story


def token_answers(cluster: Cluster) -> dict[str, tuple[int, str]]:
    """What `ray status` says to clients that hold the token, none, or another one."""
    status = f"{BIN}/ray status --address {cluster.head.address}:{RAY_PORT}"
    clients = {
        "the token": {"RAY_AUTH_MODE": "token"},
        "no token": {"HOME": "/nowhere"},
        "another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    }
    answers = {}
    for name, environment in clients.items():
        done = cluster.lab.user.run(f"timeout 60 {status}", environment=environment)
        answers[name] = (done.returncode, done.stdout)
    return answers


def reached_from_outside(cluster: Cluster) -> list[int]:
    """Which of the head's ports that have no token answer on its address in the world."""
    open_ports = []
    for port in (22, MLFLOW_PORT, DASHBOARD_PORT):
        done = cluster.lab.user.run(f"timeout 5 bash -c '< /dev/tcp/{cluster.head.outside}/{port}'")
        open_ports += [port] if done.returncode == 0 else []
    return open_ports


def search(cluster: Cluster, story: Story) -> None:
    """Run the search, and pull the plug of the last machine in the middle of a trial of its."""
    flags = " ".join(f"--set {setting}" for setting in SETTINGS)
    line = f"cd ~/ccdist && python -m search.run spaces/digits.yaml --trials {TRIALS} {flags}"
    with tempfile.TemporaryFile("w+") as log, cluster.start(f"exec ~/local.yaml '{line}'", log.fileno()) as driver:
        try:
            watch(cluster, story, driver)
        finally:
            driver.kill()
            log.seek(0)
            story.output = log.read()
    story.exit_code = driver.returncode
    assert story.exit_code == 0, story.output


def watch(cluster: Cluster, story: Story, driver: "subprocess.Popen[str]") -> None:
    deadline, victim, lost_at = time.monotonic() + PATIENCE_S, cluster.lab.machines[-1], 0.0
    while driver.poll() is None:
        assert time.monotonic() < deadline, f"no end after {PATIENCE_S:g} s; trials ran on {dict(story.ran_on)}"
        for trial, pid in cluster.lock_holders().items():
            machine = next((machine for machine in cluster.lab.machines if machine.owns(pid)), None)
            if machine is None:  # it ended meanwhile
                continue
            if story.ran_on[trial][-1:] != [machine.name]:
                story.ran_on[trial].append(machine.name)
                if trial == story.cut_off and not story.missed:
                    story.missed = time.monotonic() - lost_at
            story.threads_in_environment.add(environment_of(pid).get("OMP_NUM_THREADS", ""))
            places = TrialPlaces.of(cluster.shared / "ccdist", "digits", trial)
            if machine is victim and not story.cut_off and places.state.exists():
                victim.kill()
                story.cut_off, lost_at = trial, time.monotonic()
        time.sleep(0.1)


def environment_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def ask_mlflow(cluster: Cluster) -> dict[str, Any]:
    program = cluster.lab.user.home / "ask.py"
    program.write_text(ASK_MLFLOW)
    done = cluster.lab.user.run(f"{BIN}/python ask.py http://{cluster.head.address}:{MLFLOW_PORT} 2> ask.log")
    assert done.returncode == 0, (cluster.lab.user.home / "ask.log").read_text()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- What must be so -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestThreeMachines:
    """One cluster, told once, and what must be so of it."""

    def test_the_study_has_exactly_its_trials(self, story: tuple[Story, Cluster]) -> None:
        record = story[0].record
        assert record is not None
        assert len(record.done) == TRIALS
        assert record.unfinished == ()
        assert [trial.key for trial in record.trials] == [f"digits-{i:04d}" for i in range(len(record.trials))]

    def test_the_trial_of_the_lost_machine_went_on_elsewhere(self, story: tuple[Story, Cluster]) -> None:
        told, cluster = story
        record = told.record
        assert record is not None
        assert not cluster.lab.machines[-1].alive
        before, *after = told.ran_on[told.cut_off]
        assert before == "second"
        assert after
        assert set(after) <= {"head", "first"}
        (trial,) = (trial for trial in record.trials if trial.key == told.cut_off)
        assert trial in record.done

    def test_trials_ran_on_several_machines_and_say_on_which(self, story: tuple[Story, Cluster]) -> None:
        told, cluster = story
        assert told.record is not None
        hosts = {}
        for trial in told.record.complete:
            result = load_result(TrialPlaces.of(cluster.shared / "ccdist", "digits", trial.key))
            assert result is not None
            hosts[trial.key] = result.provenance["host"]
            assert hosts[trial.key] == told.ran_on[trial.key][-1]
            assert result.provenance["threads"] == str(CPUS)
        assert len({name for names in told.ran_on.values() for name in names}) >= 2, dict(told.ran_on)
        assert told.threads_in_environment - {""} == {"1"}  # what Ray's shells say, and what trials overrule

    def test_every_trial_left_its_files(self, story: tuple[Story, Cluster]) -> None:
        told, cluster = story
        assert told.record is not None
        for trial in told.record.complete:
            places = TrialPlaces.of(cluster.shared / "ccdist", "digits", trial.key)
            assert pq.read_table(places.verdicts).num_rows == trial.num_images
            assert checkpoint.load_description(places.student)["metadata"]["key"] == trial.key
            checkpoint.load(places.student)
            assert places.journal.exists()
            assert not places.state.exists()
        assert (cluster.shared / "ccdist/digits/report.html").exists()

    def test_every_run_and_every_model_is_in_mlflow(self, story: tuple[Story, Cluster]) -> None:
        told, _ = story
        assert told.record is not None
        runs, models = told.tracked["runs"], told.tracked["models"]
        assert [run["status"] for run in runs if run["kind"] == "study"] == ["FINISHED"]
        trials = {run["name"]: run for run in runs if run["kind"] == "trial"}
        assert len(runs) == 1 + len(trials) == 1 + len(told.record.trials)
        for trial in told.record.trials:
            done = trial in told.record.done
            assert trials[trial.key]["status"] == ("FINISHED" if done else "FAILED")
        complete = {trial.key for trial in told.record.complete}
        for key in complete:
            # None twice. A trial that is cut off between an epoch's checkpoint and its row goes on after that epoch.
            steps = trials[key]["steps"]
            assert len(steps) == len(set(steps))
            missing = set(range(1, EPOCHS + 1)) - set(steps)
            assert len(missing) <= (1 if key == told.cut_off else 0)
            assert trials[key]["host"] == told.ran_on[key][-1]
        assert sorted(model["trial"] for model in models) == sorted(complete)
        assert {model["status"] for model in models} == {"READY"}

    def test_only_who_holds_the_token_is_answered(self, story: tuple[Story, Cluster]) -> None:
        answers = story[0].token_answers
        assert answers["the token"][0] == 0
        assert " 3 local.cluster.node" in answers["the token"][1]
        for client in ("no token", "another token"):
            code, output = answers[client]
            assert code != 0
            assert "local.cluster.node" not in output
            assert "uth" in output  # authentication is why

    def test_what_listens_where(self, story: tuple[Story, Cluster]) -> None:
        """Ray alone listens on every address, which is why the file refuses machines with a public one."""
        told, cluster = story
        assert told.reached_from_outside == []
        for machine in cluster.lab.machines:
            places = told.listeners[machine.name]
            assert {host for host, _ in places} <= {"127.0.0.1", machine.address, "*"}
            assert not any(host.startswith(OUTSIDE) for host, _ in places)
        head = told.listeners["head"]
        assert {host for host, port in head if port == MLFLOW_PORT} == {cluster.head.address}
        assert {host for host, port in head if port == DASHBOARD_PORT} == {"127.0.0.1"}
        assert {host for host, port in head if port == RAY_PORT} == {"*"}

    def test_nothing_runs_and_nothing_listens_afterwards(self, story: tuple[Story, Cluster]) -> None:
        told, cluster = story
        (error,) = (line for line in told.stopping.splitlines() if line.startswith("error: "))
        assert error == f"error: Ray on {cluster.lab.machines[-1].address} could not be stopped"  # the lost machine
        assert set(told.left) == {"head", "first"}
        for name, processes in told.left.items():
            others = [process.title for process in processes if not process.title.startswith("sshd: ")]
            assert others == [], name
        for machine in cluster.lab.machines[:2]:
            assert told.left_listening[machine.name] == {(machine.address, 22)}
