"""Small certified networks and the images that they are verified on, made and measured.

    python -m benchmarks.verification_models                        # print the figures of the stored networks
    python -m benchmarks.verification_models --data DIR [--only NAME ...] [--again]

The second call makes what tests/assets/verification lacks: the first test images of each data set, and every network
by its recipe below, with CC-IBP, float32 throughout, on one CPU thread, a few minutes each. A network that is there
with this recipe is kept; --again trains it anew; a training that was stopped goes on from its state file. Another
PyTorch or processor rounds otherwise, so a network made again has figures like the stored ones, not the same.

DIR holds fashion_mnist, mnist and cifar10, each with train.parquet and test.parquet; digits come with scikit-learn.

Figures are counts of images: classified correctly, of these still correct after PGD (40 steps of 0.035 epsilon, one
start), certified by IBP, certified by IBP or CROWN, and open: neither falsified nor certified.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ccdist import checkpoint
from ccdist.config import AttackConfig, DataConfig, VerifyConfig
from ccdist.data import DATA_DIR_VARIABLE, load_dataset, load_test_set, to_pixels
from ccdist.networks import Network
from ccdist.provenance import source_commit
from ccdist.recipe import RecipeFile
from ccdist.training import EpochReport, train_student
from ccdist.verification import verify

ASSETS = Path(__file__).parents[1] / "tests" / "assets" / "verification"
STATES = Path("runs") / "verification_models"
# Test images kept of each data set that is read from files.
NUM_STORED = {"fashion_mnist": 200, "mnist": 100, "cifar10": 100}
ATTACK = AttackConfig(steps=40, step_size=0.035)
FLOAT32 = {"attack": "float32", "teacher": "float32", "training": "float32"}


@dataclass(frozen=True)
class Model:
    """A recipe, and how many of the first test images its figures are about."""

    recipe: RecipeFile
    num_images: int


def _model(
    name: str,
    data: Mapping[str, Any],
    epsilon: str,
    network: Mapping[str, Any],
    *,
    alpha: float,
    epochs: int,
    learning_rate: float,
    l1: float = 2e-6,
    batch_size: int = 128,
    num_images: int = 100,
    seed: int = 0,
) -> Model:
    """What the recipes have in common: the ramp over half of the epochs, one attack step to a corner, two drops."""
    student = {
        "epochs": epochs,
        "batch_size": batch_size,
        "loss": {"kind": "cc_ibp", "alpha": alpha},
        "attack": {"steps": 1, "step_size": 10, "keep": "last"},
        "epsilon_schedule": {"warm_up": 0, "ramp": "1/2"},
        "learning_rate": {"kind": "multi_step", "initial": learning_rate, "decay": 0.2, "drops": ["1/2", "4/5"]},
        "l1": l1,
        "precision": FLOAT32,
    }
    tree = {
        "name": name,
        "data": {"validation": 0, **data},
        "threat": {"norm": "linf", "epsilon": epsilon},
        "network": network,
        "student": student,
        "seed": seed,
    }
    return Model(RecipeFile.model_validate(tree), num_images)


_MNIST = {"name": "mnist", "train_images": 10000}
_CIFAR10 = {"name": "cifar10", "train_images": 10000, "flip": True, "crop_padding": 2}
MODELS: dict[str, Model] = {
    model.recipe.name: model
    for model in (
        _model(
            "fashion_mnist_cnn3",
            {"name": "fashion_mnist", "train_images": 15000},
            "0.1",
            {"name": "cnn3"},
            alpha=0.07,
            epochs=10,
            learning_rate=1e-3,
            num_images=200,
        ),
        _model("mnist_cnn3", _MNIST, "0.1", {"name": "cnn3", "width": 8}, alpha=0.05, epochs=8, learning_rate=2e-3),
        _model("mnist_resnet", _MNIST, "0.1", {"name": "resnet", "width": 4}, alpha=0.1, epochs=10, learning_rate=3e-3),
        _model(
            "digits_mlp",
            {"name": "digits"},
            "0.1",
            {"name": "mlp", "width": 48},
            alpha=0.4,
            epochs=40,
            learning_rate=3e-3,
            batch_size=64,
        ),
        _model(
            "cifar10_cnn5", _CIFAR10, "2/255", {"name": "cnn5", "width": 4}, alpha=0.02, epochs=8, learning_rate=3e-3
        ),
        _model(
            "cifar10_cnn7",
            _CIFAR10,
            "2/255",
            {"name": "cnn7-narrow", "width": 3},
            alpha=0.05,
            epochs=8,
            learning_rate=3e-3,
        ),
    )
}


def images_config(name: str, assets: Path = ASSETS) -> DataConfig:
    """Where `load_test_set` finds the stored test images of a data set; digits need no file."""
    return DataConfig(name=name, path=str(assets / "images" / name) if name in NUM_STORED else None)


def store_images(name: str, assets: Path) -> None:
    """The first test images with the bytes that the data set's own file has."""
    file = assets / "images" / name / "test.parquet"
    if name not in NUM_STORED or file.exists():
        return
    source = Path(os.environ.get(DATA_DIR_VARIABLE, "data")) / name / "test.parquet"
    table = pq.read_table(source, columns=["image", "label"]).slice(0, NUM_STORED[name])
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(".unfinished")
    # The bytes are compressed images, so a dictionary or statistics of them would only hold them a second time.
    pq.write_table(_contiguous(table), staging, compression="zstd", use_dictionary=False, write_statistics=False)
    os.replace(staging, file)


def _contiguous(table: pa.Table) -> pa.Table:
    """A slice alone, without metadata about the rest of its table."""
    return pa.Table.from_pylist(table.to_pylist(), table.schema.remove_metadata())


def is_stored(model: Model, folder: Path) -> bool:
    """Whether the folder holds a network of this recipe."""
    if not (folder / checkpoint.NETWORK).exists():
        return False
    stored = checkpoint.load_description(folder)["metadata"]["recipe"]
    return RecipeFile.model_validate(stored) == model.recipe


def make(model: Model, assets: Path, states: Path) -> None:
    """Train by the recipe, measure, and leave the network with all of that beside it."""
    recipe = model.recipe
    commit = source_commit()
    dataset = load_dataset(recipe.data)
    state = states / f"{recipe.name}.state.safetensors"
    result = train_student(
        dataset, recipe.threat, recipe.student, None, state_path=state, on_epoch=lambda report: _tell(recipe, report)
    )
    metadata = {
        "data_set": recipe.data.name,
        "threat": recipe.tree()["threat"],
        "recipe": recipe.tree(),
        "data": dataset.fingerprint,
        "figures": figures(result.network, model, assets),
        "seconds": result.seconds,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "versions": {package: version(package) for package in ("torch", "numpy", "pyarrow", "scikit-learn")},
    }
    checkpoint.save(assets / recipe.name, result.network, metadata)
    state.unlink(missing_ok=True)


def _tell(recipe: RecipeFile, report: EpochReport) -> None:
    text = f"{time.strftime('%H:%M:%S')} {recipe.name} {report.epoch}/{report.epochs}: {report.seconds:.1f} s"
    print(text, file=sys.stderr, flush=True)


def stored_images(model: Model, assets: Path = ASSETS) -> tuple[Tensor, Tensor]:
    """The images (pixels in [0, 1]) and labels that a model is measured on."""
    test = load_test_set(images_config(model.recipe.data.name, assets))
    return to_pixels(test.images[: model.num_images]), test.labels[: model.num_images]


def figures(network: Network, model: Model, assets: Path = ASSETS) -> dict[str, int]:
    """How many of the images each rung of the ladder leaves or proves (see the module's docstring)."""
    images, labels = stored_images(model, assets)
    config = VerifyConfig(
        threat=model.recipe.threat, attack=ATTACK, rungs=("pgd", "ibp", "crown"), batch_size=100, seed=0
    )
    table = verify(network, images, labels, config)
    decided = Counter(table["method"].to_pylist())  # "" while undecided
    # What a bound proves no attack falsifies, so these counts do not depend on the order of the rungs.
    return {
        "images": len(labels),
        "clean": len(labels) - decided["clean"],
        "pgd": len(labels) - decided["clean"] - decided["pgd"],
        "ibp": decided["ibp"],
        "crown": decided["ibp"] + decided["crown"],
        "open": decided[""],
    }


def report(names: Iterable[str], assets: Path) -> str:
    """The stored networks as a Markdown table, measured now."""
    header = ["model", "threat", "alpha", "parameters", "images", "clean", "PGD-40", "IBP", "IBP or CROWN", "open"]
    rows = [header, ["---"] * len(header)]
    for name in names:
        if not (assets / name).exists():
            continue
        model, network = MODELS[name], checkpoint.load(assets / name)
        measured = figures(network, model, assets)
        about = [name, str(model.recipe.threat), f"{model.recipe.student.loss.alpha:g}"]  # type: ignore[union-attr]
        parameters = sum(parameter.numel() for parameter in network.parameters())
        rows.append([*about, f"{parameters:,}", *(str(value) for value in measured.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    assets, names = Path(args.assets), args.only or list(MODELS)
    if args.data is not None:
        os.environ[DATA_DIR_VARIABLE] = args.data
        for name in names:
            model = MODELS[name]
            store_images(model.recipe.data.name, assets)
            if args.again or not is_stored(model, assets / name):
                make(model, assets, Path(args.states))
    print(report(names, assets))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verification_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the data sets' folders; without it nothing is trained")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--again", action="store_true", help="train what is there already, too")
    parser.add_argument("--assets", metavar="DIR", default=str(ASSETS), help="default: the repository's")
    parser.add_argument("--states", metavar="DIR", default=str(STATES), help="where trainings go on from")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the stored networks were made with 1")
    return parser


if __name__ == "__main__":
    sys.exit(main())
