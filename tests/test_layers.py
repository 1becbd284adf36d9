"""The direction of imports: search -> ccdist, search -> tracking, and each framework behind one folder."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"ray": "search", "optuna": "search", "mlflow": "tracking"}  # each in this folder only
PACKAGES = ("ccdist", "search", "tracking")
MAY_IMPORT = {"search": {"search", "ccdist", "tracking"}, "ccdist": {"ccdist"}, "tracking": {"tracking"}}
EXEMPT = ("tests", "benchmarks")  # they exercise every layer
NOT_SOURCE = ("build", "dist", "runs", "data", "mlruns")


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute module name of every import, wherever in the file and however spelled."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module is not None:  # relative imports cannot leave their package
                yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        folder = path.relative_to(root).parts[0]  # the file's own name at the root
        if folder.startswith(".") or folder in (*NOT_SOURCE, *EXEMPT):
            continue
        for line, module in imported_modules(path.read_text(encoding="utf-8")):
            name = module.partition(".")[0]
            home = FRAMEWORKS.get(name)
            wrong_way = name in PACKAGES and name not in MAY_IMPORT.get(folder, {"ccdist", "tracking"})
            if wrong_way or (home is not None and home != folder):
                found.append(f"{path.relative_to(root).as_posix()}:{line}: {folder} imports {module}")
    return found


def test_imports_keep_their_direction() -> None:
    assert violations(ROOT) == []


def test_all_packages_are_walked() -> None:
    assert [name for name in PACKAGES if not list((ROOT / name).rglob("*.py"))] == []


def modules_of(package: str) -> dict[str, str]:
    """Name of each module of a package, and the folder below it that holds the module."""
    files = [path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py")]
    return {path.stem: path.parent.as_posix() for path in files if path.stem != "__init__"}


def places_told(page: str) -> dict[str, str]:
    """Name of each module in the page's tables, and the folder of its row; an empty cell repeats the one above."""
    told, folder = {}, "."
    for line in page.splitlines():
        match [cell.strip() for cell in line.strip("|").split("|")]:
            case [files, _]:
                told.update(dict.fromkeys(re.findall(r"`(\w+)`", files), "."))
            case [first, _, files]:
                folder = first.strip("`") or folder
                told.update(dict.fromkeys(re.findall(r"`(\w+)`", files), folder))
    return told


@pytest.mark.parametrize("package", ["search", "tracking"])
def test_the_page_of_the_architecture_says_where_each_module_is(package: str) -> None:
    told = places_told((ROOT / "docs" / "ARCHITECTURE.md").read_text())
    assert {name: told.get(name) for name in modules_of(package)} == modules_of(package)


def test_every_folder_of_modules_is_shipped() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} <= set(find_packages(str(ROOT), include=include))


@pytest.mark.parametrize(
    ("path", "source", "line"),
    [
        ("ccdist/bounds.py", "import torch\nimport ray\n", 2),
        ("ccdist/bounds.py", "from optuna.trial import Trial\n", 1),
        ("ccdist/deep/er.py", "def f():\n    import mlflow.pytorch\n", 2),
        ("ccdist/bounds.py", "from search import pareto\n", 1),
        ("ccdist/bounds.py", "from tracking.tracker import Tracker\n", 1),
        ("ccdist/bounds.py", "import importlib\nimportlib.import_module('ray.tune')\n", 2),
        ("ccdist/bounds.py", "x = __import__('search')\n", 1),
        ("tracking/tracker.py", "import ccdist.config as config\n", 1),
        ("tracking/tracker.py", "import os, search.studies.records\n", 1),
        ("tracking/tracker.py", "if True:\n    from ray import tune\n", 2),
        ("tracking/tracker.py", "import optuna\n", 1),
        ("search/run.py", "try:\n    import mlflow\nexcept ImportError:\n    pass\n", 2),
        ("spaces/__init__.py", "import search\n", 1),
        ("setup.py", "import search.run\n", 1),
        ("docs/conf.py", "import ray\n", 1),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, path: str, source: str, line: int) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ccdist/bounds.py", "import torch\nfrom . import search\nfrom ccdist.interval import Interval\n"),
        ("ccdist/bounds.py", "import raytracer, optunahub\n"),
        ("search/run.py", "import ray.tune, optuna, ccdist.config\nfrom tracking.tracker import Tracker\n"),
        ("tracking/mlflow_tracker.py", "from mlflow import MlflowClient\n"),
        ("tests/test_run.py", "import mlflow, ray, optuna, search\n"),
        ("benchmarks/search.py", "import search.simulation.simulator\n"),
        (".venv/lib/ray.py", "import ray\n"),
    ],
)
def test_allowed_imports_are_not_reported(tmp_path: Path, path: str, source: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    assert violations(tmp_path) == []
