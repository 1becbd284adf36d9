"""What a process takes of its machine: memory at its peak, processor time, and what GPUs say of themselves."""

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC = Path("/proc")
# Control groups, by which containers, Slurm and systemd limit memory.
_GROUPS = Path("/sys/fs/cgroup")
_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used,utilization.gpu", "--format=csv,noheader,nounits")
_SMI_TIMEOUT_S = 10
_MIB = 2**20


@dataclass(frozen=True)
class HostMemory:
    """Bytes of this machine, or of the tightest of the control groups around this process, whichever is less."""

    total: int
    free: int  # what processes can still take, caches of files given up


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it, whoever uses it."""

    name: str
    memory: int  # bytes
    used: int
    busy: float  # share of the last sample in which it computed; says nothing of how much of it was busy


@dataclass
class Usage:
    """What this process took while something ran; filled at its end.

    device_bytes: what PyTorch held of the GPU at most, and what CUDA itself holds there; 0 on a processor.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    host_bytes: int = 0
    device_bytes: int = 0

    @property
    def cores(self) -> float:
        """Cores that were busy, in the mean."""
        return self.cpu_seconds / self.seconds if self.seconds else 0.0


@contextmanager
def used(device: torch.device) -> Iterator[Usage]:
    """Measure what this process takes inside; peaks begin at what it holds already."""
    usage = Usage()
    reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, processor = time.perf_counter(), time.process_time()
    try:
        yield usage
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        usage.seconds = time.perf_counter() - started
        usage.cpu_seconds = time.process_time() - processor
        usage.host_bytes = peak_memory()
        usage.device_bytes = _device_peak(device)


def reset_peak_memory() -> None:
    """Let the peak of this process begin now; nothing happens where the system cannot."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Bytes of physical memory that this process held at most since the last reset, libraries included."""
    return _field(_PROC / "self" / "status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_memory() -> HostMemory:
    """What the machine has, and what is free."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = _field(_PROC / "meminfo", "MemTotal") or os.sysconf("SC_PHYS_PAGES") * page
    free = _field(_PROC / "meminfo", "MemAvailable") or os.sysconf("SC_AVPHYS_PAGES") * page
    for limit, held in _limits():
        total, free = min(total, limit), min(free, limit - held)
    return HostMemory(total, max(0, free))


def _limits() -> Iterator[tuple[int, int]]:
    """What the control groups around this process may hold, and what they do; without caches of files, which the
    system gives up before it kills anybody. Of both versions; a group that a container does not see says nothing."""
    for line in _lines(_PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = Path(path.lstrip("/"))
        for group in (root / each for each in (own, *own.parents)):
            if (limit := _number(group / names[0])) is not None:
                caches = [int(told.split()[1]) for told in _lines(group / "memory.stat") if told.startswith(names[2])]
                yield limit, max(0, (_number(group / names[1]) or 0) - sum(caches))


def gpus(ids: str | None = None) -> list[Gpu]:
    """The GPUs of this machine; none where nvidia-smi is missing or fails. Starts no CUDA in this process.

    Args:
        ids: which, as CUDA_VISIBLE_DEVICES names them; None: all.
    """
    command = _SMI if ids is None else (*_SMI, f"--id={ids}")
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [gpu for line in told.splitlines() if (gpu := _gpu(line)) is not None]


def _gpu(line: str) -> Gpu | None:
    name, *numbers = (field.strip() for field in line.rsplit(",", 3))
    try:
        total, held, busy = (float(number) for number in numbers)
    except ValueError:  # [N/A]: a slice of a GPU tells no utilisation
        return None
    return Gpu(name, round(total * _MIB), round(held * _MIB), busy / 100)


def _device_peak(device: torch.device) -> int:
    """With CUDA's own context, as far as the device is this process's alone; with neighbours it counts theirs too."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    beside = max(0, total - free - torch.cuda.memory_reserved(device))
    return int(torch.cuda.max_memory_reserved(device) + beside)


def _field(file: Path, name: str) -> int | None:
    """Bytes of a field in kilobytes of a file of /proc; None where there is none."""
    found = [line.split()[1] for line in _lines(file) if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
