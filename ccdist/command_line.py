"""What the command lines share: exit codes, an error in one line, SIGTERM unwound like Ctrl-C, the device."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OK, BAD_INPUT, NOT_FINITE, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143


class Terminated(BaseException):
    """SIGTERM, unwound like Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refused(error: ValueError | ArithmeticError, code: int) -> int:
    """Print what is wrong in one line; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def stopped(stop: BaseException, command: str) -> int:
    """Print the command that goes on; returns the exit code."""
    print(f"stopped; go on with: {command}", file=sys.stderr)
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def chosen_device(name: str, threads: int | None) -> torch.device:
    """The device of --device, after --threads.

    Args:
        name: auto (a GPU if there is one), cpu or cuda.
        threads: of the CPU; None: PyTorch's own number.

    Raises:
        ValueError: there is no such device or number.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads {threads}; expected at least 1")
        torch.set_num_threads(threads)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no GPU here; use --device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
