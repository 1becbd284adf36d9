"""How many trials fit on which nodes, which clusters are joined, and which are refused; by one test on a real head."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private import ray_constants
from ray._private.accelerators import get_all_accelerator_resource_names
from ray.exceptions import AuthenticationError
from ray_heads import HOST, PORT, URL, needs_namespaces, ray_head
from studies import tree, write_space

from ccdist.provenance import source_commit
from search import config, worker
from search.clusters import addresses, cluster, shipping
from search.clusters.addresses import Address, ClusterError, cluster_address
from search.clusters.cluster import RECOUNT_S, ResourcesError, Slots, connected
from search.config import RAYS_OWN, ResourcesConfig
from search.errors import UserError

pytestmark = pytest.mark.timeout(30)  # the first test pays for importing Ray


@pytest.mark.parametrize(
    ("cpus", "gpus", "cpu", "gpu", "fits"),
    [
        (2, 0, 1, 0, 2),
        (2, 0, 2, 0, 1),
        (2, 0, 3, 0, 0),
        (3, 0, 2, 0, 1),
        (1, 0, 0.25, 0, 4),
        (1, 0, 0.1, 0, 10),  # 1 / 0.1 is a hair below 10 in floats
        (0.3, 0, 0.1, 0, 3),
        (16, 1, 1, 0.25, 4),
        (16, 4, 1, 0.25, 16),
        (8, 4, 1, 0.25, 8),
        (16, 4, 2, 0.25, 8),
        (16, 1, 1, 0.4, 2),  # two trials on a GPU, not 2.5
        (16, 2, 1, 0.4, 4),  # and not 5 on two GPUs
        (16, 2, 1, 0.6, 2),
        (16, 1, 1, 1 / 3, 3),
        (16, 1, 1, 0.1, 10),
        (16, 4, 1, 1, 4),
        (16, 4, 1, 2, 2),
        (16, 3, 1, 2, 1),
        (16, 1, 1, 2, 0),
        (16, 0, 1, 0.1, 0),
        (16, 0, 1, 0, 16),
    ],
)
def test_what_fits_on_a_node(cpus: float, gpus: float, cpu: float, gpu: float, fits: int) -> None:
    node = {"CPU": float(cpus), "memory": 1e9} | ({"GPU": float(gpus)} if gpus else {})
    assert cluster.fits(node, ResourcesConfig(cpu=cpu, gpu=gpu)) == fits


def test_no_name_of_rays_is_a_resource_of_ones_own() -> None:
    """Of accelerators Ray refuses some fractions, long after a space file was read."""
    rays = {name.lower() for name in (*ray_constants.DEFAULT_RESOURCES, *get_all_accelerator_resource_names())}
    assert rays == config._NOT_HELD | RAYS_OWN.keys()


def test_a_node_without_cpus_holds_nothing() -> None:
    assert cluster.fits({"memory": 1e9}, ResourcesConfig()) == 0


class FakeRay:
    """Takes the place of ray.init and its kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]) -> None:
        self.calls: list[dict[str, Any]] = []
        self.is_up = False
        self.error: Exception | None = None
        self.nodes = nodes
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", self.shutdown)
        monkeypatch.setattr(ray, "nodes", lambda: self.nodes)

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if self.error is not None:
            raise self.error
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(addresses, "read_ray_address", lambda: None)
    monkeypatch.setattr(addresses, "check_own_token", lambda: None)
    monkeypatch.setattr(addresses, "GcsClient", lambda address: None)
    monkeypatch.setattr(cluster, "_ENVIRONMENT", {})


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], str]]:
    """Somebody who answers every connection with given bytes; called for the address."""
    servers: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(words: bytes) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if words:
                    connection.sendall(words)

        threads.append(threading.Thread(target=accept, daemon=True))
        threads[-1].start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    held: list[socket.socket] = []
    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)  # wakes whoever accepts
    for thread in threads:
        thread.join()
    for each in (*servers, *held):
        each.close()


@pytest.fixture
def head(serve: Callable[[bytes], str]) -> str:
    """The address of somebody who speaks HTTP/2: an empty SETTINGS frame."""
    return serve(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody answers: its port is taken, so that nobody else gets it, but not listened to."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{server.getsockname()[1]}"


def refusal(option: str | None) -> str:
    """The one line that an address is refused with."""
    with pytest.raises(ClusterError) as caught:
        cluster_address(Address.of(option))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)
    return str(caught.value)


@pytest.mark.usefixtures("alone")
def test_slots_are_counted_over_living_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2), node(4, 2), node(64, 8, alive=False)])
    with connected(ResourcesConfig(), 1000) as found:
        assert found.slots() == 6
        assert fake.is_up
    assert not fake.is_up
    with connected(ResourcesConfig(cpu=1, gpu=0.5), 1000) as found:
        assert found.slots() == 4
    with connected(ResourcesConfig(concurrency=3), 1000) as found:
        assert found.slots() == 3
    with connected(ResourcesConfig(concurrency=99), 1000) as found:
        assert found.slots() == 6


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("resources", "text"),
    [
        (
            ResourcesConfig(gpu=1),
            "as many: the largest has 4 CPUs and 0 GPUs; lower resources.cpu or resources.gpu (--set resources.gpu=0)",
        ),
        (ResourcesConfig(cpu=6), "a trial asks for 6 CPUs and 0 GPUs, but no node has as many: the largest has 4 CPUs"),
        (ResourcesConfig(cpu=0.5, gpu=0.25), "a trial asks for 0.5 CPUs and 0.25 GPUs"),
    ],
)
def test_more_than_any_node_has_is_refused(
    resources: ResourcesConfig, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(monkeypatch, [node(2), node(4)])
    with pytest.raises(ResourcesError) as caught, connected(resources, 1000):
        pass
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)
    assert not fake.is_up


# ---- Which cluster -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_addresses_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert "RAY_ADDRESS=ray://head:10001: Ray Client cannot run a search" in refusal(None)
    assert "--address http://head:8265 is a dashboard, which takes jobs only; add --detach" in refusal(
        "http://head:8265"
    )
    for wrong in ("head", "head:", ":6379", "head:six", "127.0.0.1:²", "head:65536", "head:0", f"head:{'9' * 5000}"):
        assert f"--address {wrong}: expected auto, local, HOST:PORT" in refusal(wrong)
    assert "no Ray cluster answers at --address a..b:6379" in refusal("a..b:6379")


@pytest.mark.usefixtures("alone")
def test_the_option_wins_over_the_environment(head: str, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with connected(ResourcesConfig(), 1000, head) as found:
        assert (found.description, found.is_shared) == (f"Ray cluster at {head}", True)
    with connected(ResourcesConfig(), 1000, "local") as found:
        assert (found.description, found.is_shared) == ("this machine", False)
    monkeypatch.setenv("RAY_ADDRESS", head)
    with connected(ResourcesConfig(), 1000) as found:
        assert found.description == f"Ray cluster at {head}"
    assert [call["address"] for call in fake.calls] == [head, "local", head]
    assert "object_store_memory" not in fake.calls[0]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("words", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_whoever_is_no_head_is_refused_soon(
    words: bytes | None, nobody: str, serve: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody, somebody silent, and a dashboard's port in place of the head's."""
    fake = FakeRay(monkeypatch, [node(2)])
    monkeypatch.setattr(addresses, "CONNECT_S", 0.3)
    address = nobody if words is None else serve(words)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"no Ray cluster answers at RAY_ADDRESS={address}; start it, check the port" in refusal(None)
    assert fake.calls == []


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [ConnectionError("no\nway"), RuntimeError("versions differ"), OSError("no raylet")])
def test_what_ray_says_of_a_given_cluster_is_told_in_one_line(
    error: Exception, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(monkeypatch, [])
    fake.error = error
    with pytest.raises(ClusterError) as caught:
        connected(ResourcesConfig(), 1000, head).__enter__()
    assert f"--address {head} cannot be joined ({' '.join(str(error).split())})" == str(caught.value)


@pytest.mark.usefixtures("alone")
def test_what_ray_says_of_a_cluster_that_nobody_gave_is_told_so(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [])
    fake.error = AuthenticationError("no\nfile")
    with pytest.raises(ClusterError, match=r"^a Ray of this search's own cannot be started \(no file"):
        connected(ResourcesConfig(), 1000).__enter__()
    monkeypatch.setattr(addresses, "read_ray_address", lambda: head)
    with pytest.raises(ClusterError, match=r"^the Ray cluster on this machine cannot be joined \(no file"):
        connected(ResourcesConfig(), 1000).__enter__()


@pytest.mark.usefixtures("alone")
def test_auto_is_what_ray_start_left_running_here(head: str, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    monkeypatch.setattr(addresses, "read_ray_address", lambda: head)
    for option in (None, "auto"):
        with connected(ResourcesConfig(), 1000, option) as found:
            assert (found.description, found.is_shared) == ("the Ray cluster on this machine", True)
    monkeypatch.setattr(addresses, "read_ray_address", lambda: nobody)  # its address was left behind
    with connected(ResourcesConfig(), 1000) as found:
        assert found.description == "this machine"
    assert [call["address"] for call in fake.calls] == [head, head, "local"]
    assert "--address auto, but no Ray cluster runs on this machine" in refusal("auto")


@pytest.mark.usefixtures("alone")
def test_another_searchs_ray_is_never_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` of Ray's would join any Ray on the machine, and go down with it."""
    fake = FakeRay(monkeypatch, [node(2)])
    with connected(ResourcesConfig(), 10**9):
        pass
    (call,) = fake.calls
    assert call["address"] == "local"
    assert call["include_dashboard"] is False
    assert call["object_store_memory"] > 10**9
    assert "runtime_env" not in call


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("mode", "text"), [("disabled", "RAY_AUTH_MODE is not set to token here"), ("token", "missing or another")]
)
def test_a_token_that_is_not_the_clusters_is_told(
    mode: str, text: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(monkeypatch, [])

    def refuse(address: str) -> None:
        os.write(2, b"pages of Ray's own log\n")
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(addresses, "GcsClient", refuse)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    told = refusal(head)
    assert f"--address {head} asks for its token, and " in told
    assert text in told
    assert "copy ~/.ray/auth_token of the head" in told
    assert fake.calls == []


# ---- How many at once ----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Counting:
    """A cluster of some nodes, or a head that is away."""

    def __init__(self, fitting: int | None) -> None:
        self.fitting, self.calls = fitting, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.fitting is None:
            raise ConnectionError("the head is away")
        return self.fitting


def test_slots_follow_the_nodes() -> None:
    clock, nodes, told = Clock(), Counting(3), list[str]()
    slots = Slots(nodes, 3, told.append, clock)

    def after(fitting: int | None) -> int:
        nodes.fitting = fitting
        clock.now += RECOUNT_S
        return slots()

    assert [slots() for _ in range(100)] == [3] * 100
    assert nodes.calls == 0  # not at every question
    assert after(5) == 5
    nodes.fitting = 7
    assert slots() == 5
    assert after(None) == 5  # nothing is known: nothing changes
    assert after(0) == 1  # a trial that waits wakes an autoscaler, and starts on the first node
    assert told == []  # a moment without nodes is none to talk about
    assert [after(0), after(0), after(None)] == [1, 1, 1]
    assert len(told) == 1
    assert told[0].startswith("waiting: no node that could hold a trial is left")
    assert after(2) == 2
    assert told[1:] == ["nodes are back: 2 trials at once"]
    assert [after(0), after(4)] == [1, 4]
    assert len(told) == 2


@pytest.mark.usefixtures("alone")
def test_slots_are_recounted_on_a_cluster_only(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    monkeypatch.setattr(cluster, "RECOUNT_S", 0.0)
    with connected(ResourcesConfig(), 1000, head) as found:
        assert found.slots() == 2
        fake.nodes = [node(2), node(4), node(9, alive=False)]
        assert found.slots() == 6
    with connected(ResourcesConfig(concurrency=99), 1000, head) as found:
        assert found.slots() == 99  # its nodes may start once trials wait
    with connected(ResourcesConfig(), 1000) as found:
        fake.nodes = [node(1)]
        assert found.slots() == 6


# ---- What workers run, and how a driver is ended -------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_workers_run_the_code_of_the_driver(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    monkeypatch.setattr(shipping, "source_commit", lambda: "0123456789ab")
    with connected(ResourcesConfig(), 1000, head):
        pass
    sent = fake.calls[0]["runtime_env"]
    assert {Path(folder).name for folder in sent["py_modules"]} == {"ccdist", "search", "tracking"}
    assert all((Path(folder) / "__init__.py").is_file() for folder in sent["py_modules"])
    assert sent["env_vars"] == {"CCDIST_COMMIT": "0123456789ab"}
    # A job was sent with its code, and Ray refuses to be told twice.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"py_modules": ["gcs://a.zip"]}}')
    assert shipping.workers_env() == {}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"A": "B"}}}')
    assert shipping.workers_env() == sent


def test_code_that_is_in_no_repository_is_of_no_known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "source_commit", lambda: "unknown")
    assert shipping.runtime_env({"A": "B"})["env_vars"] == {"A": "B"}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_is_ctrl_c(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    FakeRay(monkeypatch, [node(2)])
    before = signal.getsignal(signal.SIGTERM)
    of_sigint = signal.signal(signal.SIGINT, handler)  # ignored: what a script has sent to the background
    # Ray starts the commands of its jobs with SIGINT blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with pytest.raises(KeyboardInterrupt), connected(ResourcesConfig(), 1000):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, of_sigint)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_trial_has_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts workers with OMP_NUM_THREADS=1."""
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        worker.prepare_process(ResourcesConfig(cpu=3))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# ---- A real head ---------------------------------------------------------------------------------------------------


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_with_a_token(tmp_path: Path) -> None:
    """Without the token, one line; with it, a search whose trials name the driver's commit."""
    space, storage = write_space(tmp_path / "tiny.yaml", tree()), tmp_path / "storage"
    search = ("search.run", str(space), "--storage", str(storage), "--trials", "2", "--address")
    with ray_head(tmp_path / "head", token="a" * 64) as head:
        for address in ("auto", f"{HOST}:{PORT}"):
            for variables in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "b" * 64}, {"HOME": str(tmp_path)}):
                refused = head.python(*search, address, **variables)
                assert refused.returncode == 2
                assert refused.stderr.count("\n") == 1, refused.stderr
                assert "asks for its token, and " in refused.stderr
        for address in (URL, URL.removeprefix("http://")):
            refused = head.python(*search, address)
            assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert not storage.exists() or not (storage / "artifacts" / "tiny").exists()
        done = head.python(*search, "auto")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 at once on the Ray cluster on this machine" in done.stdout
    commits = [path.read_text() for path in storage.glob("artifacts/tiny/trials/*/result.json")]
    assert len(commits) == 2
    assert all(f'"commit": "{source_commit()}"' in text for text in commits)


ONCE = """
import json, time, ray, torch
from ray import tune
from ray._private.internal_api import node_stats
from ccdist.data import Dataset, ImageSet
from search.worker import SharedDataset

MB = 2**20
images = ImageSet(torch.zeros((20 * MB // 16, 1, 4, 4), dtype=torch.uint8), torch.zeros(20 * MB // 16).long())
shared = SharedDataset.of(Dataset("zeros", images, images, 2, (0.0,), (1.0,), False, 0, "f"))

def own():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024

def read(config, *, shared):
    before = own()
    data = shared.dataset()
    total = sum(int(part.images.sum()) + int(part.labels.sum()) for part in (data.train, data.validation))
    grown = own() - before
    time.sleep(10)  # until all have read
    node = ray.nodes()[0]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
    tune.report({"total": total, "grown": grown, "store": stats.object_store_bytes_used / MB})

ray.init("auto", log_to_driver=False)
bound = tune.with_resources(tune.with_parameters(read, shared=shared), {"cpu": 0.25})
results = tune.Tuner(bound, tune_config=tune.TuneConfig(num_samples=4), run_config=tune.RunConfig(verbose=0)).fit()
print(json.dumps([shared.num_bytes / MB, [(each.metrics["store"], each.metrics["grown"]) for each in results]]))
"""


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_holds_the_images_once(tmp_path: Path) -> None:
    with ray_head(tmp_path / "head", dashboard=False) as head:
        done = head.run("python", "-c", ONCE)
    assert done.returncode == 0, done.stderr
    size, workers = json.loads(done.stdout.splitlines()[-1])
    assert len(workers) == 4
    for store, grown in workers:
        assert size <= store < 1.1 * size
        assert grown < 0.1 * size


def test_who_asks_for_a_number_at_once_hears_too_that_no_node_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting, told = [2], []
    monkeypatch.setattr(cluster, "RECOUNT_S", 0.0)
    monkeypatch.setattr(cluster, "_num_fitting", lambda resources: fitting[0])
    slots = cluster._counted(ResourcesConfig(concurrency=5), True, told.append)
    assert [slots(), slots()] == [5, 5]
    fitting[0] = 0
    assert [slots(), slots(), slots()] == [5, 5, 5]  # trials that wait tell an autoscaler what is wanted
    assert told == ["waiting: no node that could hold a trial is left; the search goes on when one is back"]
    fitting[0] = 2
    assert slots() == 5
    assert told[1:] == ["nodes are back: 2 trials at once"]
