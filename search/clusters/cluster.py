"""Ray: the cluster that is there, or one on this machine for the time of the search."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import ray

from search.clusters.addresses import Address, ClusterError, cluster_address
from search.clusters.local_ray import kept_private
from search.clusters.shipping import workers_env
from search.config import ResourcesConfig

# Room in the object store beside the images: Ray's own minimum is 75 MiB.
_OBJECT_STORE_SPARE = 256 * 2**20
# How often a cluster's nodes are counted anew.
RECOUNT_S = 10.0

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray announces that a future version will leave CUDA_VISIBLE_DEVICES alone for trials without a GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # idle processes, one for each core, that no trial would use
    "RAY_AIR_NEW_OUTPUT": "0",  # the search has its own table
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # and its own journals
    # and its own words for a cluster without nodes
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "inf",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER": "inf",
}


class ResourcesError(ClusterError):
    """The trials ask for more than the cluster has."""


@dataclass(frozen=True)
class Cluster:
    """Where trials run."""

    slots: Callable[[], int]  # trials at once, now
    description: str
    is_shared: bool  # it was there before this search, and may have other nodes than this machine


@contextmanager
def connected(
    resources: ResourcesConfig,
    data_bytes: int,
    address: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Cluster]:
    """Ray for the time of the context, in which SIGTERM is Ctrl-C.

    Args:
        address: as in search.clusters.addresses; None: RAY_ADDRESS, else what `ray start` left running here, else a
            new local one.
        tell: hears when no node is left, and when one is back.

    Raises:
        ResourcesError: no node can hold one trial.
        ClusterError: the cluster that was asked for cannot be used.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    description, is_shared = _init(Address.of(address), data_bytes)
    try:
        with _sigterm_as_ctrl_c():
            yield Cluster(_counted(resources, is_shared, tell), description, is_shared)
    finally:
        ray.shutdown()


def _init(asked: Address, data_bytes: int) -> tuple[str, bool]:
    """What it is called, and whether it was there before."""
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = cluster_address(asked)
    if address is None:
        store = 2 * data_bytes + _OBJECT_STORE_SPARE
        with _one_line("a Ray of this search's own cannot be started"), kept_private():
            ray.init(address="local", include_dashboard=False, object_store_memory=store, **options)
        return "this machine", False
    with _one_line(f"{asked.words or 'the Ray cluster on this machine'} cannot be joined"):
        ray.init(address=address, runtime_env=workers_env(), **options)
    return ("the Ray cluster on this machine" if asked.value in ("", "auto") else f"Ray cluster at {address}"), True


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Of many kinds: another Python or Ray, no raylet on this machine, no room for the code, no token.

    Raises:
        ClusterError: instead of Ray's.
    """
    try:
        yield
    except Exception as error:
        ray.shutdown()
        raise ClusterError(f"{what} ({' '.join(str(error).split())})") from error


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """`kill` and `ray job stop` end a search as Ctrl-C does; Ray's own handler would leave in the middle of a step."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell starts what is to run behind it with SIGINT ignored
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)  # called, not raised: a job of Ray's starts with SIGINT blocked

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _counted(resources: ResourcesConfig, is_shared: bool, tell: Callable[[str], None]) -> Callable[[], int]:
    """Trials at once: as the space file says, else as many as fit on the nodes that are there."""
    asked = resources.concurrency
    if is_shared and asked != "auto":
        counted = Slots(lambda: _num_fitting(resources), asked, tell)

        def as_asked() -> int:
            counted()  # that is told, and changes nothing: a cluster may start nodes once trials wait for them
            return asked

        return as_asked
    fitting = _slots(resources)
    if is_shared:
        return Slots(lambda: _num_fitting(resources), fitting, tell)
    slots = fitting if asked == "auto" else min(asked, fitting)  # on this machine there is only what there is
    return lambda: slots


class Slots:
    """Trials at once on a cluster whose nodes come and go.

    Never below 1: a trial that waits in Ray's queue starts on the first node that is back, and tells an autoscaler
    that one is wanted.

    Args:
        count: how many fit now.
        first: how many fitted a moment ago.
        tell: hears when none fits for longer than a count, and when it is over.
    """

    def __init__(
        self,
        count: Callable[[], int],
        first: int,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count, self._tell, self._clock = count, tell, clock
        self._slots, self._counted = first, clock()
        self._told = False

    def __call__(self) -> int:
        if self._clock() - self._counted >= RECOUNT_S:
            self._recount()
        return max(1, self._slots)

    def _recount(self) -> None:
        before = self._slots
        try:
            self._slots = self._count()
        except Exception:
            return  # a head that is away for a moment; the last count stays
        finally:
            self._counted = self._clock()
        if self._slots == before == 0 and not self._told:
            self._told = True
            self._tell("waiting: no node that could hold a trial is left; the search goes on when one is back")
        elif self._slots > 0 and self._told:
            self._told = False
            self._tell(f"nodes are back: {self._slots} trial{'' if self._slots == 1 else 's'} at once")


def _num_fitting(resources: ResourcesConfig) -> int:
    return sum(fits(node["Resources"], resources) for node in ray.nodes() if node["Alive"])


def _slots(resources: ResourcesConfig) -> int:
    """How many trials fit on the nodes that are there."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(fits(node, resources) for node in nodes)
    if slots == 0:
        most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in _asked(resources)}
        raise ResourcesError(
            f"a trial asks for {asked_words(resources)}, but no node has as many: the largest has "
            f"{_in_words(most)}; lower {_fields(resources)} (--set resources.gpu=0); on a cluster that starts nodes "
            "when they are needed, set resources.concurrency to the trials wanted at once"
        )
    return slots


def _asked(resources: ResourcesConfig) -> dict[str, float]:
    """Under Ray's names; CPUs and GPUs always."""
    memory = {} if resources.memory_gb is None else {"memory": resources.memory_gb * 2**30}
    return {"CPU": resources.cpu, "GPU": resources.gpu} | memory | resources.custom


def asked_words(resources: ResourcesConfig) -> str:
    """What a trial asks for."""
    return _in_words(_asked(resources))


def _fields(resources: ResourcesConfig) -> str:
    """What a space file says of them."""
    more = {"memory_gb": resources.memory_gb is not None, "custom": bool(resources.custom)}
    return " or ".join(f"resources.{name}" for name in ("cpu", "gpu", *(name for name in more if more[name])))


def _in_words(amounts: dict[str, float]) -> str:
    words = {"CPU": "{:g} CPUs", "GPU": "{:g} GPUs", "memory": "{:.3g} GiB of memory"}
    scale = {"memory": 2**30}
    told = [words.get(name, "{:g} " + name).format(value / scale.get(name, 1)) for name, value in amounts.items()]
    return " and ".join([", ".join(told[:-1]), told[-1]])


def fits(node: dict[str, float], resources: ResourcesConfig) -> int:
    """Trials at once on a node, by what Ray counts of it."""
    others = {name: amount for name, amount in _asked(resources).items() if name != "GPU"}
    by_others = min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in others.items())
    if resources.gpu == 0:
        return by_others
    gpus = node.get("GPU", 0.0)
    # A trial with a fraction of a GPU lies on one GPU: 0.4 packs two trials a GPU, not 2.5.
    by_gpu = gpus * math.floor(1 / resources.gpu + 1e-9) if resources.gpu <= 1 else gpus // resources.gpu
    return min(by_others, math.floor(by_gpu))
