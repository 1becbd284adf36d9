"""docs/clusters/slurm.sh, run as it is by bash, between stand-ins for Slurm, Ray and the search; no cluster."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.live_search import wait_for

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "clusters" / "slurm.sh"
PORT = 20000 + 123456 % 10000
LIMIT_S = 20
pytestmark = pytest.mark.timeout(2 * LIMIT_S)
PYTHON = f"{sys.executable} -I -S"  # quick to start

# Each writes down how it was called. What srun starts is started here, with the variables that Slurm sets.
STAND_INS = {
    "srun": """
        for word; do [[ $word == --* ]] || break; printf '%s ' "$word"; shift; done >>"$CALLS/srun"
        echo >>"$CALLS/srun"
        [[ -z ${SRUN_FAILS:-} ]] || { "$@"; exit 1; }
        export SLURM_CPUS_ON_NODE=$SRUN_CPUS_PER_TASK SLURM_GPUS_ON_NODE=4
        exec "$@" """,
    "scontrol": """
        case $* in
            *hostnames*) printf 'gpu%s\\n' 1 2 3 ;;
            *) echo "NodeName=$4 Arch=x86_64 NodeAddr=${NODE_ADDRESS:-10.1.0.11} NodeHostName=$4" ;;
        esac""",
    "hostname": """echo "${ADDRESSES-10.1.0.11 fd00::11} " """,
    # Of this machine, but for a disk that is full when the study comes to the node.
    "cp": """
        [[ -z ${DISK_IS_FULL:-} || $2 != "$SHARED/study" ]] || { mkdir "$3"; exit 1; }
        exec /bin/cp "$@" """,
    # Like Ray's own, a health check finds a head only once that has started; one that fails never has.
    "ray": """
        [[ $1 != health-check || -n ${RAY_FAILS:-} ]] ||
            until grep -qs "^start --head" "$CALLS/ray"; do sleep 0.01; done
        [[ $1 != start ]] || trap 'echo stopped >>"$CALLS/stopped"; exit 0' TERM
        echo "$* mode=$RAY_AUTH_MODE key=$(stat -c %a "$RAY_AUTH_TOKEN_PATH"):$(wc -c <"$RAY_AUTH_TOKEN_PATH")" \\
            >>"$CALLS/ray"
        [[ $1 == start && -z ${RAY_FAILS:-} ]] || exit ${RAY_FAILS:-0}
        while :; do sleep 0.05; done""",
}
# search.run: waits for the workers, leaves a study behind, and ends by itself or at Ctrl-C's signal.
SEARCH = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
calls = pathlib.Path(os.environ["CALLS"])
(calls / "search").write_text("\\n".join(sys.argv[1:]))
while "start --address" not in (calls / "ray").read_text():
    time.sleep(0.01)
study = pathlib.Path("runs/study.db")
study.parent.mkdir(exist_ok=True)
study.write_text((study.read_text() if study.exists() else "") + "trial ")
(calls / "searching").touch()
while os.environ.get("SEARCH_GOES_ON"):
    time.sleep(0.02)
"""


class Job:
    """One job's folders, and bash running the script in it."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.shared, self.calls = folder / "repository", folder / "shared", folder / "calls"
        self.programs, self.disk = self.repository / ".venv" / "bin", folder / "disk"  # the node's own
        for path in (self.programs, self.shared, self.calls, self.disk, self.repository / "spaces"):
            path.mkdir(parents=True)
        (self.repository / "spaces" / "digits.yaml").touch()
        (folder / "search.py").write_text(SEARCH)
        python = f'[[ $1 == -c ]] && exec {PYTHON} "$@"\nshift 2; exec {PYTHON} {folder}/search.py "$@"'
        for name, text in {**STAND_INS, "python": python}.items():
            (self.programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.programs / name).chmod(0o755)

    @contextmanager
    def running(self, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.calls / "stderr").open("w") as said:
            process = subprocess.Popen(
                ["bash", str(SCRIPT), *arguments],
                cwd=self.repository,
                env=self._environment(variables),
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            while steps := steps_of(self):  # each has a process group of its own, and may start more meanwhile
                for step in steps:
                    with suppress(ProcessLookupError):
                        os.kill(step, signal.SIGKILL)

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """The exit code, and what was said on stderr."""
        with self.running(*arguments, **variables) as process:
            status = process.wait(LIMIT_S)
        return status, (self.calls / "stderr").read_text()

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[1-3]", "SLURM_CPUS_PER_TASK": "32"}
        own = {"SHARED": str(self.shared), "CALLS": str(self.calls), "SLURM_SUBMIT_DIR": str(self.repository)}
        own |= {"CCDIST_SCRATCH_DIR": str(self.disk)}
        # The stand-ins before this machine's own programs, as the repository's are.
        return {"PATH": os.environ["PATH"], "HOME": str(self.shared), **slurm, **own, **variables}

    def called(self, name: str) -> list[str]:
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, name: str) -> None:
        wait_for((self.calls / name).exists, f"{name} is there", LIMIT_S, (self.calls / "stderr").read_text)

    @property
    def study(self) -> str:
        return (self.shared / "study" / "study.db").read_text()

    @property
    def left_over(self) -> list[str]:
        """What is in the shared folder beside results, and on the node's disk."""
        beside = {path.name for path in self.shared.iterdir()} - {"artifacts", "study"}
        return sorted(beside | {path.name for path in self.disk.iterdir()})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_it_is_shell() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_head_workers_and_driver_of_a_job(job: Job) -> None:
    assert job.run("spaces/digits.yaml", "--set", "resources.gpu=0.25") == (0, "")
    where = [line.split() for line in job.called("srun")]
    assert where == [
        ["--ntasks-per-node=1"],  # which addresses the nodes have
        ["--nodes=1", "--ntasks=1", "--nodelist=gpu1"],
        ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--exclude=gpu1"],
    ]
    started = [line for line in job.called("ray") if line.startswith("start")]
    offer = "--num-cpus=32 --num-gpus=4 --disable-usage-stats --block mode=token key=600:64"
    assert started == [
        f"start --head --node-ip-address=10.1.0.11 --port={PORT} --include-dashboard=false {offer}",
        f"start --address=10.1.0.11:{PORT} {offer}",
    ]
    space = str(job.repository / "spaces" / "digits.yaml")
    settings = ["--set", f"storage.artifacts={job.shared}/artifacts", "--set", "resources.gpu=0.25"]
    assert job.called("search") == [space, "--address", f"10.1.0.11:{PORT}", *settings]


def test_nothing_is_left_when_a_job_ends(job: Job) -> None:
    assert job.run("digits")[0] == 0
    assert job.called("stopped") == ["stopped"] * 2
    assert (job.study, job.left_over) == ("trial ", [])
    assert job.called("search")[0] == "digits"  # no file: the name of a shipped space


def test_the_next_job_goes_on_with_the_study(job: Job) -> None:
    job.run("digits")
    assert job.run("digits", SLURM_JOB_ID="123457") == (0, "")
    assert (job.study, job.left_over) == ("trial trial ", [])


def test_folders_may_be_named_from_the_repository(job: Job) -> None:
    """The driver works elsewhere."""
    for number in ("123456", "123457"):
        assert job.run("digits", SLURM_JOB_ID=number, SHARED="../shared", CCDIST_SCRATCH_DIR="../disk") == (0, "")
    assert (job.study, job.left_over) == ("trial trial ", [])
    assert f"storage.artifacts={job.shared}/artifacts" in job.called("search")


def test_a_study_stays_on_the_disk_that_its_database_names(job: Job, tmp_path: Path) -> None:
    job.run("digits")
    status, said = job.run("digits", SLURM_JOB_ID="123457", CCDIST_SCRATCH_DIR=str(tmp_path))
    assert (status, said.count("\n")) == (2, 1)
    assert f"set CCDIST_SCRATCH_DIR to {job.disk}, as it was in its first job" in said
    assert (job.study, job.left_over) == ("trial ", [])
    assert job.run("digits", SLURM_JOB_ID="123458") == (0, "")


def test_at_the_time_limit_the_search_stops_and_its_study_is_kept(job: Job) -> None:
    with job.running("digits", SEARCH_GOES_ON="yes") as process:
        job.wait_for("searching")
        assert not (job.shared / "study").exists()
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
        wait_for(lambda: steps_of(job) == [], "nothing of the job runs", LIMIT_S)
    assert process.returncode == 130
    assert job.called("stopped") == ["stopped"] * 2
    assert (job.study, job.left_over) == ("trial ", [])


def test_after_the_loss_of_the_first_node_no_old_study_goes_on(job: Job) -> None:
    job.run("digits")
    (job.calls / "searching").unlink()
    with job.running("digits", SEARCH_GOES_ON="yes", SLURM_JOB_ID="123457") as process:
        job.wait_for("searching")
    assert process.returncode == -signal.SIGKILL  # with all that it has started
    assert not (job.shared / "study").exists()
    assert (job.shared / "study-before-123457" / "study.db").read_text() == "trial "
    # On the node itself what it left is not written over.
    status, said = job.run("digits", SLURM_JOB_ID="123458")
    assert status == 2
    (scratch,) = job.disk.iterdir()
    assert f"mv -T {scratch}/runs {job.shared}/study, or delete {scratch}" in said
    assert (scratch / "runs" / "study.db").read_text() == "trial trial "


def test_a_study_for_which_the_nodes_disk_is_too_small_stays_where_it_is(job: Job) -> None:
    (job.shared / "study").mkdir()
    (job.shared / "study" / "study.db").write_text("trial ")
    for _ in range(2):
        status, said = job.run("digits", DISK_IS_FULL="yes")
        assert (status, job.called("search")) == (2, [])
        assert f"error: {job.shared}/study could not be copied to {job.disk}/ccdist-" in said
        assert [path.name for path in (job.shared / "study").iterdir()] == ["study.db"]
        assert (job.study, job.left_over) == ("trial ", [])


def steps_of(job: Job) -> list[int]:
    """The processes of a job: all that know its folder of calls."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"CALLS={job.calls}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_nodes_with_a_public_address_are_refused(job: Job) -> None:
    status, said = job.run("digits", ADDRESSES="10.1.0.11 203.0.113.7")
    assert (status, said.count("\n")) == (2, 1)
    assert "203.0.113.7; if a firewall closes them: FIREWALL=closed" in said
    assert (job.called("ray"), job.left_over) == ([], [])
    assert job.run("digits", ADDRESSES="10.1.0.11 203.0.113.7", FIREWALL="closed") == (0, "")


@pytest.mark.parametrize("why", ["ADDRESSES", "SRUN_FAILS"])
def test_nodes_that_do_not_say_their_addresses_are_refused(job: Job, why: str) -> None:
    status, said = job.run("digits", **{why: "" if why == "ADDRESSES" else "yes"})
    assert (status, said.count("\n")) == (2, 1)
    assert "the nodes do not say which addresses they have" in said
    assert (job.called("ray"), job.left_over) == ([], [])


@pytest.mark.parametrize("address", ["192.168.3.4", "172.31.0.9", "100.64.0.1", "fd12:3456::7"])
def test_private_addresses(address: str) -> None:
    (pattern,) = re.findall(r"^private='(.*)'$", SCRIPT.read_text(), re.MULTILINE)
    assert re.match(pattern, address)


@pytest.mark.parametrize("address", ["172.32.0.9", "100.128.0.1", "11.0.0.1", "2001:db8::7", "192.169.0.1"])
def test_public_addresses(address: str) -> None:
    (pattern,) = re.findall(r"^private='(.*)'$", SCRIPT.read_text(), re.MULTILINE)
    assert not re.match(pattern, address)


def test_a_head_that_does_not_come_up_ends_the_job(job: Job) -> None:
    status, said = job.run("digits", RAY_FAILS="1")
    assert (status, job.called("search")) == (2, [])
    assert f"no Ray head answers at 10.1.0.11:{PORT} on gpu1" in said
    assert job.left_over == []


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {}, "no space file was given"),
        (["digits"], {"SHARED": "/nowhere"}, "SHARED is '/nowhere', no folder"),
        (["digits"], {"SLURM_SUBMIT_DIR": "/nowhere"}, "/nowhere has no .venv; run make setup there"),
        (["digits"], {"NODE_ADDRESS": "127.0.0.1"}, "node gpu1 is known as '127.0.0.1'"),
        (["digits"], {"CCDIST_SCRATCH_DIR": "/nowhere"}, "CCDIST_SCRATCH_DIR is '/nowhere', no folder on"),
    ],
)
def test_mistakes_are_told_in_one_line(
    job: Job, arguments: list[str], variables: dict[str, str], expected: str
) -> None:
    status, said = job.run(*arguments, **variables)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: {expected}")
    assert job.called("ray") == []


def test_a_database_server_and_a_tracking_server_are_passed_on(job: Job) -> None:
    study = "postgresql://me@db/ccdist"
    assert job.run("digits", STUDY=study, TRACKING="http://10.1.0.2:5000")[0] == 0
    assert [word for word in job.called("search") if "." in word and "=" in word] == [
        f"storage.artifacts={job.shared}/artifacts",
        f"storage.study={study}",
        "tracking.uri=http://10.1.0.2:5000",
    ]
