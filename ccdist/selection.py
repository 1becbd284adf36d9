"""Which network, which images, which threat: the arguments that the command lines about a trained network share.

A network that was trained by `ccdist.train` remembers its recipe, so its data set, split and threat need not be given.

Shapes: `N` images, `C H W` image.
"""

import argparse
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError
from torch import nn

from ccdist import checkpoint
from ccdist.config import DataConfig, ThreatModel
from ccdist.data import KNOWN, ImageSet, MissingDataError, load_dataset, load_test_set, to_pixels
from ccdist.image_sources import FORMS
from ccdist.networks import Network, Normalize
from ccdist.threats import Norm
from ccdist.yaml_files import explain

Split = Literal["test", "validation", "train"]
# A recipe's words about missing data, and those of the command line.
WORDS = {
    FORMS: "Parquet files, class folders or npz batches",
    "set data.path (or --set data.path=DIR) to a folder": "give a folder by --path,",
    "unknown data set": "unknown --data",
    "data.path": "--path",
}
_Model = TypeVar("_Model", bound=BaseModel)


class SelectionError(ValueError):
    """The network, images or threat asked for are not there or do not go together; one line says what to do."""


@dataclass(frozen=True)
class Selection:
    """A network, some images of one part of a data set, and what they are perturbed by."""

    network: Network
    images: Float[torch.Tensor, "N C H W"]  # pixels in [0, 1]
    labels: Int[torch.Tensor, " N"]
    indices: range  # where the images stand in their split
    data_name: str
    data_fingerprint: str  # of these images and labels, as they are stored
    split: Split
    threat: ThreatModel
    model_path: Path  # the folder that holds the network itself

    def __len__(self) -> int:
        return len(self.indices)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the data arguments and the threat arguments."""
    parser.add_argument("model", metavar="MODEL", help="the folder of a stored network, or of a finished training")
    parser.add_argument(
        "--data", metavar="NAME", help=f"{', '.join(KNOWN)}, or your own name with --path (default: that of MODEL)"
    )
    parser.add_argument("--path", metavar="DIR", help="the folder that holds the data set")
    parser.add_argument(
        "--split",
        choices=get_args(Split),
        default="test",
        help="test (default); validation and train are those of MODEL's recipe, without one those of a recipe that "
        "says nothing about its split",
    )
    parser.add_argument("--images", metavar="START:STOP", help="0:1000, :200, 7 (default: all); in the stored order")
    parser.add_argument("--norm", choices=get_args(Norm), help="default: that of MODEL, else linf")
    parser.add_argument("--epsilon", metavar="RADIUS", help="exact, in pixel units: 2/255 (default: that of MODEL)")


def load(args: argparse.Namespace) -> Selection:
    """What the arguments of `add_arguments` ask for; the network is on the CPU.

    Raises:
        SelectionError: the model is not one, an argument is wrong, or network and images do not go together.
        CorruptCheckpointError: the stored network is damaged.
        ValueError: the data set is not to be found or damaged.
    """
    folder = _network_folder(Path(args.model))
    stored = _stored_recipe(folder)
    threat = _threat(args.norm, args.epsilon, stored.get("threat"))
    config = _data_config(args.data, args.path, stored.get("data"))
    network = checkpoint.load(folder)
    part = _part(config, args.split)
    indices = parse_images(args.images, len(part))
    chosen = ImageSet(part.images[indices.start : indices.stop], part.labels[indices.start : indices.stop])
    _check_fit(network, chosen, config.name)
    return Selection(
        network=network,
        images=to_pixels(chosen.images),
        labels=chosen.labels.long(),
        indices=indices,
        data_name=config.name,
        data_fingerprint=_fingerprint(chosen),
        split=args.split,
        threat=threat,
        model_path=folder,
    )


def parse_images(text: str | None, count: int) -> range:
    """ "start:stop" as in Python, or one position, of so many images; None means all.

    Raises:
        SelectionError: the text is something else, or no image is left.
    """
    if text is None:
        text = ":"
    match = re.fullmatch(r"\s*(\d*)\s*(:?)\s*(\d*)\s*", text, re.ASCII)
    if match is None or (not match[2] and not match[1]) or len(text) > 40:
        raise SelectionError(f"--images {text[:40]}: expected START:STOP, such as 0:1000 or :200, or one position")
    start = int(match[1] or 0)
    stop = start + 1 if not match[2] else int(match[3] or count)
    if not start < min(stop, count):
        raise SelectionError(f"--images {text} leaves no image; there are {count}, counted from 0")
    return range(start, min(stop, count))


def _network_folder(model: Path) -> Path:
    """The folder of the network: the one given, or the student in that of a training."""
    if (model / checkpoint.NETWORK).exists():
        return model
    if (model / "student" / checkpoint.NETWORK).exists():
        return model / "student"
    if (model / "recipe.yaml").exists():
        raise SelectionError(f"the training in {model} is not finished; go on with it by the command that began it")
    what = f"holds no {checkpoint.NETWORK}" if model.is_dir() else "is no folder" if model.exists() else "is not there"
    raise SelectionError(f"{model} {what}; expected a folder written by ccdist.checkpoint.save, or a training's")


def _stored_recipe(folder: Path) -> dict[str, Any]:
    """The recipe that the network was trained by, as far as it says; empty where it says nothing."""
    metadata = checkpoint.load_description(folder).get("metadata")
    recipe = metadata.get("recipe") if isinstance(metadata, dict) else None
    return recipe if isinstance(recipe, dict) else {}


def _threat(norm: Norm | None, epsilon: str | None, stored: dict[str, Any] | None) -> ThreatModel:
    known = _checked(ThreatModel, stored, "MODEL's recipe: threat.") if stored is not None else None
    if epsilon is None:
        if known is not None and norm in (None, known.norm):
            return known
        why = f"MODEL's own is for {known.norm}" if known is not None else "MODEL does not store one"
        raise SelectionError(f"--epsilon is missing, and {why}; give it in pixel units, for example --epsilon 2/255")
    chosen = norm or (known.norm if known is not None else "linf")
    return _checked(ThreatModel, {"norm": chosen, "epsilon": epsilon}, "--")


def _data_config(name: str | None, path: str | None, stored: dict[str, Any] | None) -> DataConfig:
    """The stored configuration with the arguments laid over it; another data set has nothing in common with it."""
    known = _checked(DataConfig, stored, "MODEL's recipe: data.") if stored is not None else None
    if known is not None and name in (None, known.name):
        return known if path is None else known.model_copy(update={"path": path})
    if name is None:
        raise SelectionError(f"--data is missing, and MODEL does not store it; known: {', '.join(KNOWN)}")
    return DataConfig(name=name, path=path)


def _checked(model: type[_Model], values: Any, where: str) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SelectionError(f"{where}{explain(error, model)}") from error


def _part(config: DataConfig, split: Split) -> ImageSet:
    try:
        if split == "test":
            return load_test_set(config)
        dataset = load_dataset(config)
    except MissingDataError as error:
        told = str(error)
        for words, option in WORDS.items():
            told = told.replace(words, option)
        raise SelectionError(told) from error
    if split == "train":
        return dataset.train
    if len(dataset.validation) == 0:
        raise SelectionError(f"--split validation, but MODEL's recipe holds out no images of {config.name}; use test")
    return dataset.validation


def _check_fit(network: Network, part: ImageSet, name: str) -> None:
    """Refuse images that the network cannot read, and labels that it has no class for.

    Raises:
        SelectionError: one line with both shapes.
    """
    shape = tuple(part.images.shape[1:])
    came = f"the images of {name} are {' x '.join(str(size) for size in shape)} (channels, height, width)"
    advice = "give the data set that the network was trained on by --data"
    layers = [layer for layer in network.modules() if isinstance(layer, Normalize | nn.Conv2d | nn.Linear)]
    # Normalisation is checked by itself: a grey image would be broadcast to three channels without a word.
    for layer in layers[:2]:
        channels = layer.mean.numel() if isinstance(layer, Normalize) else getattr(layer, "in_channels", shape[0])
        if channels != shape[0] and not (isinstance(layer, Normalize) and channels == 1):
            raise SelectionError(f"{came}, but the network reads {channels} channels; {advice}")
        if not isinstance(layer, Normalize):
            break
    try:
        with torch.no_grad():
            logits = network(to_pixels(part.images[:1]))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SelectionError(f"{came}, and the network cannot read them ({reason}); {advice}") from error
    if logits.shape != (1, network.num_classes):
        raise SelectionError(f"{came}; of one the network makes {tuple(logits.shape)} instead of its logits; {advice}")
    largest = int(part.labels.max())
    if largest >= network.num_classes or int(part.labels.min()) < 0:
        raise SelectionError(
            f"the labels of {name} go up to {largest}, but the network has {network.num_classes} classes, counted "
            f"from 0; {advice}"
        )


def _fingerprint(part: ImageSet) -> str:
    digest = hashlib.sha256(repr(tuple(part.images.shape)).encode())
    for array in (part.images.contiguous().numpy(), part.labels.contiguous().numpy()):
        digest.update(array.reshape(-1).data)
    return digest.hexdigest()[:16]
