"""What a measurement ran on, as lines to print above it."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

from ccdist.provenance import source_commit

PACKAGES = ("torch", "ray", "optuna", "mlflow", "numpy")


def machine_lines() -> list[str]:
    """Processor, load, versions, commit and date."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    load = os.getloadavg()[0]
    return [
        f"{processor()}, {os.cpu_count()} cores, load {load:.1f}; {datetime.date.today()}; commit {source_commit()}",
        f"Python {platform.python_version()}, {versions}",
    ]


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
