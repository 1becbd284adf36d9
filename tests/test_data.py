"""Data sets: fixed disjoint splits, Parquet, errors that help, augmentation."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ccdist.config import DataConfig
from ccdist.data import (
    DATA_DIR_VARIABLE,
    Dataset,
    ImageSet,
    MissingDataError,
    augment,
    batch_indices,
    load_dataset,
    load_test_set,
    num_batches,
    to_pixels,
)

DIGITS = DataConfig(name="digits", validation=0.24)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DIGITS)


def keys(part: ImageSet) -> list[bytes]:
    """One hashable value for each image with its label."""
    return [
        image.numpy().tobytes() + bytes([label]) for image, label in zip(part.images, part.labels.tolist(), strict=True)
    ]


def test_digits_are_split_as_promised(digits: Dataset) -> None:
    test = load_test_set(DIGITS)
    assert (len(digits.train), len(digits.validation), len(test)) == (1161, 366, 270)
    assert len(digits.validation) >= 350
    assert (digits.input_shape, digits.num_classes, digits.mean, digits.std) == ((1, 8, 8), 10, (0.0,), (1.0,))
    assert digits.train.images.dtype == torch.uint8
    assert int(digits.train.images.max()) == 255


def test_the_parts_are_disjoint_and_complete(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    everything = keys(digits.train) + keys(digits.validation) + keys(load_test_set(DIGITS))
    raw = load_digits()
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)
    assert sorted(everything) == sorted(keys(ImageSet(torch.from_numpy(images)[:, None], torch.from_numpy(raw.target))))
    # no digit occurs twice in the data set, so equal multisets of the right sizes mean disjoint parts
    assert len(set(everything)) == len(everything)


def test_every_class_is_in_every_part(digits: Dataset) -> None:
    for part in (digits.train, digits.validation, load_test_set(DIGITS)):
        assert part.labels.unique().tolist() == list(range(10))


def test_the_split_is_fixed(digits: Dataset) -> None:
    again = load_dataset(DIGITS)
    assert torch.equal(again.train.images, digits.train.images)
    assert again.fingerprint == digits.fingerprint
    # The first labels of this split: an accidental change of it would make studies incomparable.
    assert digits.validation.labels[:8].tolist() == [3, 7, 4, 8, 3, 6, 4, 3]
    other = load_dataset(DIGITS.model_copy(update={"split_seed": 1}))
    assert not torch.equal(other.validation.labels, digits.validation.labels)
    assert other.fingerprint != digits.fingerprint


@pytest.mark.parametrize("limits", [(10, 5), (1000, None), (None, 7)])
def test_limits_take_prefixes_of_their_own_part(digits: Dataset, limits: tuple[int | None, int | None]) -> None:
    config = DIGITS.model_copy(update={"train_images": limits[0], "validation_images": limits[1]})
    limited = load_dataset(config)
    for part, whole, limit in (
        (limited.train, digits.train, limits[0]),
        (limited.validation, digits.validation, limits[1]),
    ):
        assert len(part) == (len(whole) if limit is None else limit)
        assert torch.equal(part.images, whole.images[: len(part)])
        assert torch.equal(part.labels, whole.labels[: len(part)])


def test_limits_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1527 training images; a validation share of 0\.999 leaves 2|leaves 1"):
        load_dataset(DataConfig(name="digits", validation=0.9995))
    with pytest.raises(ValueError, match="leaves 1527 to train on and 0"):
        load_dataset(DataConfig(name="digits", validation=1e-4))


def test_the_fingerprint_sees_what_training_sees(digits: Dataset) -> None:
    prints = {
        load_dataset(DIGITS.model_copy(update=change)).fingerprint
        for change in ({}, {"flip": True}, {"crop_padding": 1}, {"train_images": 100}, {"mean": (0.1,)})
    }
    assert len(prints) == 5


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG") if mode else Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, images: list[bytes | None], labels: list[int], column: str = "image") -> None:
    structs = [{"bytes": data, "path": None} for data in images]
    for part in ("train", "test"):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({column: pa.array(structs, kind), "label": pa.array(labels, pa.int64()), "extra": labels})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=3)


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_round_trip(tmp_path: Path, column: str, channels: int) -> None:
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 256, (4, 5, 3) if channels == 3 else (4, 5), np.uint8) for _ in range(10)]
    write(tmp_path, [png(image) for image in pixels], list(range(10)), column)
    config = DataConfig(name="mine", path=str(tmp_path), validation=0.3)
    test = load_test_set(config)
    expected = np.stack([image[None] if channels == 1 else image.transpose(2, 0, 1) for image in pixels])
    assert np.array_equal(test.images.numpy(), expected)
    assert test.labels.tolist() == list(range(10))
    dataset = load_dataset(config)
    assert (len(dataset.train), len(dataset.validation), dataset.num_classes) == (7, 3, 10)
    assert dataset.input_shape == (channels, 4, 5)
    for part in (dataset.train, dataset.validation):
        assert np.array_equal(part.images.numpy(), expected[part.labels.numpy()])  # the label is the row
    assert sorted(dataset.train.labels.tolist() + dataset.validation.labels.tolist()) == list(range(10))


def test_the_folder_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", [png(np.zeros((2, 2), np.uint8))] * 4, [0, 1, 0, 1])
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    assert len(load_test_set(DataConfig(name="mine"))) == 4


@pytest.mark.timeout(20)  # imports torchvision
def test_missing_data_names_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    class Unreachable:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise OSError("no network")

    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Unreachable)
    with pytest.raises(MissingDataError) as caught:
        load_dataset(DataConfig(name="cifar10"))
    for way in ("no network", "data.path", "--set data.path=DIR", DATA_DIR_VARIABLE, "train.parquet", "run once"):
        assert way in str(caught.value)


def test_other_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(MissingDataError, match=r"unknown data set 'cifar'; known: digits, mnist.*data\.path"):
        load_dataset(DataConfig(name="cifar"))
    with pytest.raises(MissingDataError, match=r"has no train\.parquet"):
        load_dataset(DataConfig(name="mine", path=str(tmp_path)))


GREY = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (png(GREY)[:43], "image 2 cannot be used"),
        (b"no image", "image 2 cannot be used"),
        (None, "image 2 cannot be used"),
        (png(np.zeros((5, 4), np.uint8)), "image 2 cannot be used: its shape"),
        (png(np.zeros((4, 4), np.uint16)), r"image 2 cannot be used: its mode is I;16"),
        (png(np.zeros((4, 4, 4), np.uint8)), r"image 2 cannot be used: its mode is RGBA"),
    ],
    ids=["truncated", "text", "null", "other shape", "16 bits", "alpha"],
)
def test_a_bad_image_is_named_by_its_row(tmp_path: Path, bad: bytes | None, message: str) -> None:
    write(tmp_path, [png(GREY), png(GREY), bad, png(GREY)], [0, 1, 0, 1])
    with pytest.raises(ValueError, match=message):
        load_test_set(DataConfig(name="mine", path=str(tmp_path)))


def test_a_corrupt_parquet_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, [png(GREY)] * 4, [0, 1, 0, 1])
    file = tmp_path / "train.parquet"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train\.parquet is not a readable Parquet file"):
        load_dataset(DataConfig(name="mine", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"pixels": [1], "label": [0]}), "columns are .*expected image"),
        (pa.table({"image": [{"bytes": b""}]}), "columns are"),
        (pa.table({"image": [b"raw"], "label": [0]}), "has type binary; expected a struct with bytes"),
        (pa.table({"image": [{"path": "a.png"}], "label": [0]}), "expected a struct with bytes"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=message):
        load_test_set(DataConfig(name="mine", path=str(tmp_path)))


def test_normalisation_must_fit_the_channels() -> None:
    with pytest.raises(ValueError, match=r"data\.mean and data\.std have 3 and 1 values"):
        load_dataset(DataConfig(name="digits", mean=(0.1, 0.2, 0.3)))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 1000), padding=st.integers(1, 3), flip=st.booleans())
def test_augmentation_is_a_crop_of_the_padded_image_perhaps_mirrored(seed: int, padding: int, flip: bool) -> None:
    images = torch.randint(0, 256, (6, 2, 5, 4), generator=generator(seed), dtype=torch.uint8)
    kept = images.clone()
    augmented = augment(images, flip=flip, crop_padding=padding, generator=generator(seed))
    assert torch.equal(images, kept)
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.uint8
    shifts = range(-padding, padding + 1)
    for image, result in zip(images, augmented, strict=True):
        crops = [oracles.shifted_crop(image, down, right, padding) for down in shifts for right in shifts]
        if flip:
            crops += [crop.flip(2) for crop in crops]
        assert any(torch.equal(result, crop) for crop in crops)


def test_every_shift_and_both_mirrors_occur() -> None:
    image = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5)
    many = augment(image.expand(600, 1, 5, 5), flip=True, crop_padding=1, generator=generator(0))
    seen = {tuple(result.flatten().tolist()) for result in many}
    assert len(seen) == 3 * 3 * 2


def test_flip_mirrors_about_half() -> None:
    image = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)
    many = augment(image.expand(1000, 1, 2, 2), flip=True, crop_padding=0, generator=generator(0))
    mirrored = (many == image.flip(3)).flatten(1).all(1)
    assert ((many == image).flatten(1).all(1) | mirrored).all()
    assert abs(int(mirrored.sum()) - 500) < 5 * 250**0.5  # five standard deviations of a fair coin


def test_without_augmentation_nothing_is_drawn() -> None:
    images, stream = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), generator(0)
    before = stream.get_state()
    assert augment(images, flip=False, crop_padding=0, generator=stream) is images
    assert torch.equal(stream.get_state(), before)


def test_validation_images_are_never_augmented(digits: Dataset) -> None:
    augmented = load_dataset(DIGITS.model_copy(update={"flip": True, "crop_padding": 2}))
    assert (augmented.flip, augmented.crop_padding) == (True, 2)
    assert torch.equal(augmented.validation.images, digits.validation.images)
    assert torch.equal(augmented.train.images, digits.train.images)  # augmentation happens in the training step


@given(num_images=st.integers(2, 200), batch_size=st.integers(2, 64), seed=st.integers(0, 100))
def test_batches_cover_all_images_once(num_images: int, batch_size: int, seed: int) -> None:
    batches = batch_indices(num_images, batch_size, generator(seed))
    together: Tensor = torch.cat(batches)
    assert sorted(together.tolist()) == list(range(num_images))
    assert len(batches) == num_batches(num_images, batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 2 <= len(batches[-1]) <= batch_size + 1


def test_a_last_image_alone_joins_the_batch_before() -> None:
    assert [len(batch) for batch in batch_indices(9, 4, generator(0))] == [4, 5]
    assert [len(batch) for batch in batch_indices(10, 4, generator(0))] == [4, 4, 2]
    assert [len(batch) for batch in batch_indices(1, 4, generator(0))] == [1]


def test_pixels_are_255ths() -> None:
    images = torch.tensor([[[[0, 1, 128, 255]]]], dtype=torch.uint8)
    assert to_pixels(images).flatten().tolist() == [0.0, pytest.approx(1 / 255), pytest.approx(128 / 255), 1.0]
