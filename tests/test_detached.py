"""A search that is handed over to a cluster, and its front read from there; the last test does so with a real one."""

import functools
import json
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus
from ray_heads import URL, Head, needs_namespaces, only_child, ray_head
from studies import tree, write_space

from benchmarks.live_search import wait_for
from search import front, run
from search.clusters import detached, jobs
from search.clusters.jobs import command

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


class FakeClient:
    """Takes the place of Ray's client. What is submitted runs at once where `home` says, as a job's shell would."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.submitted: list[dict[str, Any]] = []
        self.log = ""
        self.status = JobStatus.SUCCEEDED
        self.message: str | None = None

    def __call__(self, url: str) -> "FakeClient":
        self.url = url
        return self

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.jobs.values())

    def submit_job(self, **options: Any) -> str:
        folder = Path(options["runtime_env"]["working_dir"])
        self.submitted.append(options | {"files": {path.name: path.read_text() for path in folder.iterdir()}})
        name = options.get("submission_id") or f"raysubmit_{len(self.jobs)}"
        told = {"metadata": options.get("metadata"), "status": self.status, "message": self.message}
        self.jobs[name] = SimpleNamespace(submission_id=name, **told)
        return name

    def get_job_status(self, name: str) -> JobStatus:
        return self.jobs[name].status

    def get_job_info(self, name: str) -> SimpleNamespace:
        return self.jobs[name]

    def get_job_logs(self, name: str) -> str:
        return self.log

    def stop_job(self, name: str) -> None:
        self.jobs[name].status = JobStatus.STOPPED

    def delete_job(self, name: str) -> None:
        del self.jobs[name]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeClient()
    monkeypatch.setattr(jobs, "_client", lambda url, words: fake(url))
    monkeypatch.setattr(jobs, "check_own_token", lambda: None)
    monkeypatch.setattr(detached, "_SETTLE_S", 0.0)
    return fake


@pytest.fixture
def space(tmp_path: Path) -> Path:
    return write_space(tmp_path / "tiny.yaml", tree())


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert run.main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1, told.err
    return told.err


def test_a_search_is_handed_over(space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(space), "--detach", "--address", f"{URL}/", "--trials", "9", "--set", "student.epochs=3"]) == 0
    (job,) = client.submitted
    assert job["submission_id"] == "tiny-1"
    assert job["files"] == {"tiny.yaml": space.read_text()}
    assert int(job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    go_on = job["runtime_env"]["env_vars"][run.GO_ON]
    assert shlex.split(go_on)[3:] == [
        *(str(space), "--trials", "9", "--set", "student.epochs=3", "--address", f"{URL}/", "--detach")
    ]
    told = capsys.readouterr().out
    for command_there in (
        f"ray job logs --follow tiny-1 --address {URL}",
        f"python -m search.front tiny --address {URL}",
        f"ray job stop tiny-1 --address {URL}",
    ):
        assert command_there in told


def test_a_search_that_ends_at_once_says_why(
    space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detached, "_LOOK_S", 0.01)
    words = [str(space), "--detach", "--address", URL]

    def told() -> str:
        """The one line of a search that is refused on the head; how to read its log was printed before."""
        client.jobs.clear()
        assert run.main(words) == 2
        printed = capsys.readouterr()
        assert f"log:   ray job logs --follow tiny-1 --address {URL}" in printed.out
        assert printed.err.count("\n") == 1, printed.err
        return printed.err

    client.log = "some warning\nerror: study tiny exists with another space (student.epochs: stored 5, given 6)\n"
    client.status = JobStatus.FAILED
    reason = f"error: study tiny exists with another space (student.epochs: stored 5, given 6) (job tiny-1 on {URL})\n"
    assert told() == reason
    # Its line stands in the log some time before the job counts as ended.
    client.status, looks = JobStatus.RUNNING, iter([JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.FAILED])

    def ending(name: str) -> JobStatus:
        client.jobs[name].status = next(looks)
        return client.jobs[name].status

    with monkeypatch.context() as patch:
        patch.setattr(client, "get_job_status", ending)
        assert told() == reason
    # What is no error of search.run's own, and a job that never came to say anything.
    client.status, client.log = JobStatus.FAILED, "Traceback:\nModuleNotFoundError: No module named 'ray'\n\n"
    assert f"has ended at once: ModuleNotFoundError: No module named 'ray' (job tiny-1 on {URL})" in told()
    client.log, client.message = "", "runtime_env setup failed:\nno room"
    assert f"has ended at once: no room (job tiny-1 on {URL})" in told()
    client.status, client.message = JobStatus.STOPPED, None
    assert f"has ended at once: STOPPED (job tiny-1 on {URL})" in told()
    # A line of that kind from a driver that goes on is no end, and one that says nothing yet is not waited for long.
    client.status, client.log = JobStatus.RUNNING, "error: a worker said this\nstudy tiny: digits, 0 of 9 trials done"
    client.jobs.clear()
    assert run.main(words) == 0
    client.jobs.clear()
    client.log = ""
    monkeypatch.setattr(detached, "WATCH_S", 0.1)
    assert run.main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "not watched any longer; job tiny-1 goes on\n"),
        (ConnectionError("no\nway"), f"warning: whether job tiny-1 has begun is not known (the Ray cluster at {URL} "),
    ],
)
def test_a_watch_that_ends_early_ends_no_search(
    error: BaseException, told: str, space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    def get_job_status(name: str) -> JobStatus:
        raise error

    client.get_job_status = get_job_status  # type: ignore[method-assign]
    assert run.main([str(space), "--detach", "--address", URL]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(told)
    assert printed.err.count("\n") == 1
    assert f"stop:  ray job stop tiny-1 --address {URL}" in printed.out


def test_ctrl_c_before_a_search_is_handed_over_says_how_to_do_it_again(
    space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit_job(**_: Any) -> str:
        raise KeyboardInterrupt

    client.submit_job = submit_job  # type: ignore[method-assign]
    assert run.main([str(space), "--detach", "--address", URL]) == 130
    assert capsys.readouterr().err == (f"stopped; go on with: python -m search.run {space} --address {URL} --detach\n")


def test_a_study_has_one_job_at_a_time(space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (space, "--detach", "--address", URL)
    assert run.main([str(word) for word in arguments]) == 0
    capsys.readouterr()
    for status in (JobStatus.PENDING, JobStatus.RUNNING):
        client.jobs["tiny-1"].status = status
        assert f"study tiny has a driver already, job tiny-1 on {URL}" in refused(capsys, *arguments)
    other = (*arguments, "--set", "name=other")
    assert run.main([str(word) for word in other]) == 0
    for status in (JobStatus.STOPPED, JobStatus.FAILED, JobStatus.SUCCEEDED):
        for job in client.jobs.values():
            job.status = status
        assert run.main([str(word) for word in arguments]) == 0
    assert [job["submission_id"] for job in client.submitted] == ["tiny-1", "other-1", "tiny-2", "tiny-3", "tiny-4"]


def test_what_cannot_be_handed_over(
    space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.clusters.addresses.read_ray_address", lambda: None)
    assert "student.epoch; did you mean" in refused(
        capsys, space, "--detach", "--address", URL, "--set", "student.epoch=1"
    )
    database = "storage.study=postgresql://me:secret@db/s"
    told = refused(capsys, space, "--detach", "--address", URL, "--set", database)
    assert "PGPASSWORD or ~/.pgpass on the head" in told
    assert "secret" not in told
    for address in ([], ["--address", "local"]):
        assert "no Ray cluster is there to hand a job to" in refused(capsys, space, "--detach", *address)
    assert client.submitted == []
    with pytest.raises(SystemExit) as caught:
        run.main([str(space), "--detach", "--dry-run"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("storage.artifacts=s3://b/p?secret_key=XYZ&access_key=XYZ", "s3://b/p?***"),
        ("storage.artifacts=s3://b/p?XYZ=1", "s3://b/p?***"),
        ("storage.artifacts=gs://XYZ@b/p", "gs://***@b/p"),
        ('storage={artifacts: "s3://XYZ@b/p"}', "s3://***@b/p"),
        ("storage.study=postgresql://u@db/s?passwd=XYZ", "postgresql://***@db/s?***"),
        ("storage.study=https://XYZ@host", "https://***@host"),
        ("tracking.uri=https://XYZ@host", "https://***@host"),
        ("data.path=https://host/images?sig=XYZ", "https://host/images?***"),
    ],
)
def test_no_login_reaches_the_dashboard(
    setting: str, shown: str, space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, space, "--detach", "--address", URL, "--set", setting)
    assert shown in told
    assert "XYZ" not in told
    assert client.submitted == []


@pytest.mark.parametrize(
    "setting",
    [
        "storage.artifacts=s3://b/p?region=eu-west-1&endpoint_override=host:9000",
        "storage.artifacts=abfs://container@account.dfs.core.windows.net/p",
        "storage.study=postgresql://u@db/s?sslmode=require",
        'tracking={uri: "http://host:5000"}',
    ],
)
def test_an_address_without_a_login_is_handed_over(setting: str, space: Path, client: FakeClient) -> None:
    assert run.main([str(space), "--detach", "--address", URL, "--set", setting]) == 0
    assert shlex.quote(setting) in client.submitted[0]["entrypoint"]


@pytest.mark.parametrize("address", ["http://me:XYZ@head:8265", "http://XYZ@head:8265", "http://head:8265?token=XYZ"])
def test_a_login_in_the_clusters_address_is_refused(
    address: str, space: Path, client: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [refused(capsys, space, "--detach", "--address", address)]
    assert front.main(["tiny", "--address", address]) == 2
    told.append(capsys.readouterr().err)
    monkeypatch.setenv("RAY_ADDRESS", address)
    told.append(refused(capsys, space, "--detach"))
    for line in told:
        assert "leave it out" in line
        assert "XYZ" not in line
    args = run._parser().parse_args([str(space), "--address", address])
    assert "XYZ" not in run._command(args)
    assert client.submitted == []


def test_the_front_that_is_named_finds_the_study(
    tmp_path: Path, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    in_file = write_space(tmp_path / "tiny.yaml", tree(storage={"study": "postgresql://me:XYZ@db/s?sslmode=require"}))
    assert run.main([str(in_file), "--detach", "--address", URL]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  front:")]
    args = front._parser().parse_args(shlex.split(line)[4:])
    assert (args.study, args.address, args.study_url) == ("tiny", URL, "postgresql://me@db/s?sslmode=require")
    assert run.main([str(in_file), "--detach", "--address", URL, "--storage", "x", "--set", "name=other"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  front:")]
    assert shlex.split(line)[6:] == [URL, "--storage", "x"]


def test_go_on_is_what_handed_the_search_over(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = run._parser().parse_args([str(space), "--storage", "x", "--address", "auto"])
    assert run._command(args) == f"python -m search.run {space} --storage x --address auto"
    monkeypatch.setenv(run.GO_ON, "python -m search.run tiny --detach")
    assert run._command(args) == "python -m search.run tiny --detach"


# ---- What the shell of a job makes of it ---------------------------------------------------------------------------


def shell(tmp_path: Path, entrypoint: str) -> list[str]:
    """The arguments with which a job's shell calls python, and its folder then."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "job").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\nfor word in "$@" "$PWD"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    environment = {"HOME": str(tmp_path / "home"), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(
        ["/bin/sh", "-c", entrypoint],
        cwd=tmp_path / "job",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_paths_are_the_heads(tmp_path: Path) -> None:
    file = tmp_path / "a b; c.yaml"
    words = [str(file), "--storage", "~/my runs", "--set", 'name="$(touch x)"', "--set", "a='b'", "*"]
    home = tmp_path / "home"
    assert shell(tmp_path, command("search.run", words, file)) == [
        *("-P", "-m", "search.run", f"{tmp_path}/job/a b; c.yaml", "--storage", f"{home}/my runs"),
        *("--set", 'name="$(touch x)"', "--set", "a='b'", "*", str(home)),
    ]
    assert list((tmp_path / "job").iterdir()) == list(home.iterdir()) == []


def test_a_file_is_sent_along_however_it_is_named(tmp_path: Path) -> None:
    words = shell(tmp_path, command("search.front", ["./x.yaml", "--json"], Path("./x.yaml")))
    assert words[3:5] == [f"{tmp_path}/job/x.yaml", "--json"]


def front_args(*words: str) -> Any:
    return front._parser().parse_args(["tiny", "--address", URL, *words])


def test_a_front_is_read_there(client: FakeClient, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The log of a job is one stream, with lines of Ray's own; the front's two come out of it apart."""
    script = "printf {}; echo warned >&2; exit 1"
    client.log = "setting up\n"
    args = front_args("--json", "--storage", "/data/runs")

    def run_there(**options: Any) -> str:
        client.submitted.append(options)
        line = options["entrypoint"].replace('exec python -P -m search.front "$@"', f"exec sh -c {shlex.quote(script)}")
        assert line != options["entrypoint"]
        done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        began, marker, rest = done.stdout.partition("ccdist: output follows\n")
        # Ray's own line comes when its buffer is flushed.
        client.log += f"{began}Running entrypoint for job: {line}\n{marker}{rest}"
        client.jobs["job"] = SimpleNamespace(status=JobStatus.FAILED)
        return "job"

    client.submit_job = run_there  # type: ignore[method-assign]
    assert detached.front_there(args) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("{}", "warned\n")
    assert client.jobs == {}  # it is taken off the cluster's list
    assert "tiny --storage /data/runs --json" in client.submitted[0]["entrypoint"]


def test_a_front_that_does_not_come(
    client: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client.log = "python: not found\n"
    assert front.main(["tiny", "--address", URL]) == 2
    assert f"the front could not be read on {URL} (python: not found)" in capsys.readouterr().err
    client.status = JobStatus.RUNNING
    monkeypatch.setattr(detached, "FRONT_S", 0.0)
    assert front.main(["tiny", "--address", URL]) == 2
    assert "has not shown the front within 0 s; it was stopped" in capsys.readouterr().err
    assert client.jobs == {}
    assert front.main(["tiny", "--address", URL, "--study-url", "postgresql://me:secret@db/s"]) == 2
    assert "secret" not in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ConnectionError("away"), 2)])
def test_a_front_that_is_not_waited_for_leaves_no_job(
    error: BaseException, code: int, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.status, status_of, stopped = JobStatus.RUNNING, client.get_job_status, []
    errors = iter([error])

    def get_job_status(name: str) -> JobStatus:
        for each in errors:
            raise each
        return status_of(name)

    client.get_job_status = get_job_status  # type: ignore[method-assign]
    client.stop_job = lambda name: stopped.append(name) or FakeClient.stop_job(client, name)  # type: ignore
    assert front.main(["tiny", "--address", URL]) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert (stopped, client.jobs) == (["raysubmit_0"], {})


# ---- Dashboards that refuse ----------------------------------------------------------------------------------------


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A server with one answer to everything."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    answer = SimpleNamespace(code=200, body=b'{"ray_version": "2.60.0"}')

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer.code)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        answer.url = f"http://127.0.0.1:{server.server_port}"
        yield answer
        server.shutdown()


@pytest.mark.parametrize(("code", "text"), [(401, "Missing"), (403, "Invalid")])
def test_a_dashboard_that_wants_its_token(
    code: int, text: str, dashboard: SimpleNamespace, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.code, dashboard.body = code, f"{text} authentication token".encode()
    told = refused(capsys, space, "--detach", "--address", dashboard.url)
    assert f"--address {dashboard.url} asks for its token, and RAY_AUTH_MODE is not set to token here" in told


@pytest.mark.parametrize(("code", "body"), [(200, b"<html>"), (200, b"{}"), (404, b""), (500, b"")])
def test_whoever_is_no_dashboard(
    code: int, body: bytes, dashboard: SimpleNamespace, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.code, dashboard.body = code, body
    told = refused(capsys, space, "--detach", "--address", dashboard.url)
    assert f"no Ray dashboard answers at {dashboard.url}; give --address http://HEAD:8265" in told


def test_the_option_wins_over_rays_own_variables(dashboard: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    found = jobs.Jobs(jobs.Address.of(dashboard.url))
    assert found._client.get_address() == found.url == dashboard.url
    assert {logging.getLogger(name).level for name in ("ray.dashboard.modules.dashboard_sdk",)} == {logging.WARNING}


def test_a_token_that_ray_misses_is_told_in_one_line(
    dashboard: SimpleNamespace, space: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise AuthenticationError("pages\nof help")

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(jobs, "check_own_token", missing)
    assert "this one is missing or another" in refused(capsys, space, "--detach", "--address", dashboard.url)


# ---- A real cluster ------------------------------------------------------------------------------------------------

TRIALS = 500


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_on_a_cluster_from_elsewhere(tmp_path: Path) -> None:
    """Handed over, watched, stopped like Ctrl-C, gone on with, and complete; with the cluster's token on."""
    space = write_space(tmp_path / "tiny.yaml", tree())
    with ray_head(tmp_path / "head", token="a" * 64) as head:
        detach = ("search.run", str(space), "--detach", "--address", URL, "--trials")
        wrong = head.python(*detach, "3", "--set", "name=other", "--set", "data.path=/nowhere")
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
        assert wrong.stderr.startswith("error: data.path /nowhere ")
        assert f"(job other-1 on {URL})" in wrong.stderr
        handed = head.python(*detach, str(TRIALS))
        assert handed.returncode == 0, handed.stderr
        shown = _shown_when(head, lambda states: states.count("COMPLETE") >= 3)
        assert len(shown) < TRIALS
        again = head.python(*detach, str(TRIALS))
        assert (again.returncode, again.stderr.count("\n")) == (2, 1)
        assert "study tiny has a driver already, job tiny-1" in again.stderr

        stopped = head.run("ray", "job", "stop", "tiny-1", "--address", URL)
        assert stopped.returncode == 0, stopped.stderr
        log = head.run("ray", "job", "logs", "tiny-1", "--address", URL).stdout
        assert "Traceback" not in log
        assert "stopped after " in log
        assert f"go on with: python -m search.run {space} --trials {TRIALS} --address {URL} --detach" in log
        assert _parent_status(head) == "KILLED"
        examined = head.python("search.doctor", "tiny", "--storage", str(head.home / "runs"))
        assert examined.returncode == 0, examined.stdout

        before = _num_finished(_states(head))
        handed = head.python(*detach, str(before + 2))
        assert "job tiny-2" in handed.stdout, handed.stderr
        states = _shown_when(head, lambda states: _num_finished(states) == before + 2)
        assert len(states) - (before + 2) <= 2  # those that were cut off
        _wait_for_job(head, "tiny-2", "SUCCEEDED")
        assert _parent_status(head) == "FINISHED"
        table = head.python("search.front", "tiny", "--address", "auto")
        assert f"of {states.count('COMPLETE')} complete trials on the front" in table.stdout, table.stderr
        unknown = head.python("search.front", "other", "--address", URL)
        assert (unknown.returncode, unknown.stdout) == (2, "")
        assert unknown.stderr.startswith("error: no study 'other'")
        listed = head.run("ray", "job", "list", "--address", URL)
        assert ("tiny-2" in listed.stdout, "raysubmit" in listed.stdout) == (True, False), listed.stdout
        search = ("python", "-m", "search.run", str(space), "--storage", str(head.home / "runs"))
        terminated = head.command(*search, "--trials", "300", "--address", "auto")
        _shown_when(head, lambda states: "RUNNING" in states)
        os.kill(only_child(terminated.pid), signal.SIGTERM)
        output, errors = terminated.communicate(timeout=120)
        assert terminated.returncode == 130, errors
        assert "go on with: " in output


def _states(head: Head) -> list[str]:
    shown = head.python("search.front", "tiny", "--address", URL, "--json")
    return [trial["state"] for trial in json.loads(shown.stdout)["trials"]] if shown.returncode == 0 else []


def _num_finished(states: list[str]) -> int:
    """As `--trials` counts: one whose training was stopped is finished, too."""
    return states.count("COMPLETE") + states.count("STOPPED")


def _shown_when(head: Head, enough: Any) -> list[str]:
    seen: list[list[str]] = []

    def is_enough() -> bool:
        seen.append(_states(head))
        return bool(enough(seen[-1]))

    wait_for(is_enough, "enough of the study is shown", 240, lambda: _said_by_job(head, "logs", "tiny-1")[-3000:])
    return seen[-1]


def _wait_for_job(head: Head, job: str, status: str) -> None:
    said = functools.partial(_said_by_job, head, "status", job)
    wait_for(lambda: status.lower() in said().lower(), f"{job} has {status}", 120, said)


def _said_by_job(head: Head, what: str, job: str) -> str:
    return head.run("ray", "job", what, job, "--address", URL).stdout


def _parent_status(head: Head) -> str:
    """Of the study's run in MLflow's local store."""
    script = (
        "from mlflow import MlflowClient; "
        f"c = MlflowClient('sqlite:///{head.home}/runs/mlflow/mlflow.db'); "
        "e = [x.experiment_id for x in c.search_experiments()]; "
        "print(*[r.info.status for r in c.search_runs(e) if 'mlflow.parentRunId' not in r.data.tags])"
    )
    return head.run("python", "-c", script).stdout.strip()
