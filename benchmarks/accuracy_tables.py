"""Accuracies of the losses, precisions, teachers, activations and l_2 methods on small networks, as Markdown tables.

python -m benchmarks.accuracy_tables --data DIR --out runs/tables [--only NAME ...] [--processes 2]

DIR holds mnist and cifar10 as Parquet. Each network is trained with three seeds. The alpha of a method is picked by
`score` on validation images, from the grid of its setting and with seed 0, the same number of tries for every method;
the tables are then measured on the first test images in file order. Every job leaves a JSON file and is not done twice;
a training that was stopped goes on from its state file.
"""

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ccdist import checkpoint, locks
from ccdist.config import (
    AttackConfig,
    Config,
    DataConfig,
    NetworkConfig,
    PrecisionConfig,
    StudentConfig,
    TeacherConfig,
    ThreatModel,
    VerifyConfig,
    fingerprint,
)
from ccdist.data import DATA_DIR_VARIABLE, Dataset, load_dataset, load_test_set, to_pixels
from ccdist.lipschitz import LipschitzConfig, is_certified, train_lipschitz
from ccdist.loss_config import ADCertConfig, CCDistConfig, CCIBPConfig, LossConfig, MTLIBPConfig
from ccdist.networks import Network
from ccdist.training import train_student, train_teacher
from ccdist.verification import Verdict, accuracies, verify

SEEDS = (0, 1, 2)
TUNING_SEED = 0
# Two networks from one stream of random numbers would begin alike, so a teacher has seeds of its own.
TEACHER_SEED_OFFSET = 1000
BETA = 5.0
# Explicit, since `auto` is another arithmetic on another machine.
FLOAT32 = PrecisionConfig(attack="float32", teacher="float32", training="float32")

METHODS: dict[str, Callable[[float], LossConfig]] = {
    "CC-Dist": lambda alpha: CCDistConfig(alpha=alpha, beta=BETA),
    "CC-IBP": lambda alpha: CCIBPConfig(alpha=alpha),
    "MTL-IBP": lambda alpha: MTLIBPConfig(alpha=alpha),
    "AD-CERT": lambda alpha: ADCertConfig(alpha=alpha),
}
LIPSCHITZ = "1-Lipschitz"


def score(accuracies: Mapping[str, float]) -> float:
    """What decides between the values of a grid: both aims of certified training, weighted alike."""
    return accuracies["standard"] + accuracies["certified"]


# ------------------------------------------------------------------------------------------------ what is compared


class Setting(Config):
    """A threat and the budget that every method of it has in common."""

    title: str
    data: DataConfig
    threat: ThreatModel
    network: NetworkConfig
    teacher: dict[str, Any]  # fields of TeacherConfig
    student: dict[str, Any]  # fields of StudentConfig
    alphas: tuple[float, ...]  # the grid of every method
    attack: AttackConfig = AttackConfig(steps=40, step_size=0.035)  # of the verification
    num_images: int = 1000  # measured on; of the validation part and of the test set alike
    lipschitz: dict[str, Any] = Field(default_factory=dict)  # fields of LipschitzConfig
    offsets: tuple[float, ...] = ()  # the grid of the 1-Lipschitz network


@dataclass(frozen=True)
class Row:
    """One line of a table: a method in a setting, and what differs from the setting's own budget."""

    label: str
    setting: str
    method: str = "CC-Dist"  # of METHODS, or LIPSCHITZ
    alpha_of: str | None = None  # the method whose alpha is used; None: its own
    network: Mapping[str, Any] = field(default_factory=dict)  # of teacher and student
    teacher: Mapping[str, Any] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows, and which of them are compared seed by seed: (what it shows, row, minus row)."""

    title: str
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str, str], ...] = ()


def _multi_step(initial: float) -> dict[str, Any]:
    return {"kind": "multi_step", "initial": initial, "decay": 0.2, "drops": (0.5, 0.8)}


_MNIST_STUDENT: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 128,
    "epsilon_schedule": {"warm_up": 0, "ramp": "1/2"},
    "attack": {"steps": 1, "step_size": 10, "keep": "last"},  # one step to a corner of the box
    "learning_rate": _multi_step(0.01),
    "l1": 2e-6,
}
_MNIST: dict[str, Any] = {
    "data": DataConfig(name="mnist", train_images=5000, validation_images=1000),
    "network": NetworkConfig(name="cnn3", width=8),
    "teacher": {
        "epochs": 10,
        "batch_size": 128,
        "learning_rate": {"kind": "cyclic", "peak": 0.02},
        "attack": {"steps": 5, "step_size": 0.5},
    },
    "student": _MNIST_STUDENT,
}
SETTINGS: dict[str, Setting] = {
    "mnist_0.1": Setting(
        title="MNIST, l_inf 0.1", threat=ThreatModel(epsilon="0.1"), alphas=(0.05, 0.2, 0.8), **_MNIST
    ),
    "mnist_0.3": Setting(title="MNIST, l_inf 0.3", threat=ThreatModel(epsilon="0.3"), alphas=(0.1, 0.3, 0.9), **_MNIST),
    "cifar_2_255": Setting(
        title="CIFAR-10-JPEG, l_inf 2/255",
        data=DataConfig(name="cifar10", train_images=5000, validation_images=1000, flip=True, crop_padding=2),
        threat=ThreatModel(epsilon="2/255"),
        network=NetworkConfig(name="cnn5", width=8),
        teacher=_MNIST["teacher"] | {"epochs": 8, "attack": {"steps": 3, "step_size": 0.6}},
        student=_MNIST_STUDENT
        | {
            "epochs": 10,
            "attack": {"steps": 1, "step_size": 10, "keep": "last", "kappa": 2.0},
            "learning_rate": _multi_step(0.005),
        },
        alphas=(0.01, 0.05, 0.25),
    ),
    "mnist_l2": Setting(
        title="MNIST, l_2 1.0",
        threat=ThreatModel(norm="l2", epsilon="1"),
        alphas=(0.1, 0.3, 0.9),
        attack=AttackConfig(steps=40, step_size=0.1),
        lipschitz={"width": 256, "depth": 2, "epochs": 16, "batch_size": 128},
        offsets=(0.5, 1.0, 2.0),
        **_MNIST | {"student": _MNIST_STUDENT | {"attack": {"steps": 2, "step_size": 0.7}}},
    ),
}


def _methods_table(setting: str) -> Table:
    rows = [Row(method, setting, method) for method in METHODS]
    rows.append(Row("CC-IBP, alpha of CC-Dist", setting, "CC-IBP", alpha_of="CC-Dist"))
    pairs = (
        ("distillation: CC-Dist - CC-IBP", "CC-Dist", "CC-IBP"),
        ("distillation at one alpha: CC-Dist - CC-IBP", "CC-Dist", "CC-IBP, alpha of CC-Dist"),
        ("features or logits: CC-Dist - AD-CERT", "CC-Dist", "AD-CERT"),
        ("CC-IBP - MTL-IBP", "CC-IBP", "MTL-IBP"),
    )
    return Table(f"Methods: {SETTINGS[setting].title}", tuple(rows), pairs)


def _precision_table(setting: str) -> Table:
    lower = ("attack", "teacher", "training")
    rows = (
        Row("float32 throughout", setting),
        *(Row(f"{part} bfloat16", setting, precision={part: "bfloat16"}) for part in lower),
    )
    pairs = tuple((f"{part} bfloat16 - float32", f"{part} bfloat16", "float32 throughout") for part in lower)
    return Table(f"Precision of CC-Dist's training: {SETTINGS[setting].title}", rows, pairs)


TABLES: dict[str, Table] = {
    **{f"methods_{setting}": _methods_table(setting) for setting in ("mnist_0.1", "mnist_0.3", "cifar_2_255")},
    **{f"precision_{setting}": _precision_table(setting) for setting in ("mnist_0.1", "cifar_2_255")},
    "teachers": Table(
        "Teachers of CC-Dist: MNIST, l_inf 0.1",
        (
            Row("PGD teacher", "mnist_0.1"),
            Row("N-FGSM teacher", "mnist_0.1", teacher={"attack": {"kind": "n_fgsm"}}),
            Row("clean teacher", "mnist_0.1", teacher={"attack": {"kind": "none"}}),
            Row("no teacher (CC-IBP, alpha of CC-Dist)", "mnist_0.1", "CC-IBP", alpha_of="CC-Dist"),
        ),
        (
            ("N-FGSM - PGD teacher", "N-FGSM teacher", "PGD teacher"),
            ("clean - PGD teacher", "clean teacher", "PGD teacher"),
            ("clean teacher - no teacher", "clean teacher", "no teacher (CC-IBP, alpha of CC-Dist)"),
        ),
    ),
    "activations": Table(
        "Activations under CC-Dist: MNIST, l_inf 0.1",
        (
            Row("relu", "mnist_0.1"),
            Row("leaky_relu", "mnist_0.1", network={"activation": "leaky_relu"}),
            Row("tanh", "mnist_0.1", network={"activation": "tanh"}),
        ),
        (("leaky_relu - relu", "leaky_relu", "relu"), ("tanh - relu", "tanh", "relu")),
    ),
    "l2": Table(
        "Euclidean ball: MNIST, l_2 1.0",
        (
            Row("CC-Dist", "mnist_l2"),
            Row("CC-IBP", "mnist_l2", "CC-IBP"),
            Row("CC-IBP, alpha of CC-Dist", "mnist_l2", "CC-IBP", alpha_of="CC-Dist"),
            Row(LIPSCHITZ, "mnist_l2", LIPSCHITZ),
        ),
        (
            ("distillation: CC-Dist - CC-IBP", "CC-Dist", "CC-IBP"),
            ("distillation at one alpha: CC-Dist - CC-IBP", "CC-Dist", "CC-IBP, alpha of CC-Dist"),
            ("CC-Dist - 1-Lipschitz", "CC-Dist", LIPSCHITZ),
        ),
    ),
}


# ------------------------------------------------------------------------------------------------ one job


class Job(Config):
    """One network, and the images that it is measured on. Its results are stored under the hash of these values."""

    data: DataConfig
    threat: ThreatModel
    teacher: TeacherConfig | None  # None where the student reads none
    student: StudentConfig | LipschitzConfig | None  # None: the teacher is what is measured
    part: Literal["validation", "test"]
    num_images: int
    attack: AttackConfig

    @property
    def id(self) -> str:
        return fingerprint(self)

    @property
    def network_id(self) -> str:
        """The same for a network that is measured on validation and on test images: it is trained once."""
        return fingerprint(self.model_dump(mode="json", include={"data", "threat", "teacher", "student"}))

    @property
    def of_teacher(self) -> "Job":
        """Training and measuring the teacher that this job's student reads."""
        return self.model_copy(update={"student": None, "part": "test"})

    @property
    def seed(self) -> int:
        return (self.student or self.teacher).seed  # type: ignore[union-attr]

    def describe(self) -> str:
        trained = self.student or self.teacher
        loss = getattr(trained, "loss", None)
        what = type(trained).__name__.removesuffix("Config") if loss is None else f"{loss.kind} alpha {loss.alpha}"
        return f"{self.data.name} {self.threat} {what} seed {self.seed} on {self.part}"


def finish(job: Job, out: Path) -> dict[str, Any]:
    """Train unless the network is there, measure, and leave the result where the next call finds it."""
    network, train_seconds = _trained(job, out)
    images, labels = _measured_images(job)
    started = time.perf_counter()
    measured = _measure(network, job, images, labels)
    result = {
        "job": job.model_dump(mode="json"),
        "seed": job.seed,
        "train_seconds": train_seconds,
        "verification_seconds": time.perf_counter() - started,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "versions": _versions(),
        **measured,
    }
    _write(_result_path(out, job), json.dumps(result, indent=1))
    return result


def _trained(job: Job, out: Path) -> tuple[Network, float]:
    if isinstance(job.student, LipschitzConfig):  # seconds of training, and its MaxMin has no stored form
        result = train_lipschitz(_dataset(job.data), job.threat, job.student)
        return result.network, result.seconds
    folder = out / "networks" / job.network_id
    if (folder / checkpoint.NETWORK).exists():
        return checkpoint.load(folder), checkpoint.load_description(folder)["metadata"]["seconds"]
    state = folder.with_name(f"{folder.name}.state.safetensors")
    dataset = _dataset(job.data)
    if job.student is None:
        assert job.teacher is not None
        result = train_teacher(dataset, job.threat, job.teacher, state_path=state)
    else:
        teacher = None if job.teacher is None else checkpoint.load(out / "networks" / job.of_teacher.network_id)
        result = train_student(dataset, job.threat, job.student, teacher, state_path=state)
    checkpoint.save(folder, result.network, {"seconds": result.seconds})
    state.unlink()
    return result.network, result.seconds


@lru_cache(maxsize=1)
def _dataset(data: DataConfig) -> Dataset:
    return load_dataset(data)


def _measured_images(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    part = load_test_set(job.data) if job.part == "test" else _dataset(job.data).validation
    return to_pixels(part.images[: job.num_images]), part.labels[: job.num_images]


def _measure(network: Network, job: Job, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Accuracies, and how many images each rung decided ("undecided": none did)."""
    bounded = isinstance(job.student, StudentConfig)  # a teacher has hardly anything that bounds could prove
    config = VerifyConfig(
        threat=job.threat,
        attack=job.attack,
        rungs=("pgd", "ibp", "crown") if bounded else ("pgd",),
        batch_size=100,
    )
    table = verify(network, images, labels, config)
    measured = asdict(accuracies(table))
    rungs = Counter(method or "undecided" for method in table["method"].to_pylist())
    if isinstance(job.student, LipschitzConfig):
        certified = is_certified(network, images, labels, job.threat.radius)
        falsified = torch.tensor([verdict == Verdict.FALSIFIED for verdict in table["verdict"].to_pylist()])
        assert not (certified & falsified).any(), "an image is certified and falsified at once"
        proved = int(certified.sum())
        measured["certified"] = proved / len(labels)
        rungs.update({"lipschitz": proved, "undecided": -proved})
    return {"accuracies": measured, "rungs": dict(rungs)}


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "-C", str(Path(checkpoint.__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "commit": commit or "unknown",
    }


def _write(path: Path, text: str) -> None:
    """All of the file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".unfinished")
    staging.write_text(text)
    os.replace(staging, path)


def _result_path(out: Path, job: Job) -> Path:
    return out / "results" / f"{job.id}.json"


def stored_result(out: Path, job: Job) -> dict[str, Any] | None:
    path = _result_path(out, job)
    return json.loads(path.read_text()) if path.exists() else None


# ------------------------------------------------------------------------------------------------ all jobs


def make_job(settings: Mapping[str, Setting], row: Row, value: float, seed: int, part: str) -> Job:
    """The job of a row. `value` is alpha, or the offset of the 1-Lipschitz network."""
    setting = settings[row.setting]
    common = {"data": setting.data, "threat": setting.threat, "num_images": setting.num_images, "part": part}
    if row.method == LIPSCHITZ:
        lipschitz = LipschitzConfig(**setting.lipschitz, offset=value, seed=seed)
        return Job(**common, teacher=None, student=lipschitz, attack=setting.attack)
    network = NetworkConfig.model_validate(setting.network.model_dump() | dict(row.network))
    student = StudentConfig(
        **setting.student,
        network=network,
        loss=METHODS[row.method](value),
        precision=PrecisionConfig.model_validate(FLOAT32.model_dump() | dict(row.precision)),
        seed=seed,
    )
    teacher = TeacherConfig.model_validate(
        setting.teacher
        | dict(row.teacher)
        | {"network": network, "precision": FLOAT32, "seed": TEACHER_SEED_OFFSET + seed}
    )
    read = teacher if student.loss.reads_teacher else None
    return Job(**common, teacher=read, student=student, attack=setting.attack)


@dataclass(frozen=True)
class Plan:
    """The jobs of some tables."""

    settings: Mapping[str, Setting]
    tables: Mapping[str, Table]

    @property
    def tuned(self) -> list[tuple[str, str]]:
        """(setting, method) pairs whose value has to be picked, in the order of the tables."""
        rows = [row for table in self.tables.values() for row in table.rows]
        return list(dict.fromkeys((row.setting, row.alpha_of or row.method) for row in rows))

    def grid(self, setting: str, method: str) -> dict[float, Job]:
        """The tries of a method on validation images."""
        values = self.settings[setting].offsets if method == LIPSCHITZ else self.settings[setting].alphas
        row = Row(method, setting, method)
        return {value: make_job(self.settings, row, value, TUNING_SEED, "validation") for value in values}

    def tuning_jobs(self) -> list[Job]:
        return _distinct(job for pair in self.tuned for job in self.grid(*pair).values())

    def picks(self, out: Path) -> dict[tuple[str, str], float]:
        """The value with the highest score; the first of equal ones. A method without any result is left out."""
        picks = {}
        for pair in self.tuned:
            results = {value: stored_result(out, job) for value, job in self.grid(*pair).items()}
            scores = {value: score(result["accuracies"]) for value, result in results.items() if result is not None}
            if scores:
                picks[pair] = max(scores, key=lambda value: scores[value])
        return picks

    def row_jobs(self, row: Row, picks: Mapping[tuple[str, str], float]) -> list[Job]:
        """A row's jobs on test images, in the order of SEEDS; none while its value is open."""
        value = picks.get((row.setting, row.alpha_of or row.method))
        return [] if value is None else [make_job(self.settings, row, value, seed, "test") for seed in SEEDS]

    def test_jobs(self, picks: Mapping[tuple[str, str], float]) -> list[Job]:
        rows = (row for table in self.tables.values() for row in table.rows)
        return _distinct(job for row in rows for job in self.row_jobs(row, picks))


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    return list({job.id: job for job in jobs}.values())


def _teachers(jobs: Iterable[Job]) -> list[Job]:
    return _distinct(job.of_teacher for job in jobs if job.teacher is not None)


def run_all(plan: Plan, out: Path, processes: int) -> int:
    """Teachers before the students that read them, picks before what depends on them. Returns the failures' number."""
    # Spawned, not forked: a fork of a process whose library threads have begun may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker) as pool:
        tuning = plan.tuning_jobs()
        failures = _run_stage("tuning teachers", _teachers(tuning), out, pool)
        failures += _run_stage("tuning", tuning, out, pool)
        final = plan.test_jobs(plan.picks(out))
        failures += _run_stage("teachers", _teachers(final), out, pool)
        return failures + _run_stage("test", final, out, pool)


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_it() -> None:
        parent.join()
        os._exit(1)  # a killed parent cannot stop its workers, which would wait for the next job for ever

    threading.Thread(target=die_with_it, daemon=True).start()


def _run_stage(name: str, jobs: Sequence[Job], out: Path, pool: ProcessPoolExecutor) -> int:
    """Do what has no result yet; a failed job costs its own cells only."""
    missing = [job for job in jobs if stored_result(out, job) is None]
    print(f"{name}: {len(jobs)} jobs, {len(jobs) - len(missing)} of them done before", file=sys.stderr, flush=True)
    futures = {pool.submit(finish, job, out): job for job in missing}
    failures = 0
    for number, future in enumerate(as_completed(futures), 1):
        text = f"{time.strftime('%H:%M:%S')} {name} {number}/{len(missing)}: {futures[future].describe()}: "
        error = future.exception()
        if error is None:
            text += _short(future.result())
        else:
            failures += 1
            text += f"failed: {type(error).__name__}: {error}"
        print(text, file=sys.stderr, flush=True)
    return failures


def _short(result: dict[str, Any]) -> str:
    values = [result["accuracies"][name] for name in ("standard", "adversarial", "certified")]
    seconds = result["train_seconds"] + result["verification_seconds"]
    return " / ".join(f"{value:.3f}" for value in values) + f" in {seconds:.0f} s"


# ------------------------------------------------------------------------------------------------ tables

COLUMNS = {"standard": "standard", "adversarial": "PGD", "certified": "certified"}
# |mean| / (spread / sqrt(n)) above which a paired difference is not 0 at the 5 % level (Student's t, two-sided).
CRITICAL_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds (n - 1 in the denominator)."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def difference(values: Sequence[float]) -> str:
    """Mean and spread of paired differences, with a star where a t-test at the 5 % level tells them from 0."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    mean = round(statistics.mean(values), 3) + 0.0  # -0.0 + 0.0 is 0.0: a rounded zero has no sign of its own
    return f"{mean:+.3f}{spread}{' *' if is_significant(values) else ''}"


def is_significant(values: Sequence[float]) -> bool:
    """Whether n paired differences differ from 0 at the 5 % level, alone and uncorrected."""
    critical = CRITICAL_T.get(len(values))
    if critical is None:
        return False
    return abs(statistics.mean(values)) > critical * statistics.stdev(values) / math.sqrt(len(values))


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Report:
    """The tables of a plan from whatever results are there."""

    plan: Plan
    out: Path

    def text(self) -> str:
        picks = self.plan.picks(self.out)
        parts = [self._grid_text(), self._teacher_text(picks)]
        for table in self.plan.tables.values():
            parts.append(f"### {table.title}\n\n{self._rows_text(table, picks)}")
            if table.pairs:
                parts[-1] += f"\n\n{self._pairs_text(table, picks)}"
        return "\n\n".join(parts)

    def _grid_text(self) -> str:
        rows = []
        for setting, method in self.plan.tuned:
            results = {value: stored_result(self.out, job) for value, job in self.plan.grid(setting, method).items()}
            pick = self.plan.picks(self.out).get((setting, method))
            cells = [_grid_cell(value, result, value == pick) for value, result in results.items()]
            rows.append([self.plan.settings[setting].title, method, *cells])
        columns = max((len(row) for row in rows), default=2) - 2
        rows = [row + [""] * (columns + 2 - len(row)) for row in rows]
        header = ["setting", "method", *(f"value {index + 1}: standard / certified" for index in range(columns))]
        return f"### Values tried on validation images (seed {TUNING_SEED}; bold: picked)\n\n{_markdown(header, rows)}"

    def _teacher_text(self, picks: Mapping[tuple[str, str], float]) -> str:
        rows: dict[str, list[str]] = {}
        for table in self.plan.tables.values():
            for row in table.rows:
                jobs = [job.of_teacher for job in self.plan.row_jobs(row, picks) if job.teacher is not None]
                if not jobs:
                    continue
                label = [self.plan.settings[row.setting].title, _teacher_name(jobs[0])]
                found = self._found(jobs)
                cells = [mean_and_spread([r["accuracies"][c] for r in found]) for c in ("standard", "adversarial")]
                rows[" ".join(label)] = [*label, *cells]
        header = ["setting", "teacher", "standard", "PGD"]
        return f"### Teachers\n\n{_markdown(header, rows.values())}"

    def _found(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        return [result for job in jobs if (result := stored_result(self.out, job)) is not None]

    def _rows_text(self, table: Table, picks: Mapping[tuple[str, str], float]) -> str:
        rows = []
        for row in table.rows:
            found = self._found(self.plan.row_jobs(row, picks))
            value = picks.get((row.setting, row.alpha_of or row.method))
            cells = [mean_and_spread([result["accuracies"][name] for result in found]) for name in COLUMNS]
            by_ibp = [result["rungs"].get("ibp", 0) / result["accuracies"]["num_images"] for result in found]
            cells.append("-" if row.method == LIPSCHITZ else mean_and_spread(by_ibp))
            rows.append([row.label, "-" if value is None else f"{value:g}", *cells, str(len(found))])
        name = "alpha (offset)" if any(row.method == LIPSCHITZ for row in table.rows) else "alpha"
        header = ["", name, *COLUMNS.values(), "of it by IBP", "n"]
        return _markdown(header, rows)

    def _pairs_text(self, table: Table, picks: Mapping[tuple[str, str], float]) -> str:
        rows = []
        by_label = {row.label: row for row in table.rows}
        for title, first, second in table.pairs:
            pairs = self._paired(by_label[first], by_label[second], picks)
            cells = [difference([one[name] - other[name] for one, other in pairs]) for name in COLUMNS]
            rows.append([title, *cells, str(len(pairs))])
        return _markdown(["difference, paired by seed", *COLUMNS.values(), "n"], rows)

    def _paired(
        self, first: Row, second: Row, picks: Mapping[tuple[str, str], float]
    ) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Accuracies of both rows for each seed that both have; none where both are the same networks."""
        one, other = self.plan.row_jobs(first, picks), self.plan.row_jobs(second, picks)
        if one == other:
            return []
        results = [(stored_result(self.out, a), stored_result(self.out, b)) for a, b in zip(one, other, strict=False)]
        return [(a["accuracies"], b["accuracies"]) for a, b in results if a is not None and b is not None]


def _grid_cell(value: float, result: dict[str, Any] | None, is_picked: bool) -> str:
    if result is None:
        return f"{value:g}: -"
    measured = result["accuracies"]
    text = f"{value:g}: {measured['standard']:.3f} / {measured['certified']:.3f}"
    return f"**{text}**" if is_picked else text


def _teacher_name(job: Job) -> str:
    assert job.teacher is not None
    return f"{job.teacher.attack.kind}, {job.teacher.network.activation}"


# ------------------------------------------------------------------------------------------------ command line


def main(
    arguments: Sequence[str] | None = None,
    settings: Mapping[str, Setting] = SETTINGS,
    tables: Mapping[str, Table] = TABLES,
) -> int:
    args = _parser(tables).parse_args(arguments)
    if args.data is not None:
        os.environ[DATA_DIR_VARIABLE] = str(Path(args.data).resolve())  # the workers inherit it
    plan = Plan(settings, {name: table for name, table in tables.items() if name in (args.only or tables)})
    out = Path(args.out)
    with locks.exclusive(out / "lock", wait=False):
        started = time.perf_counter()
        failures = run_all(plan, out, args.processes)
        print(f"{_machine()}; {time.perf_counter() - started:.0f} s in this call\n")
        print(Report(plan, out).text())
    return 1 if failures else 0


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return f"{platform.machine()}, {cores} cores; {versions}"


def _parser(tables: Mapping[str, Table]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", metavar="DIR", help=f"folder of the data sets' folders (default: {DATA_DIR_VARIABLE})"
    )
    parser.add_argument("--out", metavar="DIR", default="runs/tables", help="where networks and results go")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=list(tables), help=f"of {', '.join(tables)}")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time, one thread each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
