"""Learning curves and verifier seconds of random configurations of a space, as Parquet files.

OMP_NUM_THREADS=1 python -m benchmarks.learning_curves --out runs/curves [--runs 48] [--seed 0]
python -m benchmarks.learning_curves --out runs/curves --collect tests/assets/search

Each configuration is trained with 1/9, 1/3 and all of its epochs, with the same seed; after each epoch it is measured
on the first validation images by interval bounds and by CROWN. The longest training's student is then verified, and
the ladder's progress kept with its seconds. A configuration leaves one JSON file and is not done twice; a kill loses
the one that it interrupts. `--collect` makes the Parquet files from however many are there:

    runs          one row for each configuration: parameters, final accuracies, seconds
    curves        one row for each configuration, scale and epoch
    verification  one row for each report of a verification in progress
    verdicts      one row for each configuration and verified image

Seconds are wall-clock of one process and depend on the machine, which the files' schema metadata name.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import torch

from ccdist import atomic_files, locks
from ccdist.config import StudentConfig
from ccdist.data import Dataset, load_dataset, to_pixels
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.provenance import source_commit
from ccdist.recipe import Recipe
from ccdist.threats import perturbation_set
from ccdist.training import EpochReport, NonFiniteLossError, TrainingResult, train_student, train_teacher
from ccdist.verification import Progress, accuracies, quick_accuracies, verify
from search.config import SearchConfig, find_space_file, load_search_config
from search.errors import UserError
from search.recipe import derive_seed
from search.space import Space

SPACE = "fashion_mnist"
SETTINGS = (
    "network.width=8",
    "data.train_images=4000",
    "data.validation_images=400",
    "student.epochs=18",
    "verification.rungs=[pgd,ibp,crown,alpha_crown,branch_and_bound]",
    "verification.branch_and_bound.timeout_s=3",
    "verification.batch_size=50",  # so that a rung reports several times
)
# Shares of a recipe's epochs. Durations in a recipe are shares too, so a short training is the same one, compressed.
SCALES = {"ninth": 1 / 9, "third": 1 / 3, "full": 1.0}
# CROWN on as many costs about an eighth of an epoch of the settings above.
PROBE_IMAGES = 256

NUMBER = ("number", pa.int16())
SCHEMAS = {
    "runs": pa.schema(
        [
            NUMBER,
            ("params", pa.string()),  # JSON
            ("student_seed", pa.int64()),
            ("standard", pa.float64()),
            ("adversarial", pa.float64()),
            ("certified", pa.float64()),
            ("certified_upper", pa.float64()),
            ("num_images", pa.int32()),
            ("teacher_seconds", pa.float32()),  # of the one teacher that all share; 0 where the loss reads none
            *((f"student_seconds_{scale}", pa.float32()) for scale in SCALES),  # without the probes
            ("verification_seconds", pa.float32()),
        ]
    ),
    "curves": pa.schema(
        [
            NUMBER,
            ("scale", pa.string()),
            ("epochs", pa.int16()),
            ("epoch", pa.int16()),  # from 1
            ("epsilon", pa.float64()),  # at which the two certified accuracies are measured: the threat's
            ("train_epsilon", pa.float64()),  # of the epoch's last step
            ("ramp_end", pa.float64()),  # warm-up and ramp, share of the epochs
            ("after_ramp", pa.bool_()),
            ("seconds", pa.float32()),  # of the epoch, without the probes
            ("standard", pa.float64()),
            ("ibp_certified", pa.float64()),
            ("ibp_seconds", pa.float32()),  # of the probe, standard accuracy included
            ("crown_certified", pa.float64()),  # by CROWN or IBP, whichever bound is better
            ("crown_seconds", pa.float32()),
        ]
    ),
    "verification": pa.schema(
        [
            NUMBER,
            ("seconds", pa.float32()),  # since the verification began
            ("rung", pa.string()),
            ("proved", pa.int32()),
            ("falsified", pa.int32()),
            ("open", pa.int32()),
        ]
    ),
    "verdicts": pa.schema(
        [
            NUMBER,
            ("index", pa.int32()),
            ("verdict", pa.string()),
            ("method", pa.string()),
            ("seconds", pa.float32()),
            ("branches", pa.int32()),
        ]
    ),
}
Row = dict[str, Any]


# -------------------------------------------------------------------------------------------- one configuration


def draw(space: Space, number: int) -> dict[str, Any]:
    """Parameters of a configuration at random; they depend on the search's seed and the number alone."""
    sampler = optuna.samplers.RandomSampler(seed=derive_seed(space.config.search.seed, number))
    return space.suggest(optuna.create_study(sampler=sampler).ask())


def scaled(student: StudentConfig, scale: float) -> StudentConfig:
    """The same recipe with a share of its epochs, one at least."""
    return student.model_copy(update={"epochs": max(1, round(student.epochs * scale))})


@dataclass
class Curve:
    """The rows of one training; given to it as the listener of its epochs."""

    number: int
    scale: str
    dataset: Dataset
    recipe: Recipe
    rows: list[Row] = field(default_factory=list)

    def __call__(self, report: EpochReport) -> None:
        schedule = self.recipe.student.epsilon_schedule
        ramp_end = float(schedule.warm_up + schedule.ramp)
        self.rows.append(
            {
                "number": self.number,
                "scale": self.scale,
                "epochs": report.epochs,
                "epoch": report.epoch,
                "epsilon": float(self.recipe.threat.radius),
                "train_epsilon": report.metrics["epsilon"],
                "ramp_end": ramp_end,
                "after_ramp": report.epoch >= ramp_end * report.epochs,
                "seconds": report.seconds,
                **self._probed(report.network),
            }
        )

    def _probed(self, network: Network) -> Row:
        images = to_pixels(self.dataset.validation.images[:PROBE_IMAGES])
        labels, threat = self.dataset.validation.labels[:PROBE_IMAGES], self.recipe.threat
        started = time.perf_counter()
        standard, ibp = quick_accuracies(network, images, labels, threat)
        ibp_ended = time.perf_counter()
        with exact_float32(), torch.no_grad():
            lower = crown_lower_bounds(network, perturbation_set(images, threat.norm, threat.radius), labels)
        crown = float((lower.amin(1) > 0).float().mean())
        return {
            "standard": standard,
            "ibp_certified": ibp,
            "ibp_seconds": ibp_ended - started,
            "crown_certified": crown,
            "crown_seconds": time.perf_counter() - ibp_ended,
        }


@dataclass(frozen=True)
class Measurement:
    """All configurations of a space, kept in one folder."""

    config: SearchConfig
    out: Path

    @cached_property
    def space(self) -> Space:
        return Space(self.config)

    @cached_property
    def dataset(self) -> Dataset:
        return load_dataset(self.config.data)

    def path(self, number: int) -> Path:
        return self.out / "configurations" / f"{number:03d}.json"

    def teacher(self, recipe: Recipe) -> TrainingResult:
        """The teacher of every configuration: nothing of it is searched, and its seed is the study's."""
        return train_teacher(self.dataset, recipe.threat, recipe.teacher, state_path=self.out / "teacher.state")

    def measure(self, number: int) -> dict[str, list[Row]]:
        """The rows of one configuration for each table.

        Raises:
            NonFiniteLossError: its loss diverged.
        """
        params = draw(self.space, number)
        recipe = self.space.recipe(params, number)
        teacher = self.teacher(recipe) if recipe.needs_teacher else None
        run: Row = {"number": number, "params": json.dumps(params), "student_seed": recipe.student.seed}
        run["teacher_seconds"] = 0.0 if teacher is None else teacher.seconds
        rows: dict[str, list[Row]] = {"curves": []}
        for name, scale in SCALES.items():
            curve = Curve(number, name, self.dataset, recipe)
            student = train_student(
                self.dataset,
                recipe.threat,
                scaled(recipe.student, scale),
                None if teacher is None else teacher.network,
                on_epoch=curve,
            )
            run[f"student_seconds_{name}"] = student.seconds
            rows["curves"] += curve.rows
        return rows | self._verified(number, recipe, student.network, run)  # the last scale is the whole training

    def _verified(self, number: int, recipe: Recipe, network: Network, run: Row) -> dict[str, list[Row]]:
        validation = self.dataset.validation
        timeline: list[Row] = []
        started = time.perf_counter()

        def listen(progress: Progress) -> None:
            counts = {name: getattr(progress, name) for name in ("rung", "proved", "falsified", "open")}
            timeline.append({"number": number, "seconds": time.perf_counter() - started, **counts})

        images = to_pixels(validation.images)
        table = verify(network, images, validation.labels, recipe.verification, on_progress=listen)
        seconds = time.perf_counter() - started
        names = [name for name in SCHEMAS["verdicts"].names if name != NUMBER[0]]
        verdicts = [{"number": number} | row for row in table.select(names).to_pylist()]
        whole = run | asdict(accuracies(table)) | {"verification_seconds": seconds}
        return {"runs": [whole], "verification": timeline, "verdicts": verdicts}

    def measure_all(self, count: int) -> int:
        """Do what has no file yet; returns how many diverged."""
        self.path(0).parent.mkdir(parents=True, exist_ok=True)
        diverged = 0
        for number in range(count):
            if self.path(number).exists():
                continue
            try:
                rows = self.measure(number)
            except NonFiniteLossError as error:
                diverged += 1
                _tell(f"{number + 1}/{count}: {error}")
                continue
            atomic_files.write_text(self.path(number), json.dumps(rows))
            _tell(f"{number + 1}/{count}: {_short(rows['runs'][0])}")
        return diverged


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _short(run: Row) -> str:
    values = " / ".join(f"{run[name]:.3f}" for name in ("standard", "adversarial", "certified"))
    training = sum(run[f"student_seconds_{scale}"] for scale in SCALES)
    return f"{values}, training {training:.0f} s, verification {run['verification_seconds']:.1f} s"


# ------------------------------------------------------------------------------------------------ the whole


def describe(space: str, settings: Sequence[str]) -> dict[str, Any]:
    """What was measured, with what, where and when."""
    names = ("torch", "numpy", "optuna", "pyarrow")
    return {
        "space": space,
        "settings": list(settings),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names},
        "commit": source_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def begin(out: Path, description: Mapping[str, Any]) -> None:
    """Note what the folder is about.

    Raises:
        UserError: it is about something else.
    """
    path = out / "measurement.json"
    if not path.exists():
        atomic_files.write_text(path, json.dumps(description, indent=1))
        return
    known = json.loads(path.read_text())
    for name in ("space", "settings"):
        if known[name] != description[name]:
            raise UserError(f"{out} measures {name} {known[name]}, not {description[name]}; take another --out")


def collect(out: Path, target: Path) -> int:
    """Write the tables of all finished configurations; returns the number of configurations.

    Raises:
        UserError: there is none.
    """
    files = sorted((out / "configurations").glob("*.json"))
    if not files:
        raise UserError(f"no finished configuration in {out}; measure some first, without --collect")
    finished = [json.loads(file.read_text()) for file in files]
    described = json.loads((out / "measurement.json").read_text())
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in described.items()}
    target.mkdir(parents=True, exist_ok=True)
    for name, schema in SCHEMAS.items():
        rows = [row for each in finished for row in each[name]]
        atomic_files.write_table(target / f"{name}.parquet", pa.Table.from_pylist(rows, schema.with_metadata(metadata)))
    return len(files)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    out = Path(args.out)
    try:
        if args.collect is not None:
            print(f"{collect(out, Path(args.collect))} configurations in {args.collect}")
            return 0
        settings = [*args.settings, f"search.seed={args.seed}"]
        config = load_search_config(find_space_file(args.space), settings)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with locks.exclusive(out / "lock", wait=False):
            begin(out, describe(args.space, settings))
            return 1 if Measurement(config, out).measure_all(args.runs) else 0
    except (UserError, locks.LockedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="where finished configurations are kept")
    parser.add_argument("--runs", type=int, default=48, help="configurations in all (default: 48)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn parameters and of the trainings")
    parser.add_argument("--space", default=SPACE, help=f"space file (default: {SPACE})")
    parser.add_argument(
        "--set", dest="settings", metavar="KEY=VALUE", nargs="+", default=SETTINGS, help="instead of the default ones"
    )
    parser.add_argument("--collect", metavar="DIR", help="write the Parquet files there; nothing is measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
