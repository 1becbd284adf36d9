"""search.doctor --cluster: what is said of made-up clusters, and a real one with a node that does not answer."""

import http.server
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray_heads import HOST, PORT, needs_namespaces, ray_head
from studies import empty_database, tree, write_space

from ccdist.device_usage import Gpu, Usage
from search import doctor, front, pack
from search.clusters import cluster_checkup, node_probes
from search.clusters.addresses import ClusterError
from search.clusters.cluster_checkup import Examined, check_database, check_tracking
from search.clusters.node_probes import (
    Clock,
    Node,
    NodeAnswer,
    NodeFacts,
    ask_nodes,
    code_hash,
    facts_here,
    living_nodes,
    one_of_each_kind,
)
from search.clusters.preflight import ClusterView, cluster_findings, memory_findings, slots_of, summary
from search.clusters.reach import Finding as Reach
from search.clusters.reach import survey
from search.config import ResourcesConfig
from search.sharing.packing import GIB
from search.sharing.probe import TrialUsage
from search.storage import Storage
from search.studies.consistency import Finding

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray

VERSIONS = {"python": "3.11", "ray": "2.60.0", "torch": "2.14.1", "numpy": "2.4.0"}
FACTS = NodeFacts(VERSIONS, "abc", "c0de", 64 * GIB, 60 * GIB, "/tmp", 100 * GIB)
RESOURCES = ResourcesConfig(cpu=2)


def node(number: int = 1, cpus: float = 8, gpus: float = 0, **more: float) -> Node:
    resources = {"CPU": cpus, "memory": 40.0 * GIB, "object_store_memory": 2.0 * GIB} | more
    return Node(f"id{number}", f"host{number}", f"10.0.0.{number}", resources | ({"GPU": gpus} if gpus else {}))


def usage(host: float = 1.0, device: float = 0.0, seconds: float = 360.0) -> TrialUsage:
    phases = {"student": Usage(1.0, 1.0, round(host * GIB), round(device * GIB))}
    return TrialUsage("first point: mlp", phases, 0.1, 0.0, 0.1, seconds)


def view(*answers: NodeAnswer, **changes: Any) -> ClusterView:
    fields: dict[str, Any] = {
        "description": "Ray cluster at 10.0.0.1:6379",
        "driver": FACTS,
        "answers": answers,
        "artifacts": Path("/shared/artifacts"),
        "reach": [Reach(answer.node.name, None, {}) for answer in answers],
        "usages": [],
        "tokens": True,
        "is_shared": True,
    }
    return ClusterView(**fields | changes)


def broken(cluster: ClusterView, resources: ResourcesConfig = RESOURCES) -> list[str]:
    found = [*cluster_findings(cluster, resources), *memory_findings(cluster, resources)]
    assert all("\n" not in finding.text for finding in found)
    return [f"{finding.subject}: {finding.text}" for finding in found if not finding.fine]


def test_a_good_cluster_has_a_line_for_each_node() -> None:
    gpu = replace(FACTS, gpus=(Gpu("NVIDIA H200", 140 * GIB, 0, 0.0),))
    cluster = view(
        NodeAnswer(node(1), FACTS, Clock(0.0123, 0.001)),
        NodeAnswer(node(2, 16, 4, **{"accelerator_type:H200": 1}), gpu),
    )
    assert broken(cluster) == []
    texts = {finding.subject: finding.text for finding in cluster_findings(cluster, RESOURCES)}
    assert list(texts) == ["tokens", "host1 (10.0.0.1)", "host2 (10.0.0.2)", "artefacts"]
    assert texts["host1 (10.0.0.1)"] == (
        "8 CPUs; memory 60 of 64 GiB free; object store 2 GiB; 100 GiB free in /tmp; python 3.11, ray 2.60.0, torch "
        "2.14.1; commit abc, code c0de; clock +0.012 s ± 0.001 of the driver's"
    )
    assert texts["host2 (10.0.0.2)"].startswith("16 CPUs; 4 GPUs (NVIDIA H200); memory")
    assert texts["artefacts"] == "nodes that read and write there: 2, all"


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (
            {"versions": VERSIONS | {"torch": "2.13.0"}},
            "has torch 2.13.0, the driver 2.14.1; install",
        ),
        ({"versions": VERSIONS | {"python": "3.12"}}, "has python 3.12, the driver 3.11; install"),
        ({"versions": {name: VERSIONS[name] for name in ("python", "ray", "torch")}}, "has numpy none, the driver"),
        (
            {"code": "0ther", "commit": "def"},
            "runs other code (def, 0ther) than the driver (abc, c0de); ",
        ),
        ({"scratch_free": 2**30}, "has 1 GiB left in /tmp, where Ray keeps logs and spills objects; make room"),
    ],
)
def test_what_differs_from_the_driver_is_broken(facts: dict[str, Any], text: str) -> None:
    (told,) = broken(view(NodeAnswer(node(), replace(FACTS, **facts))))
    assert told.startswith(f"host1 (10.0.0.1): {text}")


def test_builds_for_other_devices_are_the_same_version() -> None:
    built = replace(FACTS, versions=VERSIONS | {"torch": "2.14.1+cu130"})
    assert broken(view(NodeAnswer(node(), built))) == []


def test_a_node_that_does_not_answer_is_told_and_holds_nothing() -> None:
    cluster = view(NodeAnswer(node(1), FACTS), NodeAnswer(node(2), "no answer within 60 s"), reach=[])
    (told,) = broken(cluster)
    assert told.startswith("host2 (10.0.0.2): no answer within 60 s; see that Ray runs there")
    assert summary(cluster, RESOURCES).startswith("4 trials at once")


@pytest.mark.parametrize(("ahead", "within", "warned"), [(0.9, 0, 0), (1.1, 0, 1), (-5, 0.1, 1), (1.5, 0.7, 0)])
def test_clocks_that_differ_are_a_warning(ahead: float, within: float, warned: bool) -> None:
    """Only what is surely above a second; and nothing of it keeps a search from running."""
    cluster = view(NodeAnswer(node(), FACTS, Clock(ahead, within)))
    assert broken(cluster) == []
    warnings = [found for found in cluster_findings(cluster, RESOURCES) if found.text.startswith("warning: journals")]
    assert len(warnings) == warned


def test_a_shared_cluster_without_tokens_is_broken() -> None:
    (told,) = broken(view(NodeAnswer(node(), FACTS), tokens=False))
    assert told.startswith("tokens: Ray asks for none: whoever reaches the head's ports runs code on every node; put")
    assert broken(view(NodeAnswer(node(), FACTS), tokens=False, is_shared=False)) == []
    (told,) = broken(view(NodeAnswer(node(), FACTS), tokens=None))
    assert told == "tokens: the head could not be asked whether it wants its token; look again"


def test_nodes_that_do_not_see_the_artefacts_are_named() -> None:
    reach = [Reach("host1 (10.0.0.1)", None, {}), Reach("host2 (10.0.0.2)", "it has none", {})]
    (told,) = broken(view(NodeAnswer(node(1), FACTS), NodeAnswer(node(2), FACTS), reach=reach))
    assert told.startswith("host2 (10.0.0.2): does not reach the artefacts: it has none; mount one folder there on")
    reach = [Reach("host1 (10.0.0.1)", "storage s3://b/f cannot be used (403)", {})]
    (told,) = broken(view(NodeAnswer(node(1), FACTS), reach=reach, artifacts="s3://b/f"))
    assert told == (
        "host1 (10.0.0.1): does not reach the artefacts: storage s3://b/f cannot be used (403); give the node the "
        "rights to read and write there, or correct storage.artifacts"
    )


def test_a_cluster_on_which_no_trial_fits_yet_is_not_well() -> None:
    """Its GPU node has gone to sleep: nothing was measured, whatever `concurrency` says."""
    asked = ResourcesConfig(cpu=2, gpu=0.25, concurrency=128)
    (told,) = broken(view(NodeAnswer(node(), FACTS)), asked)
    assert told.startswith("trials: a trial asks for 2 CPUs and 0.25 GPUs, and no node that is there has as many, so ")
    assert "start one first, on a cluster whose nodes come on demand by a job that asks for a GPU" in told
    assert broken(view(NodeAnswer(node(), FACTS), NodeAnswer(node(2, gpus=1), FACTS)), asked) == []


def test_nothing_is_packed_where_no_node_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node_probes, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(node_probes, "living_nodes", lambda: [node()])
    space = str(write_space(tmp_path / "space.yaml", tree()))
    assert pack.main([space, "--address", "a:1", "--set", "resources.gpu=1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: a trial asks for 1 CPUs and 1 GPUs, and no node that is there has as many; ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "resources", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out\nof memory"),
            RESOURCES,
            "(CUDA out of memory); set resources.memory_gb high",
        ),
        (
            MemoryError("no"),
            ResourcesConfig(gpu=0.5),
            "it runs out of memory (no); set resources.gpu higher, or a batch",
        ),
        (ValueError("no such\nlayer"), RESOURCES, "ValueError: no such layer"),
    ],
)
def test_why_a_trial_was_not_measured(
    error: Exception, resources: ResourcesConfig, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(node_probes, "prepare_process", failing)
    told = node_probes._measured(None, resources)  # type: ignore[arg-type]
    assert text in str(told)
    assert "idle" not in str(told)
    (said,) = broken(view(NodeAnswer(node(gpus=1), FACTS), usages=[(node(gpus=1), told)]), resources)
    assert said == f"a trial on host1 (10.0.0.1): {told}"


def test_one_node_of_each_kind_that_can_hold_a_trial() -> None:
    nodes = [node(1), node(2), node(3, 16), node(4, 1), node(5, 8, 1, **{"accelerator_type:A100": 1})]
    assert [each.id for each in one_of_each_kind(nodes, RESOURCES)] == ["id1", "id3", "id5"]
    assert [each.id for each in one_of_each_kind(nodes, ResourcesConfig(cpu=2, gpu=0.5))] == ["id5"]
    assert node(5, 8, 1, **{"accelerator_type:A100": 1}).gpu_type == "A100"


def test_trials_at_once_and_an_hour() -> None:
    """Trials of 6 minutes: 10 an hour and slot; 8 and 16 cores hold 4 and 8 trials of 2."""
    answers = NodeAnswer(node(1), FACTS), NodeAnswer(node(2), FACTS), NodeAnswer(node(3, 16), FACTS)
    none = view(*answers)
    assert summary(none, RESOURCES) == (
        "16 trials at once on Ray cluster at 10.0.0.1:6379; how many an hour was not measured"
    )
    both = view(*answers, usages=[(node(1), usage()), (node(3, 16), usage(seconds=180.0))])
    assert broken(both) == []
    assert "; about 240 trials per hour" in summary(both, RESOURCES)  # 4 x 10 + 4 x 10 + 8 x 20
    limited = ResourcesConfig(cpu=2, concurrency=4)
    assert summary(both, limited).startswith("4 trials at once")
    assert "; about 60 trials per hour" in summary(both, limited)
    half = view(*answers, usages=[(node(1), usage()), (node(3, 16), "no answer within 9 s: other work holds it")])
    assert summary(half, RESOURCES).endswith("was not measured")
    (told,) = broken(half)
    assert told == "a trial on host3 (10.0.0.3): no answer within 9 s: other work holds it"


def test_memory_that_holds_fewer_trials_than_cores() -> None:
    """60 GiB free, of which nine tenths count: two trials of 20 GiB, where Ray would start four."""
    cluster = view(NodeAnswer(node(), FACTS), usages=[(node(), usage(host=20))])
    assert slots_of(cluster.answers[0], cluster.usage(node()), RESOURCES) == 2
    (told,) = broken(cluster)
    assert told.endswith(
        "memory holds 2 trials of 20 GiB, but Ray would start 4; --set resources.memory_gb=22 lets Ray count it"
    )


def test_a_trial_that_needs_more_than_its_share_of_a_gpu() -> None:
    there, resources = node(1, 16, 2), ResourcesConfig(cpu=1, gpu=0.25)
    answer = NodeAnswer(there, replace(FACTS, gpus=(Gpu("A100", 80 * GIB, 0, 0.0),) * 2))
    fits = view(answer, usages=[(there, usage(device=20))])
    assert broken(fits, resources) == []
    assert summary(fits, resources).startswith("8 trials at once")
    exceeds = view(answer, usages=[(there, usage(device=21))])
    (told,) = broken(exceeds, resources)
    assert told.endswith(
        "a trial takes 21 GiB of the GPU, its share of 0.25 is 20 GiB; set resources.gpu higher "
        "(python -m search.pack proposes it)"
    )
    assert summary(exceeds, resources).startswith("0 trials at once")
    silent = view(NodeAnswer(there, FACTS), usages=[(there, usage(device=21))])  # no nvidia-smi there
    assert broken(silent, resources) == []


def test_the_clock_of_the_quickest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of 0.4 s, 0.02 s, 0.2 s ...; the node is 2.5 s ahead and reads its clock in the middle."""
    now, took = 1000.0, iter([0.4, 0.02, 0.2, 0.3, 0.1])

    def get(_: object, timeout: float) -> float:
        nonlocal now
        half = next(took) / 2
        now += 2 * half
        return now - half + 2.5

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(node_probes, "time", SimpleNamespace(time=lambda: now))
    clock = node_probes._clock(lambda: None)
    assert clock is not None
    assert (clock.ahead, clock.within) == (pytest.approx(2.5), pytest.approx(0.01))


def test_what_this_machine_says() -> None:
    facts = facts_here()
    assert facts.versions["ray"] == ray.__version__
    assert 0 < facts.memory_free <= facts.memory
    assert facts.scratch_free > 0
    assert facts.code == code_hash()
    assert len(facts.code) == 12


def test_the_study_database(tmp_path: Path) -> None:
    here = check_database(f"sqlite:///{tmp_path}/study.db")
    assert here.fine
    assert "only a driver on this host can go on with the study" in here.text
    assert not (tmp_path / "study.db").exists()
    away = check_database("postgresql://user:secret@127.0.0.1:1/studies")
    assert not away.fine
    assert "secret" not in away.text


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mysql://u:secret@h/db", "mysql://***@h/db: expected sqlite:///FILE or postgresql://"),
        ("nonsense", "nonsense: expected sqlite:///FILE"),
        ("sqlite:///:memory:", "ends with its driver"),
        ("sqlite:///FOLDER", "is no SQLite file"),
        ("sqlite:///FOLDER/text", "is no SQLite file"),
        ("sqlite:///FOLDER/text/study.db", "is no folder"),
        ("sqlite:////proc/nowhere/study.db", "cannot be written"),
    ],
)
def test_what_is_no_study_database(url: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("no database")
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path("/proc") and allowed(path, mode))
    found = check_database(url.replace("FOLDER", str(tmp_path)))
    assert not found.fine
    assert text in found.text
    assert "secret" not in found.text


def test_a_study_database_that_is_there_or_will_be(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(empty_database())
    for name in ("study.db", "new/folder/study.db"):
        assert check_database(f"sqlite:///{tmp_path}/{name}").fine
    assert not (tmp_path / "new").exists()


def test_folders_that_are_closed_to_this_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed" / "runs").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    runs, user = tmp_path / "closed" / "runs", os.geteuid()
    if user == 0:  # to whom nothing is closed
        os.setresuid(65534, 65534, user)
    try:
        found = check_database(f"sqlite:///{runs}/study.db")
        with cluster_checkup._nothing_left(Storage(runs, "", runs / "artifacts", None)), pytest.raises(ClusterError):
            survey(runs / "artifacts")
        codes = [command.main(["tiny", "--storage", str(runs)]) for command in (doctor, front)]
    finally:
        os.setresuid(user, user, user)
        (tmp_path / "closed").chmod(0o700)
    assert not found.fine
    assert f"study database {runs}/study.db cannot be written (" in found.text
    assert codes == [2, 2]
    assert capsys.readouterr().err == f"error: study database {runs}/study.db cannot be read (Permission denied)\n" * 2


class Server(http.server.BaseHTTPRequestHandler):
    statuses: ClassVar[dict[str, int]] = {"/health": 200, "/closed/health": 401, "/broken/health": 500}

    def do_GET(self) -> None:
        self.send_response(self.statuses[self.path])
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_tracking_is_reached_from_the_driver(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert check_tracking(None, True).fine
    assert check_tracking(server, False) == Finding("tracking", "is off (tracking.enabled)", fine=True)
    for address in (server, f"{server}/"):
        assert check_tracking(address, True).text.endswith("answers here; nodes write journals and need not reach it")
    assert "wants a login (set MLFLOW_TRACKING_USERNAME" in check_tracking(f"{server}/closed", True).text
    assert check_tracking(f"{server}/closed", True).fine
    for address, text in (
        (f"{server}/broken", "answers with status 500"),
        ("http://127.0.0.1:1", "does not answer"),
        ("http://a..b:5000", "does not answer"),
        ("http://127.0.0.1:²", "does not answer"),
    ):
        found = check_tracking(address, True)
        assert not found.fine
        assert text in found.text
        assert "start the server or correct tracking.uri" in found.text


@pytest.mark.parametrize(("fine", "code"), [(True, 0), (False, 1)])
def test_the_command_prints_findings_and_a_summary(
    fine: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def look(config: Any, space: Any, storage: Any, **options: Any) -> Examined:
        asked.update(options, resources=config.resources, folder=storage.folder)
        found = [Finding("host2", "speaks", fine=True), Finding("host1", "is silent; wake it", fine=fine)]
        return Examined(found, "7 trials at once")

    monkeypatch.setattr(cluster_checkup, "examine_cluster", look)
    space = str(write_space(tmp_path / "space.yaml", tree()))
    options = ["--set", "resources.cpu=2", "--address", "a:1", "--storage", str(tmp_path / "s"), "--seconds", "9"]
    assert doctor.main(["--cluster", space, *options]) == code
    lines = capsys.readouterr().out.splitlines()
    told = "fine  " if fine else "broken"
    assert lines == ["fine      host2: speaks", f"{told}    host1: is silent; wake it", "7 trials at once"]
    assert asked == {
        "address": "a:1",
        "seconds": 9.0,
        "resources": ResourcesConfig(cpu=2),
        "folder": (tmp_path / "s").resolve(),
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cluster", "SPACE", "--repair"], "--repair is not for --cluster; leave one of them out"),
        (["--cluster", "SPACE", "--no-mlflow"], "--no-mlflow is not for --cluster"),
        (["tiny", "--address", "a:1"], "--address belongs to --cluster"),
        (["--cluster", "nothing"], "nothing"),
        (["--cluster", "SPACE", "--address", "ray://a:1"], "--address ray://a:1: Ray Client cannot run a search"),
        (["--cluster", "SPACE", "--set", "data.path=/nowhere"], "/nowhere"),
        (["--cluster", "SPACE", "--seconds", "nan"], "--seconds nan; expected a number above 0"),
        (
            ["--cluster", "SPACE", "--storage", "x", "--set", "storage.study=sqlite:///y"],
            "what --set storage.study does",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = str(write_space(tmp_path / "space.yaml", tree()))
    assert doctor.main([space if word == "SPACE" else word for word in arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert text in printed.err


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes of one machine, two of them of one kind; not where other clusters leave their address."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets' names must be short
    monkeypatch.setenv("RAY_TMPDIR", folder)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=0, resources={"small": 1})
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_cluster(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three nodes: all is well, and a trial is packed; then one that is stopped is told, and nothing hangs."""
    space, storage = str(write_space(tmp_path / "space.yaml", tree())), tmp_path / "runs"
    options = ["--address", cluster.address, "--seconds", "120"]
    code = doctor.main(["--cluster", space, "--storage", str(storage), *options])
    lines = capsys.readouterr().out.splitlines()
    trials = [line for line in lines if line.startswith("fine      a trial on ")]
    assert (len([line for line in lines if "CPUs; memory" in line]), len(trials)) == (3, 2)  # two kinds
    told = [line for line in lines if line.startswith("broken")]
    assert [line for line in told if "tokens" not in line] == []
    assert code == int(bool(told))
    assert lines[-1].startswith(f"4 trials at once on Ray cluster at {cluster.address}; about ")
    assert not storage.exists()

    assert pack.main([space, *options]) == 0
    printed = capsys.readouterr().out
    assert (printed.count("space tiny on "), printed.count("in the space file: resources: ")) == (2, 2)
    assert ": 2 cores, " in printed
    assert ": 1 cores, " in printed

    (raylet,) = next(iter(cluster.worker_nodes)).all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGSTOP)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        started = time.monotonic()
        answers = ask_nodes(living_nodes(), limit_s=20.0)
        assert time.monotonic() - started < 60
    finally:
        os.kill(raylet.process.pid, signal.SIGCONT)
    assert len(answers) == 3
    assert [answer.facts for answer in answers if isinstance(answer.facts, str)] == ["no answer within 20 s"]


ASKED = f"from search.clusters.addresses import asks_for_token; print(asks_for_token('{HOST}:{PORT}'))"


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("token", [None, "a" * 64])
def test_whether_a_real_head_asks_for_its_token(token: str | None, tmp_path: Path) -> None:
    """Whatever this process says of itself: a driver with a token is let in by a head that asks for none."""
    with ray_head(tmp_path / "head", token=token, dashboard=False) as head:
        for mode in ("token", "disabled"):
            told = head.run("python", "-c", ASKED, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN="a" * 64)
            assert told.stdout == f"{token is not None}\n", told.stderr
