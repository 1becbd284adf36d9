"""What the command lines share: exit codes, an error in one line, SIGTERM unwound like Ctrl-C, the device."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

OK, BAD_INPUT, NOT_FINITE, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143


class Terminated(BaseException):
    """SIGTERM, unwound like Ctrl-C."""


class UsageError(ValueError):
    """The arguments of a command are not what it reads."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of printing the usage, so that a mistake is told in one line like any other."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def place(text: str) -> str:
    """The argument type of a path; an empty one would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; expected a path")
    return text


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


def failed(error: OSError, command: str) -> int:
    """Print in one line what the system refused, and the command that goes on; returns the exit code."""
    where = f"{error.filename}: " if error.filename else ""
    reason = " ".join((error.strerror or str(error)).split())
    print(f"error: {where}{reason}; once that is mended, go on with: {command}", file=sys.stderr)
    return BAD_INPUT


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
