"""Data sets as uint8 tensors, with a fixed split made before any augmentation.

The objectives of a search are measured on the validation part of the training set; the test set has its own
function, so that no search reads it by accident.

Shapes: `N` images, `B` batch, `C H W` image.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ccdist.config import DataConfig

DATA_DIR_VARIABLE = "CCDIST_DATA_DIR"
Part = Literal["train", "test"]


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


@dataclass(frozen=True)
class Dataset:
    """Training and validation images of one configuration, and how to normalise them."""

    name: str
    train: ImageSet
    validation: ImageSet
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop_padding: int
    fingerprint: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class _Source:
    """One part of a data set, decoded only where asked for."""

    labels: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]  # indices -> uint8 [n, C, H, W]


@dataclass(frozen=True)
class _Known:
    """Normalisation as in METHOD section F, and the torchvision class to download with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    torchvision: str | None


KNOWN = {
    "digits": _Known((0.0,), (1.0,), None),
    "mnist": _Known((0.1307,), (0.3081,), "MNIST"),
    "fashion_mnist": _Known((0.2860,), (0.3530,), "FashionMNIST"),
    "cifar10": _Known((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "CIFAR10"),
}


def to_pixels(images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """uint8 -> float32 pixels in [0, 1]."""
    return images.float() / 255


def load_dataset(config: DataConfig) -> Dataset:
    """Training and validation images: a seeded permutation of the training set, validation first.

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
    if len(validation) == 0 or len(train) < 2:
        raise ValueError(
            f"data set {config.name} has {len(order)} training images; a validation share of {config.validation} "
            f"leaves {len(train)} to train on and {len(validation)} to validate on"
        )
    parts = [_decode(source, indices) for indices in (train, validation)]
    channels = parts[0].images.shape[1]
    known = KNOWN.get(config.name, _Known((0.0,) * channels, (1.0,) * channels, None))
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
        fingerprint=_fingerprint(parts, mean, std, config),
    )


def load_test_set(config: DataConfig) -> ImageSet:
    """The test images in their stored order; for the final report only."""
    source = _open(config, "test")
    return _decode(source, np.arange(len(source.labels)))


def _decode(source: _Source, indices: np.ndarray) -> ImageSet:
    images = torch.from_numpy(np.ascontiguousarray(source.decode(indices)))
    return ImageSet(images, torch.from_numpy(source.labels[indices].astype(np.int64)))


def _fingerprint(parts: list[ImageSet], mean: tuple[float, ...], std: tuple[float, ...], config: DataConfig) -> str:
    digest = hashlib.sha256(repr((config.name, mean, std, config.flip, config.crop_padding)).encode())
    for part in parts:
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    return digest.hexdigest()[:16]


def _open(config: DataConfig, part: Part) -> _Source:
    if config.name == "digits" and config.path is None:
        return _digits(part)
    data_dir = os.environ.get(DATA_DIR_VARIABLE)
    if config.path is not None:
        folder = Path(config.path)
    else:
        folder = Path(data_dir or "data") / config.name
    file = folder / f"{part}.parquet"
    if file.is_file():
        return _parquet(file)
    if config.path is not None:
        raise MissingDataError(
            f"data.path {config.path} has no {part}.parquet; expected train.parquet and test.parquet with columns "
            "image ({bytes, path}) and label"
        )
    known = KNOWN.get(config.name)
    if known is None or known.torchvision is None:
        raise MissingDataError(
            f"unknown data set {config.name!r}; known: {', '.join(KNOWN)}; your own data needs data.path, a folder "
            "with train.parquet and test.parquet"
        )
    return _torchvision(config.name, known.torchvision, folder, part)


def _digits(part: Part) -> _Source:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; the last 270 of a fixed permutation are the test set."""
    from sklearn.datasets import (
        load_digits,  # imported here: it takes a second that other data sets need not pay
    )

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    chosen = order[:-270] if part == "train" else order[-270:]
    images = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)[:, None]
    return _Source(bunch.target[chosen], lambda indices: images[indices])


def _parquet(file: Path) -> _Source:
    try:
        schema = pq.read_schema(file)
        image_column = next((name for name in ("image", "img") if name in schema.names), None)
        if image_column is None or "label" not in schema.names:
            raise ValueError(f"columns are {schema.names}; expected image (or img) and label")
        table = pq.read_table(file, columns=[image_column, "label"])
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable Parquet file of images: {error}") from error
    column = table[image_column].combine_chunks()
    if not pa.types.is_struct(column.type) or "bytes" not in [field.name for field in column.type]:
        raise ValueError(f"{file}: column {image_column} has type {column.type}; expected a struct with bytes")
    labels = table["label"]
    if not pa.types.is_integer(labels.type) or labels.null_count or (len(labels) and pc.min(labels).as_py() < 0):
        raise ValueError(
            f"{file}: labels are {labels.type} with {labels.null_count} missing; expected integers from 0 on"
        )
    encoded = column.field("bytes")
    return _Source(
        table["label"].to_numpy(),
        lambda indices: _decode_images(file, ((int(i), encoded[int(i)].as_py()) for i in indices)),
    )


def _decode_images(file: Path, encoded: Iterator[tuple[int, bytes]]) -> np.ndarray:
    from PIL import UnidentifiedImageError

    decoded: list[np.ndarray] = []
    for row, data in encoded:
        try:
            decoded.append(_decode_image(data))
            if decoded[-1].shape != decoded[0].shape:
                raise ValueError(f"its shape is {decoded[-1].shape}, that of others {decoded[0].shape}")
        except (UnidentifiedImageError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: image {row} cannot be used: {error}") from error
    return np.stack(decoded)


def _decode_image(data: bytes) -> np.ndarray:
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    if image.mode not in ("L", "RGB"):  # palette indices and 16-bit values would pass for pixels
        raise ValueError(f"its mode is {image.mode}; expected L or RGB, 8 bits a channel")
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _torchvision(name: str, class_name: str, folder: Path, part: Part) -> _Source:
    import torchvision

    try:
        data = getattr(torchvision.datasets, class_name)(folder, train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise MissingDataError(
            f"data set {name} is not in {folder} and could not be downloaded ({error}). Provide it in one of these "
            f"ways: set data.path (or --set data.path=DIR) to a folder with train.parquet and test.parquet; set "
            f"{DATA_DIR_VARIABLE}=DIR with DIR/{name}/train.parquet; or run once with a network"
        ) from error
    array = np.asarray(data.data)
    images = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return _Source(np.asarray(data.targets), lambda indices: images[indices])


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


def batch_indices(num_images: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """A random order cut into batches; a last image left alone joins the batch before it.

    One image has no batch statistics, so it must not be a batch of its own.
    """
    order = torch.randperm(num_images, generator=generator)
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def num_batches(num_images: int, batch_size: int) -> int:
    """How many batches `batch_indices` makes."""
    count = -(-num_images // batch_size)
    return count - 1 if count > 1 and num_images % batch_size == 1 else count
