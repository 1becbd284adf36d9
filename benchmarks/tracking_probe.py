"""Stopwatches inside a search that knows nothing of them: how long journals, steps and the driver's loop take.

`environment(folder)` makes every Python process of a search import this module at its start, by a `sitecustomize` in
its path. It waits for the modules that it is to time, then wraps one function in each. Only standard modules are
imported here: Ray starts many processes.

A line of `folder/NAME-PID` is a moment of the monotonic clock, which all processes of a machine share, and seconds.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "TRACKING_PROBE_FOLDER"
JOURNAL, TRAINING, STEP, LOOP = "journal", "training", "step", "loop"
_PLACES = {  # module -> class and method, and under what name
    "tracking.journal": (("Journal", "write", JOURNAL),),
    "ccdist.training_loop": (("Run", "fit", TRAINING), ("Run", "_batch", STEP)),
    "ray.tune.execution.tune_controller": (("TuneController", "step", LOOP),),
}


@dataclass(frozen=True)
class Call:
    """One call: when it began, by a clock of the whole machine, and how long it took."""

    process: int
    at: float
    seconds: float


def environment(folder: Path, root: Path) -> dict[str, str]:
    """The variables of a search that is to be timed; what is measured is written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text("import benchmarks.tracking_probe as probe\n\nprobe.install()\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{root}", FOLDER: str(folder)}


def calls(folder: Path, name: str) -> list[Call]:
    """What was measured, in the order of time."""
    found = []
    for path in folder.glob(f"{name}-*"):
        process = int(path.name.rpartition("-")[2])
        lines = path.read_text().splitlines()
        found += [Call(process, *(float(part) for part in line.split())) for line in lines]
    return sorted(found, key=lambda call: call.at)


def gaps(found: list[Call], within: list[Call] | None = None) -> list[float]:
    """The seconds from one call to the next of the same process, where both lie in the same one of `within`."""
    last: dict[tuple[int, int], float] = {}
    between = []
    for call in found:
        outer = 0 if within is None else _containing(call, within)
        if outer is None:
            continue
        if (call.process, outer) in last:
            between.append(call.at - last[call.process, outer])
        last[call.process, outer] = call.at
    return between


def _containing(call: Call, within: list[Call]) -> int | None:
    for index, outer in enumerate(within):
        if outer.process == call.process and outer.at <= call.at <= outer.at + outer.seconds:
            return index
    return None


def install() -> None:
    """Time what is imported from now on; without the variable, nothing."""
    if FOLDER in os.environ:
        sys.meta_path.insert(0, _Finder(Path(os.environ[FOLDER])))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left = dict(_PLACES)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._left:
            return None
        wanted = self._left.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader, folder = spec.loader, self._folder
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for owner, method, label in wanted:
                _wrap(getattr(module, owner), method, _Stopwatch(folder, label))

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Stopwatch:
    def __init__(self, folder: Path, label: str) -> None:
        self._folder, self._label = folder, label
        self._file: Any = None

    def note(self, at: float, seconds: float) -> None:
        if self._file is None:
            self._file = (self._folder / f"{self._label}-{os.getpid()}").open("a", buffering=1)
        self._file.write(f"{at:.6f} {seconds:.6f}\n")


def _wrap(owner: type, name: str, watch: _Stopwatch) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return original(*args, **kwargs)
        finally:
            watch.note(start, time.monotonic() - start)

    setattr(owner, name, timed)
