"""How many trials fit on which nodes, and which clusters are refused. No Ray runs."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from search import cluster
from search.cluster import ResourcesError, connected
from search.config import ResourcesConfig
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
    assert cluster._fits(node, ResourcesConfig(cpu=cpu, gpu=gpu)) == fits


def test_a_node_without_cpus_holds_nothing() -> None:
    assert cluster._fits({"memory": 1e9}, ResourcesConfig()) == 0


class FakeRay:
    """Takes the place of ray.init and its kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]) -> None:
        self.calls: list[dict[str, Any]] = []
        self.is_up = False
        self.error: Exception | None = None
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", self.shutdown)
        monkeypatch.setattr(ray, "nodes", lambda: nodes)

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
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "read_ray_address", lambda: None)
    monkeypatch.setattr(cluster, "_ENVIRONMENT", {})


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of somebody who answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def nobody() -> str:
    """An address where nobody answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.usefixtures("alone")
def test_slots_are_counted_over_living_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2), node(4, 2), node(64, 8, alive=False)])
    with connected(ResourcesConfig(), 1000) as found:
        assert found.slots == 6
        assert fake.is_up
    assert not fake.is_up
    with connected(ResourcesConfig(cpu=1, gpu=0.5), 1000) as found:
        assert found.slots == 4
    with connected(ResourcesConfig(concurrency=3), 1000) as found:
        assert found.slots == 3
    with connected(ResourcesConfig(concurrency=99), 1000) as found:
        assert found.slots == 6


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


@pytest.mark.usefixtures("alone")
def test_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ResourcesError, match="RAY_ADDRESS is ray://head:10001; Ray Client cannot run a search"):
        connected(ResourcesConfig(), 1000).__enter__()
    assert fake.calls == []


@pytest.mark.usefixtures("alone")
def test_a_given_cluster_that_does_not_answer_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    address = nobody()
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(ResourcesError, match=f"no Ray cluster answers at RAY_ADDRESS={address}; start it, or unset"):
        connected(ResourcesConfig(), 1000).__enter__()
    assert time.monotonic() - started < cluster.CONNECT_S + 1
    assert fake.calls == []


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("address", ["auto", None])
def test_a_given_cluster_is_used(address: str | None, listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    address = address or listener
    monkeypatch.setenv("RAY_ADDRESS", address)
    with connected(ResourcesConfig(), 1000) as found:
        assert found.description == f"Ray cluster at {address}"
    assert [call["address"] for call in fake.calls] == [address]
    assert "object_store_memory" not in fake.calls[0]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [ConnectionError("no\nway"), RuntimeError("versions differ"), ValueError("bad")])
def test_what_ray_says_of_a_given_cluster_is_told_in_one_line(
    error: Exception, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRay(monkeypatch, []).error = error
    monkeypatch.setenv("RAY_ADDRESS", listener)
    with pytest.raises(ResourcesError) as caught:
        connected(ResourcesConfig(), 1000).__enter__()
    assert " ".join(str(error).split()) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("alone")
def test_a_cluster_of_ray_start_is_used_while_it_answers(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, [node(2)])
    monkeypatch.setattr(cluster, "read_ray_address", lambda: listener)
    with connected(ResourcesConfig(), 1000) as found:
        assert found.description == "the Ray cluster on this machine"
    monkeypatch.setattr(cluster, "read_ray_address", nobody)  # its address was left behind
    with connected(ResourcesConfig(), 1000) as found:
        assert found.description == "this machine"
    assert [call["address"] for call in fake.calls] == [listener, "local"]


@pytest.mark.usefixtures("alone")
def test_another_searchs_ray_is_never_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` would join any Ray on the machine, and go down with it."""
    fake = FakeRay(monkeypatch, [node(2)])
    with connected(ResourcesConfig(), 10**9):
        pass
    (call,) = fake.calls
    assert call["address"] == "local"
    assert call["include_dashboard"] is False
    assert call["object_store_memory"] > 10**9
