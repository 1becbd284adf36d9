"""CIFAR-10 at 2/255 with CC-Dist in full on one GPU: teacher, student, verification and rate, in calls of minutes.

    python -m benchmarks.cifar10_full train --data DIR --out DIR --device cuda \
        --set student.precision.attack=auto --set student.precision.tf32=true
    python -m benchmarks.cifar10_full verify --data DIR --out DIR --device cuda --set verification.batch_size=256
    python -m benchmarks.cifar10_full benchmark --data DIR --out DIR --device cuda
    python -m benchmarks.cifar10_full report --out DIR

The recipe is spaces/recipes/cifar_2_255_cc_dist.yaml: `attack: auto` is bfloat16 on a GPU that has it, `tf32` is off
unless set. Settings are kept in OUT, so later calls need not repeat them. A call ends by itself before --minutes are
over, though never before one epoch or one chunk of images, and the same call goes on. Exit codes: 0 the stage is
finished; 75 there is more to do; 2 something asked for is wrong; 3 a loss stopped being finite.

DIR holds CIFAR-10 as train.parquet and test.parquet and, where there are any, uncompressed copies of the first test
images as test_lossless.parquet. OUT gets run/ (as of `python -m ccdist.train`), verdicts/SET/START.parquet for each
chunk of images, verdicts_SET.parquet once all are there, benchmarks.jsonl, calls.jsonl and report.md.

Needed beside ccdist: torch, numpy, pyarrow, pydantic, safetensors, jaxtyping, pillow and pyyaml.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import PIL.Image
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from benchmarks import training_step
    from ccdist import checkpoint
    from ccdist.config import NoisyFGSMConfig, StudentConfig, TeacherConfig, TrainConfig, VerifyConfig, fingerprint
    from ccdist.config import TrainingAttackConfig as PGDConfig
    from ccdist.data import Dataset, ImageSet, load_dataset, load_test_set, to_pixels
    from ccdist.host_memory import keep_freed_memory
    from ccdist.networks import Network
    from ccdist.precision import float32_products, resolve
    from ccdist.recipe import KIND, RecipeFile, load_recipe_file
    from ccdist.train_run import Run, claimed, finished_summary
    from ccdist.training import EpochReport, NonFiniteLossError, OnEpoch, train_student, train_teacher
    from ccdist.verification import accuracies, verify
    from ccdist.yaml_files import find_file
except ModuleNotFoundError as error:
    needed = {"torch": "torch", "numpy": "numpy", "pyarrow": "pyarrow", "pydantic": "pydantic", "yaml": "pyyaml"}
    needed |= {"safetensors": "safetensors", "jaxtyping": "jaxtyping", "PIL": "pillow"}
    missing = [package for module, package in needed.items() if find_spec(module) is None] or [str(error.name)]
    raise ModuleNotFoundError(
        f"benchmarks.cifar10_full cannot start; missing: {', '.join(missing)}. Install with pip, and start it in the "
        "project's root",
        name=error.name,
    ) from None

FINISHED, BAD_INPUT, NOT_FINITE, MORE_TO_DO = 0, 2, 3, 75  # 75: EX_TEMPFAIL, "try again"
RECIPE = "cifar_2_255_cc_dist"
LOSSLESS = "test_lossless.parquet"
SET_NAMES = {"test": "CIFAR-10-JPEG", "lossless": "lossless subset"}
# Seconds between two training states: one takes longer to write than many an epoch on a fast GPU.
STATE_INTERVAL = 60.0
# A unit of work may take this much longer than the longest one so far.
MARGIN = 1.1
# No student epoch was seen yet when the teacher's last one ends; it has some 27 passes to the teacher's 24.
STUDENT_TO_TEACHER = 2.0
# Optimiser steps a round and rounds of the rate; one round more warms up.
ROUND_STEPS, ROUNDS = 50, 5
# Standard and certified accuracy as published, each with its own complete verifier.
PUBLISHED = {"CC-IBP": (0.8009, 0.6378), "MTL-IBP": (0.8011, 0.6324), "Exp-IBP": (0.8061, 0.6165)}


class _OutOfTime(Exception):
    """The next unit of work would overrun the limit."""


@dataclass
class Deadline:
    """When a call has to end, and the longest unit of work that it has seen."""

    limit_s: float
    longest: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._started = self._lap = time.monotonic()

    def begin(self) -> None:
        """A unit of work starts here; by itself it starts where the one before it ended."""
        self._lap = time.monotonic()

    def lap(self) -> None:
        """A unit of work is done."""
        now = time.monotonic()
        self.longest, self._lap = max(self.longest, now - self._lap), now

    def allows_another(self, factor: float = 1.0) -> bool:
        """Whether a unit `factor` times as long as the longest fits; always while none is done."""
        return self.longest == 0 or self.spent() + MARGIN * factor * self.longest <= self.limit_s

    def spent(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._started


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        if args.stage == "report":
            return report(args.out)
        deadline, device = Deadline(60 * args.minutes), _device(args.device)
        code = STAGES[args.stage](args, _recipe(args), device, deadline)
        _append(args.out / "calls.jsonl", _call(args.stage, device, deadline.spent(), code))
        return code
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_FINITE
    except ValueError as error:  # what ccdist raises for a mistake of its user
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _recipe(args: argparse.Namespace) -> RecipeFile:
    """The recipe that OUT was begun with, else the published one, with this call's settings."""
    if args.data is None:
        raise ValueError(f"--data is missing; stage {args.stage} reads images")
    path = json.dumps(str(args.data.resolve()), ensure_ascii=False)
    return load_recipe_file(_begun(args.out) or _published(), [*args.set, f"data.path={path}"])


def _begun(out: Path) -> Path | None:
    file = out / "run" / "recipe.yaml"
    return file if file.exists() else None


def _published() -> Path:
    return find_file(RECIPE, kind=KIND, shipped="spaces/recipes")


def _call(stage: str, device: torch.device, seconds: float, code: int) -> dict[str, Any]:
    return {"stage": stage, "seconds": round(seconds, 1), "exit_code": code, **_circumstances(device)}


def _circumstances(device: torch.device) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}"
        + (f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if is_gpu else ""),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        return "unknown"


def _append(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as opened:
        opened.write(f"{json.dumps(row)}\n")


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- train ---------------------------------------------------------------------------------------------------------


@dataclass
class _Watch:
    """Tells each epoch of a run, and stops it while there is time."""

    deadline: Deadline

    def epoch(self, report: EpochReport, row: dict[str, Any]) -> None:
        self.deadline.lap()
        told = {"loss", "adversarial_accuracy", "ibp_certified_accuracy", "epsilon", "seconds"} & row.keys()
        values = ", ".join(f"{name} {row[name]:.4g}" for name in sorted(told))
        print(f"{report.phase} {report.epoch}/{report.epochs}: {values}, {row['images_per_second']:.0f} images/s")
        last = report.epoch == report.epochs
        if last and report.phase == "student":
            return
        if not self.deadline.allows_another(STUDENT_TO_TEACHER if last else 1.0):
            raise _OutOfTime

    def rung(self, network: str, rung: str, still_open: int, num_images: int) -> None:
        """Nothing is verified here."""

    def note(self, text: str) -> None:
        print(text)


def train(args: argparse.Namespace, recipe: RecipeFile, device: torch.device, deadline: Deadline) -> int:
    """Teacher and student, from the state after the last epoch that any call finished."""
    folder = args.out / "run"
    with claimed(folder, recipe):
        if finished_summary(folder, recipe, None) is None:
            dataset = load_dataset(recipe.data)
            deadline.begin()
            try:
                Run(recipe, folder, dataset, None, device, _Watch(deadline), state_interval=STATE_INTERVAL).finish()
            except _OutOfTime:
                print(f"left: {'; '.join(_epochs_left(folder, recipe))}")
                return MORE_TO_DO
    print(f"{folder} is trained")
    return FINISHED


def _epochs_left(folder: Path, recipe: RecipeFile) -> Iterator[str]:
    for phase, config in _phases(recipe).items():
        rows = [row for row in _rows(folder / "curves.jsonl") if row["phase"] == phase]
        left = config.epochs - len(rows)
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        pace = f", about {left * statistics.median(seconds):.0f} s" if seconds else ""
        if left:
            yield f"{left} of {config.epochs} {phase} epochs{pace}"
        elif phase == "student" or not (folder / phase).exists():
            yield f"storing the {phase}"


def _phases(recipe: RecipeFile) -> dict[str, TrainConfig]:
    teacher = {"teacher": recipe.teacher} if recipe.teacher is not None and recipe.needs_teacher else {}
    return {**teacher, "student": recipe.student}


# ---- verify --------------------------------------------------------------------------------------------------------


def verify_in_chunks(args: argparse.Namespace, recipe: RecipeFile, device: torch.device, deadline: Deadline) -> int:
    """Verdicts about all test images and the lossless ones, a file for each chunk of images, in file order."""
    folder = args.out / "run"
    if not (folder / "student").exists():
        raise ValueError(f"{folder / 'student'} is not there; run stage train until it is finished")
    if recipe.verification is None:
        raise ValueError("the recipe's verification is null; set verification.rungs to the rungs to climb")
    config = VerifyConfig(threat=recipe.threat, **dict(recipe.verification))
    with claimed(folder, recipe):
        network = checkpoint.load(folder / "student").to(device)
        for name, images in _test_sets(recipe).items():
            chunks = _Chunks(args.out / "verdicts" / name, _identity(folder, config, images))
            deadline.begin()
            while (start := chunks.end) < len(images):
                if not deadline.allows_another():
                    print(f"left: {len(images) - start} of {len(images)} images of set {name}")
                    return MORE_TO_DO
                chunks.add(_verified(network, images, range(start, min(start + args.chunk, len(images))), config))
                deadline.lap()
                print(f"{name}: {chunks.end} of {len(images)} images, {_in_words(Measured.of(chunks.tables))}")
            pq.write_table(chunks.joined(), args.out / f"verdicts_{name}.parquet", compression="zstd")
    return FINISHED


def _test_sets(recipe: RecipeFile) -> dict[str, ImageSet]:
    sets = {"test": load_test_set(recipe.data)}
    assert recipe.data.path is not None  # --data
    file = Path(recipe.data.path) / LOSSLESS
    if file.exists():
        sets["lossless"] = _decoded(file)
    else:
        print(f"{file} is not there: no lossless subset")
    return sets


def _decoded(file: Path) -> ImageSet:
    """All images of a Parquet file with columns image ({bytes, path}) and label."""
    rows = pq.read_table(file).to_pylist()
    pixels = [np.asarray(PIL.Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    return ImageSet(images, torch.tensor([row["label"] for row in rows]))


def _identity(folder: Path, config: VerifyConfig, images: ImageSet) -> str:
    """What a verdict is about; the batch size only says how it was computed."""
    about = config.model_dump(mode="json", exclude={"batch_size", "seed"})
    pixels = hashlib.sha256(images.images.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()
    weights = checkpoint.load_description(folder / "student")["weights_sha256"]
    return fingerprint({"weights": weights, "verification": about, "images": pixels})


class _Chunks:
    """The verdict tables of one set of images: those that follow each other from the first image on."""

    def __init__(self, folder: Path, identity: str | None) -> None:
        """identity None: that of the chunk with the first image."""
        self.folder, self.identity, self.end = folder, identity, 0
        self.tables: list[pa.Table] = []
        for file in sorted(folder.glob("[0-9]*.parquet")):
            table = pq.read_table(file)
            found = table.schema.metadata[b"identity"].decode()
            if int(file.stem) == self.end and found == (self.identity or found):
                self.identity = found
                self._take(table)

    def _take(self, table: pa.Table) -> None:
        self.tables.append(table)
        self.end += table.num_rows

    def add(self, table: pa.Table) -> None:
        """Store the table that comes next, so that its file is there whole or not at all."""
        assert self.identity is not None
        table = table.replace_schema_metadata(table.schema.metadata | {b"identity": self.identity.encode()})
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / "unfinished"
        pq.write_table(table, unfinished, compression="zstd")
        os.replace(unfinished, self.folder / f"{self.end:06d}.parquet")
        self._take(table)

    def joined(self) -> pa.Table:
        return pa.concat_tables([table.replace_schema_metadata(None) for table in self.tables])


def _verified(network: Network, images: ImageSet, rows: range, config: VerifyConfig) -> pa.Table:
    """Verdicts about some images, in smaller batches where the memory is too small."""
    pixels, labels = to_pixels(images.images[rows.start : rows.stop]), images.labels[rows.start : rows.stop]
    config = config.model_copy(update={"seed": rows.start})  # other random starts in each chunk
    started = time.perf_counter()
    while True:
        try:
            table = verify(network, pixels, labels, config)
            break
        except torch.OutOfMemoryError:
            if config.batch_size == 1:
                raise
            config = config.model_copy(update={"batch_size": config.batch_size // 2})
            print(f"out of memory; going on with batches of {config.batch_size}")
        torch.cuda.empty_cache()
    index = pa.array(rows, table.schema.field("index").type)
    table = table.set_column(0, table.schema.field("index"), index)
    run = {"seconds": time.perf_counter() - started, "batch_size": config.batch_size, "set_size": len(images)}
    return table.replace_schema_metadata({"run": json.dumps(run)})


@dataclass(frozen=True)
class Measured:
    """Fractions of the images that some chunks hold; certified_crown counts what IBP certified too."""

    num_images: int
    set_size: int
    standard: float
    adversarial: float
    certified_ibp: float
    certified_crown: float
    certified_upper: float
    seconds: float

    @classmethod
    def of(cls, tables: list[pa.Table]) -> "Measured":
        runs = [json.loads(table.schema.metadata[b"run"]) for table in tables]
        whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
        return cls.of_table(whole, runs[0]["set_size"], sum(run["seconds"] for run in runs))

    @classmethod
    def of_table(cls, table: pa.Table, set_size: int, seconds: float) -> "Measured":
        found = accuracies(table)
        return cls(
            num_images=table.num_rows,
            set_size=set_size,
            standard=found.standard,
            adversarial=found.adversarial,
            certified_ibp=table["method"].to_pylist().count("ibp") / table.num_rows,
            certified_crown=found.certified,
            certified_upper=found.certified_upper,
            seconds=seconds,
        )


def _in_words(measured: Measured) -> str:
    return (
        f"standard {measured.standard:.4f}, adversarial {measured.adversarial:.4f}, certified by IBP "
        f"{measured.certified_ibp:.4f}, by CROWN {measured.certified_crown:.4f}, {measured.seconds:.0f} s"
    )


# ---- benchmark -----------------------------------------------------------------------------------------------------


def benchmark(args: argparse.Namespace, recipe: RecipeFile, device: torch.device, deadline: Deadline) -> int:
    """The rate of the training loop itself, on fresh networks and at full epsilon, against the device's peak."""
    peaks: dict[bool, dict[str, float]] = {}
    network = None
    for phase, config in _phases(recipe).items():
        fields: dict[str, Any] = {"epochs": ROUNDS + 1}
        if phase == "student":
            fields |= {"epsilon_schedule": {"warm_up": 0, "ramp": 0}}
        config = type(config).model_validate(config.model_dump() | fields)
        tf32 = config.precision.tf32
        if tf32 not in peaks:
            with float32_products("tf32" if tf32 else "ieee"):
                peaks[tf32] = training_step.peaks(torch.get_num_threads(), device)
        dataset = load_dataset(recipe.data.model_copy(update={"train_images": ROUND_STEPS * config.batch_size}))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        deadline.begin()
        seconds, network = _timed_rounds(_training(dataset, recipe, config, network, device), deadline)
        memory = torch.cuda.max_memory_reserved(device) / 2**20 if device.type == "cuda" else None
        row = _rate(phase, config, seconds, len(dataset.train), network, device, peaks[tf32])
        row |= {"peak_memory_mb": memory, **_circumstances(device)}
        _append(args.out / "benchmarks.jsonl", row)
        print(_rate_in_words(row))
    return FINISHED


def _training(
    dataset: Dataset, recipe: RecipeFile, config: TrainConfig, teacher: Network | None, device: torch.device
) -> Callable[[OnEpoch], object]:
    def train(on_epoch: OnEpoch) -> object:
        if isinstance(config, TeacherConfig):
            return train_teacher(dataset, recipe.threat, config, device=device, on_epoch=on_epoch)
        assert isinstance(config, StudentConfig)
        return train_student(dataset, recipe.threat, config, teacher, device=device, on_epoch=on_epoch)

    return train


def _timed_rounds(train: Callable[[OnEpoch], object], deadline: Deadline) -> tuple[list[float], Network]:
    """Seconds of each epoch after the first, as many as there is time for, and the network."""
    reports: list[EpochReport] = []

    def on_epoch(report: EpochReport) -> None:
        deadline.lap()
        reports.append(report)
        if len(reports) > 1 and not deadline.allows_another():
            raise _OutOfTime

    with suppress(_OutOfTime):
        train(on_epoch)
    return [report.seconds for report in reports[1:]], reports[-1].network


def _rate(
    phase: str,
    config: TrainConfig,
    seconds: list[float],
    num_images: int,
    network: Network,
    device: torch.device,
    peaks: dict[str, float],
) -> dict[str, Any]:
    """Images per second, and the share of the time that the products alone would take at the device's peak.

        at_peak = F * num_images * sum over precisions p of passes(p) / peak(p),   fraction = at_peak / seconds

    F is the work of one forward pass of an image; passes are counted as in `training_step.passes`.
    """
    forward = training_step.forward_flops(network.cpu()) / training_step.BATCH
    best = {dtype: max(value for name, value in peaks.items() if name.split()[-1] == dtype) for dtype in _DTYPES}
    work = passes(config, device)
    at_peak = forward * num_images * sum(count / best[dtype] for dtype, count in work.items())
    rates = [num_images / each for each in seconds]
    return {
        "phase": phase,
        "images_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "rounds": len(rates),
        "images_a_round": num_images,
        "batch_size": config.batch_size,
        "passes": work,
        "tf32": config.precision.tf32,
        "peak_flops": best,
        "fraction_of_peak": at_peak / statistics.median(seconds),
    }


_DTYPES = ("float32", "bfloat16")


def passes(config: TrainConfig, device: torch.device) -> dict[str, int]:
    """Forward passes' worth of a step's products for each precision (see `training_step.passes`)."""
    assert isinstance(config, TeacherConfig | StudentConfig)
    match config.attack:
        case PGDConfig(steps=steps, restarts=restarts, keep=keep):
            attack = restarts * (2 * steps + (keep == "best"))
        case NoisyFGSMConfig():
            attack = 2
        case _:
            attack = 0
    counts = dict.fromkeys(_DTYPES, 0)
    counts[resolve(config.precision.attack, device)] += attack
    if isinstance(config, TeacherConfig):
        counts[config.precision.training] += 3  # forward, gradients of inputs and of weights
        return counts
    counts[config.precision.training] += 3 + (6 if config.loss.reads_bounds else 0)  # centres and radii
    counts[resolve(config.precision.teacher, device)] += int(config.loss.reads_teacher)
    return counts


def _rate_in_words(row: dict[str, Any]) -> str:
    return (
        f"{row['phase']}: {row['images_per_second']:.0f} images/s ({row['lowest']:.0f} to {row['highest']:.0f}, "
        f"n = {row['rounds']} rounds), {row['fraction_of_peak']:.3f} of the peak"
    )


# ---- report --------------------------------------------------------------------------------------------------------


def report(out: Path) -> int:
    """Everything that OUT holds so far, as Markdown, printed and written to report.md."""
    file = _begun(out)
    if file is None:
        raise ValueError(f"{out / 'run'} holds no training; run stage train first")
    recipe = load_recipe_file(file)
    lines = [
        f"## CIFAR-10 at {recipe.threat}: CC-Dist, {recipe.network.name}",
        "",
        f"Recipe `{RECIPE}`{_changes(recipe)}. One seed ({recipe.seed}).",
        *("", *_calls_table(out), "", *_training_table(out, recipe), "", *_rate_table(out)),
        *("", *_accuracy_table(out, recipe), "", *_published_table()),
    ]
    text = "\n".join(lines)
    (out / "report.md").write_text(f"{text}\n")
    print(text)
    return FINISHED


def _changes(recipe: RecipeFile) -> str:
    published, ours = (_leaves(each.tree()) for each in (load_recipe_file(_published()), recipe))
    changed = [f"`{key}={ours.get(key)}`" for key in {**published, **ours} if ours.get(key) != published.get(key)]
    changed = [each for each in changed if not each.startswith("`data.path=")]
    return f" with {', '.join(changed)}" if changed else " as it is"


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    inner = [_leaves(value, f"{path}.{key}".lstrip(".")) for key, value in node.items()]
    return {key: value for leaves in inner for key, value in leaves.items()}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _calls_table(out: Path) -> list[str]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in _rows(out / "calls.jsonl"):
        groups.setdefault(tuple(row[key] for key in ("stage", "device", "versions", "commit")), []).append(row)
    cells = []
    for (stage, device, versions, commit), rows in groups.items():
        dates = " to ".join(sorted({rows[0]["date"], rows[-1]["date"]}))
        seconds = f"{sum(row['seconds'] for row in rows):.0f}"
        cells.append((stage, device, versions, commit, dates, str(len(rows)), seconds))
    return _table(("stage", "device", "versions", "commit", "dates", "calls", "seconds in all"), cells)


def _training_table(out: Path, recipe: RecipeFile) -> list[str]:
    summary = out / "run" / "summary.json"
    spent = json.loads(summary.read_text())["seconds"] if summary.exists() else {}
    cells = []
    for phase, config in _phases(recipe).items():
        rows = [row for row in _rows(out / "run" / "curves.jsonl") if row["phase"] == phase]
        rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
        rate = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})" if rates else "-"
        seconds = f"{spent[phase]:.0f}" if phase in spent else "not finished"
        cells.append((phase, f"{len(rows)} of {config.epochs}", seconds, rate))
    return _table(("network", "epochs", "seconds of training", "images/s, median of epochs (lowest to highest)"), cells)


def _rate_table(out: Path) -> list[str]:
    cells = []
    for row in _rows(out / "benchmarks.jsonl"):
        work = ", ".join(f"{count} {dtype}" for dtype, count in row["passes"].items() if count)
        peak = ", ".join(f"{row['peak_flops'][dtype] / 1e12:.3g} {dtype}" for dtype in row["passes"])
        spread = f"{row['images_per_second']:.0f} ({row['lowest']:.0f} to {row['highest']:.0f}), n = {row['rounds']}"
        memory = "-" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
        tf32 = "yes" if row["tf32"] else "no"
        cells.append((row["phase"], work, tf32, spread, peak, f"{row['fraction_of_peak']:.3f}", memory, row["device"]))
    header = ("step of", "passes", "TF32", "images/s", "peak TFLOP/s", "fraction of peak", "peak MB", "device")
    return _table(header, cells)


def _accuracy_table(out: Path, recipe: RecipeFile) -> list[str]:
    """Accuracies of each set, and of the JPEG copies of the lossless images."""
    chunks = {name: _Chunks(out / "verdicts" / name, None) for name in SET_NAMES}
    measured = {SET_NAMES[name]: Measured.of(found.tables) for name, found in chunks.items() if found.tables}
    if chunks["test"].tables and chunks["lossless"].tables:
        lossless, jpeg = chunks["lossless"].joined(), chunks["test"].joined()
        same = jpeg.slice(0, lossless.num_rows)
        if same["label"].to_pylist() == lossless["label"].to_pylist():
            seconds = sum(same["seconds"].to_pylist())
            measured["CIFAR-10-JPEG, the images of that subset"] = Measured.of_table(same, same.num_rows, seconds)
    steps = recipe.verification.attack.steps if recipe.verification is not None else 0
    header = ("images", "number", "standard", f"PGD-{steps}", "certified, IBP", "certified, CROWN or IBP")
    cells = [
        (
            name,
            str(each.num_images) if each.num_images == each.set_size else f"first {each.num_images} of {each.set_size}",
            *(f"{value:.4f}" for value in (each.standard, each.adversarial, each.certified_ibp, each.certified_crown)),
            f"{each.certified_upper:.4f}",
            f"{each.seconds:.0f}",
        )
        for name, each in measured.items()
    ]
    return [
        *_table((*header, "not falsified", "seconds"), cells),
        "",
        "The training images are JPEG copies too, so no row is a result on CIFAR-10 as published.",
    ]


def _published_table() -> list[str]:
    return [
        "Published figures, on original data with complete verification:",
        "",
        *_table(
            ("method", "standard", "certified"),
            [(name, *(f"{value:.4f}" for value in values)) for name, values in PUBLISHED.items()],
        ),
    ]


STAGES = {"train": train, "verify": verify_in_chunks, "benchmark": benchmark}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar10_full",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", metavar="STAGE", choices=(*STAGES, "report"), help="train, verify, benchmark, report")
    parser.add_argument("--data", type=Path, help="folder of the Parquet files; report reads none")
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--minutes", type=float, default=8.5, help="limit of this call")
    parser.add_argument("--chunk", type=_count, default=500, help="images verified between two looks at the clock")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a value of the recipe")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images; expected 1 or more")
    return int(text)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a file or pipe too, whatever ends the call
    sys.exit(main())
