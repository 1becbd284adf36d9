"""Data sets as uint8 tensors, with a fixed split made before any augmentation.

The objectives of a search are measured on the validation part of the training set; the test set has its own
function, so that no search reads it by accident.

Shapes: `N` images, `B` batch, `C H W` image.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ccdist.config import DataConfig
from ccdist.image_sources import FORMS, Part, Source, digits_source, find_source, torchvision_source

DATA_DIR_VARIABLE = "CCDIST_DATA_DIR"


class MissingDataError(ValueError):
    """A data set is not to be found; the text names the ways to provide it."""


@dataclass(frozen=True)
class ImageSet:
    """Images [N, C, H, W] as uint8 (255 is pixel value 1) and their labels [N]."""

    images: UInt8[Tensor, "N C H W"]
    labels: Int[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device))


Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Dataset:
    """Training and validation images of one configuration, and how to normalise them.

    split: what stands in the place of the validation images. Test images are measured on once, at the end of a
        training: nothing looks at them before.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop_padding: int
    fingerprint: str
    split: Split = "validation"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class _Known:
    """Normalisation of a data set as it is usual in certified training, and where its files are unusual."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    torchvision: str | None = None  # the class to download with
    grey_as_rgb: bool = False  # some of its JPEG files are grey


# Augmentation is the space file's own (data.flip, data.crop_padding). Usual: flip and 2 for cifar10 and cifar100, flip
# and 4 for tiny_imagenet and imagenet64; never flip for digits, mnist and svhn, whose mirrored figures are others.
KNOWN = {
    "digits": _Known((0.0,), (1.0,)),
    "mnist": _Known((0.1307,), (0.3081,), "MNIST"),
    "fashion_mnist": _Known((0.2860,), (0.3530,), "FashionMNIST"),
    "cifar10": _Known((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "CIFAR10"),
    "cifar100": _Known((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR100"),
    "svhn": _Known((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "SVHN"),
    "tiny_imagenet": _Known((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), grey_as_rgb=True),
    "imagenet64": _Known((0.4815, 0.4578, 0.4082), (0.2153, 0.2111, 0.2121), grey_as_rgb=True),
}


def to_pixels(images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """uint8 -> float32 pixels in [0, 1]."""
    return images.float() / 255


def load_dataset(config: DataConfig) -> Dataset:
    """Training and validation images: a seeded permutation of the training set, validation first, or none of it.

    Limits on the number of images take a prefix of their own part, so they never move an image across.

    Raises:
        MissingDataError: the data set is not to be found.
        ValueError: the limits leave nothing, or normalisation does not fit the channels.
    """
    source = _open(config, "train")
    order = np.random.default_rng(config.split_seed).permutation(len(source.labels))
    num_validation = round(config.validation * len(order))
    validation = order[:num_validation][: config.validation_images]
    train = order[num_validation:][: config.train_images]
    if len(train) < 2 or (len(validation) == 0 and config.validation > 0):
        raise ValueError(
            f"data set {config.name} has {len(order)} training images; a validation share of {config.validation} "
            f"leaves {len(train)} to train on and {len(validation)} to validate on"
        )
    decoded = _decode(source, train)
    none = ImageSet(decoded.images[:0], decoded.labels[:0])
    parts = [decoded, _decode(source, validation) if len(validation) else none]
    channels = parts[0].images.shape[1]
    known = KNOWN.get(config.name, _Known((0.0,) * channels, (1.0,) * channels))
    mean, std = config.mean or known.mean, config.std or known.std
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"data.mean and data.std have {len(mean)} and {len(std)} values; the images of {config.name} "
            f"have {channels} channels"
        )
    return Dataset(
        name=config.name,
        train=parts[0],
        validation=parts[1],
        num_classes=int(source.labels.max()) + 1,
        mean=mean,
        std=std,
        flip=config.flip,
        crop_padding=config.crop_padding,
        fingerprint=_fingerprint(parts, config.name, mean, std, config.flip, config.crop_padding),
    )


def load_test_set(config: DataConfig, first: int | None = None) -> ImageSet:
    """The test images in their stored order, or the first so many; for the final report only."""
    source = _open(config, "test")
    count = len(source.labels)
    if count == 0:
        raise ValueError(f"data set {config.name} has no test images")
    if first is not None and first > count:
        raise ValueError(f"data set {config.name} has {count} test images; {first} were asked for")
    return _decode(source, np.arange(count if first is None else first))


def final_dataset(searched: Dataset, test: ImageSet) -> Dataset:
    """Trained on the training and the validation images of a search, measured on the test set.

    Its fingerprint is of what it holds, so it is another one with other test images.
    """
    parts = (searched.train, searched.validation)
    train = ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    if test.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"test images of {searched.name} have the shape {list(test.images.shape[1:])}, "
            f"training images {list(train.images.shape[1:])}"
        )
    described = (searched.name, searched.mean, searched.std, searched.flip, searched.crop_padding)
    fingerprint = _fingerprint([train, test], *described)
    return replace(searched, train=train, validation=test, fingerprint=fingerprint, split="test")


def _decode(source: Source, indices: np.ndarray) -> ImageSet:
    images = torch.from_numpy(np.ascontiguousarray(source.decode(indices)))
    return ImageSet(images, torch.from_numpy(source.labels[indices].astype(np.int64)))


def _fingerprint(parts: list[ImageSet], *described: object) -> str:
    digest = hashlib.sha256(repr(described).encode())
    for part in parts:
        for array in (part.images.numpy(), part.labels.numpy()):
            digest.update(array.reshape(-1).data)  # not tobytes: ImageNet64 would be in memory twice
    return digest.hexdigest()[:16]


def _open(config: DataConfig, part: Part) -> Source:
    if config.name == "digits" and config.path is None:
        return digits_source(part)
    known = KNOWN.get(config.name)
    if config.path is not None:
        folder = Path(config.path)
    else:
        folder = Path(os.environ.get(DATA_DIR_VARIABLE) or "data") / config.name
    source = find_source(folder, part, grey_as_rgb=known is not None and known.grey_as_rgb)
    if source is not None:
        return source
    if config.path is not None:
        raise MissingDataError(
            f"data.path {config.path} has no {part}.parquet and no {part} images of another form; expected {FORMS}"
        )
    if known is None:
        raise MissingDataError(
            f"unknown data set {config.name!r}; known: {', '.join(KNOWN)}; your own data needs data.path, a folder "
            f"with {FORMS}"
        )
    return _download(config.name, known.torchvision, folder, part)


def _download(name: str, class_name: str | None, folder: Path, part: Part) -> Source:
    ways = (
        f"set data.path (or --set data.path=DIR) to a folder with {FORMS}; or set {DATA_DIR_VARIABLE}=DIR, with the "
        f"same in DIR/{name}"
    )
    if class_name is None:
        raise MissingDataError(f"no {part} images of {name} in {folder}, and it has no download here; {ways}")
    try:
        return torchvision_source(class_name, folder, part)
    except (OSError, RuntimeError) as error:
        raise MissingDataError(
            f"data set {name} is not in {folder} and could not be downloaded ({error}). Provide it in one of these "
            f"ways: {ways}; or run once with a network"
        ) from error


def augment(
    images: UInt8[Tensor, "B C H W"], *, flip: bool, crop_padding: int, generator: torch.Generator
) -> UInt8[Tensor, "B C H W"]:
    """Each image mirrored with probability 1/2 and shifted by up to crop_padding pixels, edge pixels repeated.

    A shift equals a random crop of the image padded by its edges. Runs where the images and generator live.
    """
    if not flip and crop_padding == 0:
        return images
    batch, _, height, width = images.shape
    device = images.device

    def positions(size: int) -> Tensor:
        shift = torch.randint(-crop_padding, crop_padding + 1, (batch, 1), generator=generator, device=device)
        return (torch.arange(size, device=device) + shift).clamp(0, size - 1)

    rows, columns = positions(height), positions(width)
    if flip:
        mirrored = torch.rand((batch, 1), generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    picked = images[torch.arange(batch, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def batch_indices(
    num_images: int, batch_size: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """A random order cut into batches; a last image left alone joins the batch before it.

    One image has no batch statistics, so it must not be a batch of its own. The order goes to the device in one copy.
    """
    order = torch.randperm(num_images, generator=generator).to(device)
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def num_batches(num_images: int, batch_size: int) -> int:
    """How many batches `batch_indices` makes."""
    count = -(-num_images // batch_size)
    return count - 1 if count > 1 and num_images % batch_size == 1 else count
