"""Ray: the cluster that is there, or one on this machine for the time of the search."""

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

# Not address="auto": that joins any Ray on this machine, such as another search's, and dies with it.
from ray._private.utils import read_ray_address

from search.config import ResourcesConfig
from search.errors import UserError

# Room in the object store beside the images: Ray's own minimum is 75 MiB.
_OBJECT_STORE_SPARE = 256 * 2**20
# How long a cluster may take to answer at all.
CONNECT_S = 5.0

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray announces that a future version will leave CUDA_VISIBLE_DEVICES alone for trials without a GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # idle processes, one for each core, that no trial would use
    "RAY_AIR_NEW_OUTPUT": "0",  # the search has its own table
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # and its own journals
}


class ResourcesError(UserError):
    """The trials ask for more than the cluster has."""


@dataclass(frozen=True)
class Cluster:
    """Where trials run."""

    slots: int  # trials at once
    description: str


@contextmanager
def connected(resources: ResourcesConfig, data_bytes: int) -> Iterator[Cluster]:
    """Ray for the time of the context: RAY_ADDRESS, else what `ray start` left running here, else a new local one.

    Raises:
        ResourcesError: no node can hold one trial, or the address is of an unsupported kind.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    where = _init(data_bytes)
    try:
        if resources.concurrency == "auto":
            slots = _slots(resources)
        else:
            # A cluster may start nodes once trials wait for them; on this machine there is only what there is.
            slots = resources.concurrency if where.startswith("Ray") else min(resources.concurrency, _slots(resources))
        yield Cluster(slots, where)
    finally:
        ray.shutdown()


def _init(data_bytes: int) -> str:
    address = os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        if address.startswith("ray://"):
            raise ResourcesError(
                f"RAY_ADDRESS is {address}; Ray Client cannot run a search: run it on the head, or use ray job submit"
            )
        unanswered = f"no Ray cluster answers at RAY_ADDRESS={address}"
        advice = "start it, or unset RAY_ADDRESS to run on this machine"
        if not _answers(address):
            raise ResourcesError(f"{unanswered}; {advice}")
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ResourcesError(f"{unanswered} ({' '.join(str(error).split())}); {advice}") from error
        return f"Ray cluster at {address}"
    started = read_ray_address()
    if started and _answers(started):  # else that cluster is gone and left its address behind
        ray.init(address=started, **options)
        return "the Ray cluster on this machine"
    store = 2 * data_bytes + _OBJECT_STORE_SPARE
    ray.init(address="local", include_dashboard=False, object_store_memory=store, **options)
    return "this machine"


def _answers(address: str) -> bool:
    """Whether anybody listens there, since Ray itself would try for minutes; True for an address without a port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            return True
    except OSError:
        return False


def _slots(resources: ResourcesConfig) -> int:
    """How many trials fit on the nodes that are there."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(_fits(node, resources) for node in nodes)
    if slots == 0:
        most_cpu = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        most_gpu = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        raise ResourcesError(
            f"a trial asks for {resources.cpu:g} CPUs and {resources.gpu:g} GPUs, but no node has as many: the largest "
            f"has {most_cpu:g} CPUs and {most_gpu:g} GPUs; lower resources.cpu or resources.gpu "
            "(--set resources.gpu=0); on a cluster that starts nodes when they are needed, set "
            "resources.concurrency to the trials wanted at once"
        )
    return slots


def _fits(node: dict[str, float], resources: ResourcesConfig) -> int:
    by_cpu = math.floor(node.get("CPU", 0.0) / resources.cpu + 1e-9)
    if resources.gpu == 0:
        return by_cpu
    gpus = node.get("GPU", 0.0)
    # A trial with a fraction of a GPU lies on one GPU: 0.4 packs two trials a GPU, not 2.5.
    by_gpu = gpus * math.floor(1 / resources.gpu + 1e-9) if resources.gpu <= 1 else gpus // resources.gpu
    return min(by_cpu, math.floor(by_gpu))
