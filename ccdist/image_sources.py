"""Reading of images and labels in every form they are stored in; nothing here splits, limits or downloads unasked.

A folder holds a data set in one of three forms, looked for in this order: Parquet files, npz batches (ImageNet64),
image folders. Images are decoded only where asked for, so a limit on their number saves time and memory.

Shapes: `n` images asked for, `C H W` image.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Part = Literal["train", "test"]

# Validation images that were published with labels stand for the test set where the test labels were not.
PART_NAMES: dict[Part, tuple[str, ...]] = {"train": ("train",), "test": ("test", "valid", "validation", "val")}

FORMS = (
    "train.parquet and test.parquet (or train-*.parquet; valid or validation stands for test) with columns image "
    "({bytes, path}) and label; or image folders train/CLASS and test/CLASS (or val/CLASS, or val/images with "
    "val/val_annotations.txt); or train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz"
)

_IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
_NPZ_BATCHES = 10
_NPZ_SHAPE = (3, 64, 64)
_ANNOTATIONS = "val_annotations.txt"


@dataclass(frozen=True)
class Source:
    """One part of a data set, decoded only where asked for."""

    labels: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]  # indices -> uint8 [n, C, H, W]


def digits_source(part: Part) -> Source:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; the last 270 of a fixed permutation are the test set."""
    from sklearn.datasets import (
        load_digits,  # imported here: it takes a second that other data sets need not pay
    )

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    chosen = order[:-270] if part == "train" else order[-270:]
    images = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)[:, None]
    return Source(bunch.target[chosen], lambda indices: images[indices])


def torchvision_source(class_name: str, folder: Path, part: Part) -> Source:
    """A data set that torchvision knows, downloaded into the folder unless it is there.

    Raises:
        OSError, RuntimeError: it could not be downloaded.
    """
    import torchvision

    dataset_class = getattr(torchvision.datasets, class_name)
    if class_name == "SVHN":  # the one class with split=, labels, and images that are [n, C, H, W] already
        svhn = dataset_class(folder, split=part, download=True)
        return Source(svhn.labels, lambda indices: svhn.data[indices])
    data = dataset_class(folder, train=part == "train", download=True)
    array = np.asarray(data.data)
    images = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return Source(np.asarray(data.targets), lambda indices: images[indices])


def find_source(folder: Path, part: Part, *, grey_as_rgb: bool) -> Source | None:
    """The part in whichever form the folder holds it; None where it holds none.

    Args:
        grey_as_rgb: a grey image stands for one with three equal channels. Without it a grey image among others is
            refused, save in image folders whose first training image is RGB.

    Raises:
        ValueError: a file is incomplete or not what its name promises.
    """
    files = _parquet_files(folder, part)
    if files:
        return _joined([_parquet(file, grey_as_rgb) for file in files], folder)
    batches = _npz_files(folder, part)
    if batches:
        return _joined([_npz(file) for file in batches], folder)
    return _image_folder(folder, part, grey_as_rgb)


def _joined(sources: list[Source], folder: Path) -> Source:
    """Several files as one, in their order; of each only the images asked for stay in memory."""
    if len(sources) == 1:
        return sources[0]
    ends = np.cumsum([len(source.labels) for source in sources])

    def decode(indices: np.ndarray) -> np.ndarray:
        images: np.ndarray | None = None
        owners = np.searchsorted(ends, indices, side="right")
        for owner in np.unique(owners):
            positions = np.flatnonzero(owners == owner)
            start = ends[owner] - len(sources[owner].labels)
            decoded = sources[owner].decode(indices[positions] - start)
            if images is None:
                images = np.empty((len(indices), *decoded.shape[1:]), np.uint8)
            if decoded.shape[1:] != images.shape[1:]:  # an assignment would repeat one channel into three
                raise ValueError(
                    f"{folder}: images of one file have shape {decoded.shape[1:]}, those of another {images.shape[1:]}"
                )
            images[positions] = decoded
        assert images is not None
        return images

    return Source(np.concatenate([source.labels for source in sources]), decode)


def _parquet_files(folder: Path, part: Part) -> list[Path]:
    """One file, or all shards of one in their order, in the folder or its subfolder data."""
    for name in PART_NAMES[part]:
        for place in (folder, folder / "data"):
            whole = place / f"{name}.parquet"
            if whole.is_file():
                return [whole]
            shards = sorted(place.glob(f"{name}-*.parquet"))
            if shards:
                _check_shards(shards)
                return shards
    return []


def _check_shards(shards: list[Path]) -> None:
    """Names like train-00000-of-00002-0123abcd.parquet say how many files there must be."""
    for shard in shards:
        numbered = re.match(r"\w+-\d+-of-(\d+)", shard.name)
        if numbered and int(numbered[1]) != len(shards):
            raise ValueError(
                f"{shard.parent} has {len(shards)} of the files like {shard.name}; expected {int(numbered[1])}"
            )


def _parquet(file: Path, grey_as_rgb: bool) -> Source:
    try:
        names = pq.read_schema(file).names
        image_column = next((name for name in ("image", "img") if name in names), None)
        label_column = next((name for name in ("label", "fine_label") if name in names), None)
        if image_column is None or label_column is None:
            raise ValueError(f"columns are {names}; expected image (or img) and label (or fine_label)")
        table = pq.read_table(file, columns=[image_column, label_column])
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable Parquet file of images: {error}") from error
    column, labels = table[image_column], table[label_column]
    if not pa.types.is_struct(column.type) or "bytes" not in [field.name for field in column.type]:
        raise ValueError(f"{file}: column {image_column} has type {column.type}; expected a struct with bytes")
    if not pa.types.is_integer(labels.type) or labels.null_count or (len(labels) and pc.min(labels).as_py() < 0):
        raise ValueError(
            f"{file}: labels are {labels.type} with {labels.null_count} missing; expected integers from 0 on"
        )
    encoded = pc.struct_field(column, "bytes")
    return Source(
        labels.to_numpy(),
        lambda indices: _decode_images(
            indices, lambda row: encoded[row].as_py(), lambda row: f"{file}: image {row}", grey_as_rgb
        ),
    )


def _npz_files(folder: Path, part: Part) -> list[Path]:
    if part == "test":
        return [file for file in (folder / "val_data.npz",) if file.is_file()]
    expected = [folder / f"train_data_batch_{number}.npz" for number in range(1, _NPZ_BATCHES + 1)]
    missing = [file.name for file in expected if not file.is_file()]
    if len(missing) == len(expected):
        return []
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}; expected all of {expected[0].name} to {expected[-1].name}"
        )
    return expected


def _npz(file: Path) -> Source:
    """One batch of ImageNet64: rows of red, green and blue planes, labels from 1 on."""
    labels = _npz_array(file, "labels")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or (len(labels) and labels.min() < 1):
        raise ValueError(f"{file}: labels are {labels.dtype} of shape {labels.shape}; expected integers from 1 on")

    def decode(indices: np.ndarray) -> np.ndarray:
        data = _npz_array(file, "data")  # read again for each request: all batches together fill 16 GB
        expected = (len(labels), int(np.prod(_NPZ_SHAPE)))
        if data.dtype != np.uint8 or data.shape != expected:
            raise ValueError(f"{file}: data is {data.dtype} of shape {data.shape}; expected uint8 of shape {expected}")
        rows: np.ndarray = data[indices]  # a copy, so that the batch itself can go
        return rows.reshape(-1, *_NPZ_SHAPE)

    return Source(labels.astype(np.int64) - 1, decode)


def _npz_array(file: Path, key: str) -> np.ndarray:
    try:
        with file.open("rb") as stream:  # opened here: NumPy leaves a file that is no archive open
            archive = np.load(stream)  # refuses pickled objects
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            if key not in archive:
                raise ValueError(f"its keys are {list(archive)}")
            return np.asarray(archive[key])
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is not a readable npz file with data and labels: {' '.join(str(error).split())}"
        ) from error


def _image_folder(folder: Path, part: Part, grey_as_rgb: bool) -> Source | None:
    """Classes are the subfolders of train in the order of their names, for the test images too."""
    train = folder / "train"
    if not train.is_dir():
        return None
    classes = {path.name: label for label, path in enumerate(_subfolders(train))}
    if not classes:
        raise ValueError(f"{train} has no class folders; expected train/CLASS/*.png or train/CLASS/images/*.JPEG")
    labelled = _class_images(train, classes) if part == "train" else _test_images(folder, classes)
    if labelled is None:
        return None
    files, labels = [file for file, _ in labelled], [label for _, label in labelled]
    grey_as_rgb = grey_as_rgb or _is_rgb(_image_files(_subfolders(train)[0])[0])
    return Source(
        np.array(labels, np.int64),
        lambda indices: _decode_images(
            indices, lambda row: files[row].read_bytes(), lambda row: f"image {files[row]}", grey_as_rgb
        ),
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(class_folder: Path) -> list[Path]:
    """The images of a class in the order of their names: its own, or those of its subfolder images."""
    place = class_folder / "images" if (class_folder / "images").is_dir() else class_folder
    files = sorted(path for path in place.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{place} has no images; expected files that end in {', '.join(_IMAGE_SUFFIXES)}")
    return files


def _class_images(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    labelled: list[tuple[Path, int]] = []
    for class_folder in _subfolders(folder):
        if class_folder.name not in classes:
            raise ValueError(f"{class_folder} is no class of the training images; expected one of {_some(classes)}")
        labelled += [(file, classes[class_folder.name]) for file in _image_files(class_folder)]
    return labelled


def _test_images(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]] | None:
    for name in PART_NAMES["test"]:
        place = folder / name
        if (place / _ANNOTATIONS).is_file():
            return _annotated_images(place, classes)
        # A folder without any of the classes is passed over: TinyImageNet has test images without labels.
        if any((place / class_name).is_dir() for class_name in classes):
            return _class_images(place, classes)
    return None


def _annotated_images(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    """TinyImageNet's validation images in the order of its list: file name, class and a box on each line."""
    listing = folder / _ANNOTATIONS
    unlisted = {path.name for path in (folder / "images").glob("*") if path.suffix.lower() in _IMAGE_SUFFIXES}
    labelled = []
    for number, line in enumerate(listing.read_text("utf-8", "replace").splitlines(), 1):
        file_name, _, rest = line.partition("\t")
        class_name = rest.partition("\t")[0]
        if class_name not in classes:
            raise ValueError(
                f"{listing}, line {number}: class is {class_name!r}; expected one of {_some(classes)} after a tab"
            )
        if file_name not in unlisted:
            raise ValueError(f"{listing}, line {number}: {file_name!r} is listed twice or not in {folder / 'images'}")
        unlisted.remove(file_name)
        labelled.append((folder / "images" / file_name, classes[class_name]))
    if unlisted:
        raise ValueError(
            f"{folder / 'images'} has {len(unlisted)} images that {listing} does not list: {min(unlisted)}"
        )
    return labelled


def _some(classes: dict[str, int]) -> str:
    names = list(classes)
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} in all)"


def _decode_images(
    indices: np.ndarray, read: Callable[[int], bytes], name: Callable[[int], str], grey_as_rgb: bool
) -> np.ndarray:
    """Encoded images -> uint8 [n, C, H, W], filled in place: two copies of a large data set may not fit."""
    from PIL import UnidentifiedImageError

    images: np.ndarray | None = None
    for position, index in enumerate(indices.tolist()):
        try:
            pixels = _decode_image(read(index), grey_as_rgb)
            if images is None:
                images = np.empty((len(indices), *pixels.shape), np.uint8)
            if pixels.shape != images.shape[1:]:
                raise ValueError(f"its shape is {pixels.shape}, that of others {images.shape[1:]}")
        except (UnidentifiedImageError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{name(index)} cannot be used: {error}") from error
        images[position] = pixels
    assert images is not None
    return images


def _decode_image(data: bytes, grey_as_rgb: bool) -> np.ndarray:
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    if image.mode not in ("L", "RGB"):  # palette indices and 16-bit values would pass for pixels
        raise ValueError(f"its mode is {image.mode}; expected L or RGB, 8 bits a channel")
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        return pixels.transpose(2, 0, 1)
    return np.repeat(pixels[None], 3 if grey_as_rgb else 1, axis=0)


def _is_rgb(file: Path) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image.mode == "RGB"
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image {file} cannot be used: {error}") from error
