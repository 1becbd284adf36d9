"""The stored forms of data sets: image folders, npz batches, Parquet shards, torchvision's files."""

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ccdist.config import DataConfig
from ccdist.data import DATA_DIR_VARIABLE, KNOWN, MissingDataError, load_dataset, load_test_set

# A JPEG of one colour is decoded to that colour up to the rounding of its colour transform.
JPEG_ERROR = 3


def colour(label: int) -> tuple[int, int, int]:
    """One colour for each label, so that an image shows its class."""
    return 40 * label + 10, 250 - 40 * label, 100


def encode(label: int, *, grey: bool = False, kind: str = "PNG", size: tuple[int, int] = (4, 5)) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("L", size, colour(label)[0]) if grey else Image.new("RGB", size, colour(label))
    image.save(buffer, kind)
    return buffer.getvalue()


def put(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def plain_folders(folder: Path, part: str, classes: list[str], count: int, *, grey: bool = False) -> None:
    """PART/CLASS/*.png, where a class that sorts first has label 0."""
    for label, name in enumerate(sorted(classes)):
        for number in range(count):
            put(folder / part / name / f"{number:03}.png", encode(label, grey=grey))


def mine(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(name="mine", path=str(folder), **options)


WNIDS = ["n03", "n01", "n02"]  # written in another order than that of the labels


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """TinyImageNet's own layout; every fourth training image and the validation images of n02 are grey."""
    for wnid in WNIDS:
        label = sorted(WNIDS).index(wnid)
        for number in range(8):
            data = encode(label, grey=number % 4 == 0, kind="JPEG")
            put(tmp_path / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", data)
        put(tmp_path / "train" / wnid / f"{wnid}_boxes.txt", b"boxes")
    lines = []
    for number, wnid in enumerate(["n02", "n03", "n01", "n02"] * 3):  # val_10 is not between val_1 and val_2
        label = sorted(WNIDS).index(wnid)
        put(tmp_path / "val" / "images" / f"val_{number}.JPEG", encode(label, grey=label == 1, kind="JPEG"))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    put(tmp_path / "val" / "val_annotations.txt", "".join(lines).encode())
    put(tmp_path / "test" / "images" / "test_0.JPEG", encode(0, kind="JPEG"))  # published without labels
    return tmp_path


def assert_shows_its_label(image: np.ndarray, label: int) -> None:
    grey = (image[0] == image[1]).all()
    expected = (colour(label)[0],) * 3 if grey else colour(label)
    for channel, value in zip(image, expected, strict=True):
        assert np.abs(channel.astype(int) - value).max() <= JPEG_ERROR


def test_tiny_imagenet_as_it_is_published(tiny_imagenet: Path) -> None:
    config = DataConfig(name="tiny_imagenet", path=str(tiny_imagenet), validation=0.25)
    dataset = load_dataset(config)
    assert (len(dataset.train), len(dataset.validation), dataset.num_classes) == (18, 6, 3)
    assert (dataset.input_shape, dataset.mean) == ((3, 5, 4), (0.4802, 0.4481, 0.3975))
    together = dataset.train.labels.tolist() + dataset.validation.labels.tolist()
    assert sorted(together) == [0] * 8 + [1] * 8 + [2] * 8
    test = load_test_set(config)
    assert test.labels.tolist() == [1, 2, 0, 1] * 3  # the order of the list
    for part in (dataset.train, dataset.validation, test):
        for image, label in zip(part.images.numpy(), part.labels.tolist(), strict=True):
            assert_shows_its_label(image, label)
    grey_test = [(image[0] == image[2]).all() for image in test.images.numpy()]
    assert grey_test == [label == 1 for label in test.labels.tolist()]


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_folders_of_classes(tmp_path: Path, name: str) -> None:
    plain_folders(tmp_path, "train", ["dog", "ant", "cat"], 4)
    plain_folders(tmp_path, name, ["dog", "ant", "cat"], 2)
    put(tmp_path / "train" / ".cache" / "0.png", b"not looked at")
    put(tmp_path / "train" / "ant" / "notes.txt", b"not looked at")
    test = load_test_set(mine(tmp_path))
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    dataset = load_dataset(mine(tmp_path))
    for part in (dataset.train, dataset.validation, test):
        for image, label in zip(part.images.numpy(), part.labels.tolist(), strict=True):
            assert image[:, 0, 0].tolist() == list(colour(label))


def test_a_test_folder_may_lack_a_class(tmp_path: Path) -> None:
    plain_folders(tmp_path, "train", ["ant", "cat", "dog"], 2)
    put(tmp_path / "test" / "dog" / "0.png", encode(2))
    assert load_test_set(mine(tmp_path)).labels.tolist() == [2]


def test_no_class_disappears_from_class_sorted_images(tmp_path: Path) -> None:
    classes = [f"class{number}" for number in range(5)]
    plain_folders(tmp_path, "train", classes, 12)
    dataset = load_dataset(mine(tmp_path, validation=0.3))
    # In the stored order the last 30 % would be two whole classes.
    for part in (dataset.train, dataset.validation):
        assert part.labels.unique().tolist() == list(range(5))
    counts = dataset.train.labels.bincount() + dataset.validation.labels.bincount()
    assert counts.tolist() == [12] * 5


def test_limits_do_not_change_the_number_of_classes(tmp_path: Path) -> None:
    plain_folders(tmp_path, "train", [f"class{number}" for number in range(5)], 4)
    dataset = load_dataset(mine(tmp_path, train_images=2, validation_images=1))
    assert (len(dataset.train), len(dataset.validation), dataset.num_classes) == (2, 1, 5)


def test_the_first_training_image_says_how_many_channels(tmp_path: Path) -> None:
    plain_folders(tmp_path, "train", ["ant", "bee"], 3, grey=True)
    plain_folders(tmp_path, "test", ["ant", "bee"], 1, grey=True)
    assert load_dataset(mine(tmp_path)).input_shape == (1, 5, 4)
    put(tmp_path / "train" / "ant" / "000.png", encode(0))
    assert load_dataset(mine(tmp_path)).input_shape == (3, 5, 4)
    assert load_test_set(mine(tmp_path)).images.shape == (2, 3, 5, 4)  # all grey, yet as the training images


def test_colour_among_grey_images_is_refused(tmp_path: Path) -> None:
    plain_folders(tmp_path, "train", ["ant", "bee"], 3, grey=True)
    put(tmp_path / "train" / "bee" / "001.png", encode(1))
    with pytest.raises(ValueError, match=r"cannot be used: its shape is \((3|1), 5, 4\), that of others"):
        load_dataset(mine(tmp_path))


def unknown_class(folder: Path) -> None:
    put(folder / "test" / "n01" / "0.JPEG", encode(0))
    (folder / "test" / "images").rename(folder / "test" / "n09")


def annotate(line: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        listing = folder / "val" / "val_annotations.txt"
        listing.write_text(listing.read_text() + line)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_class, r"n09 is no class of the training images; expected one of n01, n02, n03$"),
        (annotate("val_0.JPEG\tn01\t0\n"), r"line 13: 'val_0.JPEG' is listed twice or not in .*images$"),
        (annotate("val_12.JPEG\tn01\n"), r"line 13: 'val_12.JPEG' is listed twice or not in"),
        (annotate("val_12.JPEG\tn09\t1\n"), r"line 13: class is 'n09'; expected one of n01, n02, n03 after a tab"),
        (annotate("val_12.JPEG n01\n"), r"line 13: class is ''; expected one of"),
        (
            lambda folder: put(folder / "val" / "images" / "val_99.JPEG", encode(0)),
            r"images has 1 images that .*val_annotations\.txt does not list: val_99\.JPEG",
        ),
        (lambda folder: put(folder / "val" / "images" / "val_3.JPEG", b"no image"), r"val_3\.JPEG cannot be used: "),
        (
            lambda folder: put(folder / "val" / "images" / "val_3.JPEG", encode(0, size=(4, 4))),
            r"val_3\.JPEG cannot be used: its shape is \(3, 4, 4\), that of others \(3, 5, 4\)",
        ),
        (lambda folder: (folder / "train" / "n04").mkdir(), r"n04 has no images; expected files that end in \.jpeg"),
    ],
    ids=["class", "twice", "absent", "unknown class", "no tab", "unlisted", "broken", "other shape", "empty class"],
)
def test_folders_with_mistakes(tiny_imagenet: Path, change: Callable[[Path], None], message: str) -> None:
    config = DataConfig(name="tiny_imagenet", path=str(tiny_imagenet))
    change(tiny_imagenet)
    with pytest.raises(ValueError, match=message) as caught:
        load_test_set(config) if "n04" not in message else load_dataset(config)
    assert "\n" not in str(caught.value)


def test_many_classes_are_not_all_listed(tmp_path: Path) -> None:
    plain_folders(tmp_path, "train", [f"class{number}" for number in range(5)], 1)
    put(tmp_path / "test" / "class0" / "0.png", encode(0))
    put(tmp_path / "test" / "zebra" / "0.png", encode(0))
    with pytest.raises(ValueError, match=r"expected one of class0, class1, \.\.\. class4 \(5 in all\)"):
        load_test_set(mine(tmp_path))


def test_training_images_need_folders_of_classes(tmp_path: Path) -> None:
    put(tmp_path / "train" / "0.png", encode(0))
    with pytest.raises(ValueError, match=r"train has no class folders; expected train/CLASS"):
        load_dataset(mine(tmp_path))


def test_a_broken_first_image_is_named(tmp_path: Path) -> None:
    plain_folders(tmp_path, "train", ["ant", "bee"], 3)
    put(tmp_path / "train" / "ant" / "000.png", b"")
    with pytest.raises(ValueError, match=r"ant/000\.png cannot be used: cannot identify"):
        load_dataset(mine(tmp_path))


def test_test_images_without_labels_are_no_test_set(tiny_imagenet: Path) -> None:
    (tiny_imagenet / "val" / "val_annotations.txt").unlink()
    with pytest.raises(MissingDataError, match=r"no test images of another form; expected .*val/val_annotations\.txt"):
        load_test_set(DataConfig(name="tiny_imagenet", path=str(tiny_imagenet)))


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet64"])
def test_what_has_no_download_names_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(MissingDataError) as caught:
        load_dataset(DataConfig(name=name))
    for way in (str(tmp_path / name), "data.path", DATA_DIR_VARIABLE, "train/CLASS", "train_data_batch_1.npz"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


def batch(count: int, seed: int) -> dict[str, np.ndarray]:
    """The arrays of one ImageNet64 batch; labels are 1 to 7."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (count, 12288), np.uint8)
    return {"data": data, "labels": generator.integers(1, 8, count), "mean": data.mean(0)}


@pytest.fixture
def imagenet64(tmp_path: Path) -> Path:
    """Ten batches of 1 to 10 images, numbered as published: batch 10 comes last, not second."""
    for number in range(1, 11):
        np.savez(tmp_path / f"train_data_batch_{number}.npz", **batch(number, number))
    np.savez_compressed(tmp_path / "val_data.npz", **batch(6, 0))
    return tmp_path


def test_imagenet64_batches(imagenet64: Path) -> None:
    config = DataConfig(name="imagenet64", path=str(imagenet64), validation=0.2)
    dataset = load_dataset(config)
    assert (len(dataset.train), len(dataset.validation), dataset.num_classes) == (44, 11, 7)
    assert (dataset.input_shape, dataset.std) == ((3, 64, 64), (0.2153, 0.2111, 0.2121))
    batches = [batch(number, number) for number in range(1, 11)]
    data = np.concatenate([arrays["data"] for arrays in batches])
    labels = np.concatenate([arrays["labels"] for arrays in batches])
    row_of = {row.tobytes(): number for number, row in enumerate(data)}
    rows = []
    for part in (dataset.train, dataset.validation):
        found = [row_of[image.numpy().tobytes()] for image in part.images]
        assert part.labels.tolist() == (labels[found] - 1).tolist()
        rows += found
    assert sorted(rows) == list(range(55))
    test = load_test_set(config)
    assert np.array_equal(test.images.numpy().reshape(6, 12288), batch(6, 0)["data"])  # planes of red, green, blue
    assert test.labels.tolist() == (batch(6, 0)["labels"] - 1).tolist()


def test_batches_without_wanted_images_are_not_read(imagenet64: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ccdist import image_sources

    read: list[str] = []
    whole = image_sources._npz_array

    def counted(file: Path, key: str) -> np.ndarray:
        read.extend([file.name] * (key == "data"))
        return whole(file, key)

    monkeypatch.setattr(image_sources, "_npz_array", counted)
    config = DataConfig(name="imagenet64", path=str(imagenet64), train_images=2, validation_images=1)
    dataset = load_dataset(config)
    assert 1 <= len(read) <= 3
    assert dataset.num_classes == 7
    assert dataset.train.images.untyped_storage().nbytes() == 2 * 12288  # the other rows are not kept alive
    assert dataset.validation.images.untyped_storage().nbytes() == 12288


def replaced(**arrays: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        np.savez(file, **{**batch(6, 0), **arrays})

    return change


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(labels=np.arange(6)), r"labels are int64 of shape \(6,\); expected integers from 1 on"),
        (replaced(labels=np.ones((6, 1), int)), r"labels are int64 of shape \(6, 1\); expected integers"),
        (replaced(labels=np.ones(6)), r"labels are float64 of shape"),
        (
            replaced(labels=np.ones(5, int)),
            r"data is uint8 of shape \(6, 12288\); expected uint8 of shape \(5, 12288\)",
        ),
        (replaced(data=np.zeros((6, 3072), np.uint8)), r"uint8 of shape \(6, 3072\); expected uint8 of shape \(6, 122"),
        (replaced(data=np.zeros((6, 12288), np.float32)), r"data is float32 of shape"),
        (replaced(labels=np.array([{}] * 6)), r"is not a readable npz file with data and labels: Object arrays"),
        (lambda file: np.savez(file, images=np.zeros(3)), r"is not a readable npz .*: its keys are \['images'\]"),
        (lambda file: file.write_bytes(b"no archive"), r"is not a readable npz file with data and labels: "),
        (lambda file: file.write_bytes(b""), r"is not a readable npz file with data and labels: "),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), r"is not a readable npz .*: File is not a zip file"),
        (lambda file: file.write_bytes(npy(np.zeros(3))), r"is not a readable npz .*: it holds one array"),
    ],
    ids=[
        "from 0",
        "matrix",
        "float",
        "fewer",
        "32 x 32",
        "not bytes",
        "objects",
        "keys",
        "text",
        "empty",
        "cut",
        "npy",
    ],
)
def test_a_bad_npz_file_is_named(imagenet64: Path, change: Callable[[Path], None], message: str) -> None:
    change(imagenet64 / "val_data.npz")
    with pytest.raises(ValueError, match=r"val_data\.npz.*" + message) as caught:
        load_test_set(DataConfig(name="imagenet64", path=str(imagenet64)))
    assert "\n" not in str(caught.value)


def test_missing_batches_are_named(imagenet64: Path) -> None:
    (imagenet64 / "train_data_batch_3.npz").unlink()
    (imagenet64 / "train_data_batch_10.npz").unlink()
    config = DataConfig(name="imagenet64", path=str(imagenet64))
    with pytest.raises(ValueError, match=r"has no train_data_batch_3\.npz, train_data_batch_10\.npz; expected all of"):
        load_dataset(config)
    (imagenet64 / "val_data.npz").unlink()
    with pytest.raises(MissingDataError, match=r"no test\.parquet and no test images of another form"):
        load_test_set(config)


def write_parquet(file: Path, images: list[bytes], columns: dict[str, list[int]], image_column: str = "image") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = pa.array([{"bytes": data, "path": None} for data in images], kind)
    pq.write_table(pa.table({image_column: structs, **columns}), file)


@pytest.mark.parametrize("place", [".", "data"])
def test_parquet_shards_in_their_order(tmp_path: Path, place: str) -> None:
    labels = [[0, 1, 2], [3], [4, 5]]
    for number, part in reversed(list(enumerate(labels))):
        file = tmp_path / place / f"train-{number:05}-of-00003-0a1b2c.parquet"
        write_parquet(file, [encode(label) for label in part], {"label": part})
    write_parquet(tmp_path / place / "test-00000-of-00001.parquet", [encode(1), encode(0)], {"label": [1, 0]})
    dataset = load_dataset(mine(tmp_path, validation=0.4))
    assert (len(dataset.train), len(dataset.validation), dataset.num_classes) == (4, 2, 6)
    assert sorted(dataset.train.labels.tolist() + dataset.validation.labels.tolist()) == list(range(6))
    test = load_test_set(mine(tmp_path))
    assert test.labels.tolist() == [1, 0]
    for part in (dataset.train, dataset.validation, test):
        for image, label in zip(part.images.numpy(), part.labels.tolist(), strict=True):
            assert image[:, 0, 0].tolist() == list(colour(label))


def test_shards_give_the_same_data_set_as_one_file(tmp_path: Path) -> None:
    labels = [number % 3 for number in range(10)]
    images = [encode(label, size=(4, 5)) for label in labels]
    write_parquet(tmp_path / "one" / "train.parquet", images, {"label": labels})
    for number, (start, end) in enumerate([(0, 4), (4, 4), (4, 10)]):  # an empty shard too
        file = tmp_path / "many" / f"train-{number:05}-of-00003.parquet"
        write_parquet(file, images[start:end], {"label": pa.array(labels[start:end], pa.int64())})
    one, many = (load_dataset(mine(tmp_path / name)).fingerprint for name in ("one", "many"))
    assert one == many


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
@pytest.mark.parametrize("end", [".parquet", "-00000-of-00001-8a9f.parquet"])
def test_validation_files_stand_for_missing_test_files(tmp_path: Path, name: str, end: str) -> None:
    write_parquet(tmp_path / f"{name}{end}", [encode(1)], {"label": [1]})
    config = DataConfig(name="tiny_imagenet", path=str(tmp_path))
    assert load_test_set(config).labels.tolist() == [1]
    write_parquet(tmp_path / "test.parquet", [encode(2)], {"label": [2]})
    assert load_test_set(config).labels.tolist() == [2]


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001-of-00003.parquet", [encode(0)] * 3, {"label": [0, 1, 0]})
    with pytest.raises(ValueError, match=r"has 1 of the files like train-00001-of-00003\.parquet; expected 3"):
        load_dataset(mine(tmp_path))


def test_shards_of_different_shapes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-0.parquet", [encode(0)], {"label": [0]})
    write_parquet(tmp_path / "test-1.parquet", [encode(0, grey=True)], {"label": [0]})
    with pytest.raises(ValueError, match=r"one file have shape \(1, 5, 4\), those of another \(3, 5, 4\)"):
        load_test_set(mine(tmp_path))


def test_cifar100_from_parquet_uses_the_fine_labels(tmp_path: Path) -> None:
    columns = {"fine_label": [4, 2, 0, 1], "coarse_label": [0, 0, 1, 1]}
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [encode(label) for label in (4, 2, 0, 1)], columns, "img")
    config = DataConfig(name="cifar100", path=str(tmp_path), validation=0.25)
    assert load_test_set(config).labels.tolist() == [4, 2, 0, 1]
    dataset = load_dataset(config)
    assert (dataset.num_classes, dataset.mean) == (5, (0.5071, 0.4865, 0.4409))
    write_parquet(tmp_path / "test.parquet", [encode(0)], {"fine_label": [3], "label": [1]})
    assert load_test_set(config).labels.tolist() == [1]
    write_parquet(tmp_path / "test.parquet", [encode(0)], {"coarse_label": [3]})
    with pytest.raises(
        ValueError, match=r"columns are \['image', 'coarse_label'\]; expected image \(or img\) and label"
    ):
        load_test_set(config)


def test_grey_images_stand_for_rgb_only_where_they_are_known_to_occur(tmp_path: Path) -> None:
    images = [encode(2), encode(2, grey=True)]
    write_parquet(tmp_path / "test.parquet", images, {"label": [0, 1]})
    test = load_test_set(DataConfig(name="tiny_imagenet", path=str(tmp_path)))
    assert test.images[:, :, 0, 0].tolist() == [list(colour(2)), [colour(2)[0]] * 3]
    with pytest.raises(
        ValueError, match=r"image 1 cannot be used: its shape is \(1, 5, 4\), that of others \(3, 5, 4\)"
    ):
        load_test_set(DataConfig(name="cifar100", path=str(tmp_path)))


def test_an_empty_test_set_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [], {"label": pa.array([], pa.int64())})
    with pytest.raises(ValueError, match="data set mine has no test images"):
        load_test_set(mine(tmp_path))


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.mark.timeout(20)  # imports torchvision
def test_svhn_as_torchvision_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.io
    from torchvision.datasets import SVHN

    images = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), np.uint8)
    labels = np.array([10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10])  # 10 is the digit 0
    (tmp_path / "svhn").mkdir()
    for part, stored in (("train", images), ("test", 255 - images)):
        file = tmp_path / "svhn" / f"{part}_32x32.mat"
        scipy.io.savemat(file, {"X": stored.transpose(2, 3, 1, 0), "y": labels[:, None].astype(np.uint8)})
        monkeypatch.setitem(SVHN.split_list, part, ["", file.name, md5(file)])
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    config = DataConfig(name="svhn", validation=0.25)
    test = load_test_set(config)
    assert np.array_equal(test.images.numpy(), 255 - images)
    assert test.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]
    dataset = load_dataset(config)
    together = np.concatenate([dataset.validation.images, dataset.train.images])
    assert np.array_equal(together, images[np.random.default_rng(0).permutation(12)])
    assert (dataset.num_classes, dataset.input_shape, dataset.std) == (10, (3, 32, 32), (0.198, 0.201, 0.197))


@pytest.mark.timeout(20)  # imports torchvision
def test_cifar100_as_torchvision_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
    folder = tmp_path / "cifar100" / CIFAR100.base_folder
    folder.mkdir(parents=True)
    entry = {"data": images.reshape(5, 3072), "fine_labels": [99, 0, 3, 2, 1], "coarse_labels": [0] * 5}
    for name, content in (("train", entry), ("test", entry), ("meta", {"fine_label_names": ["apple"]})):
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(folder / "meta")})
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    test = load_test_set(DataConfig(name="cifar100"))
    assert np.array_equal(test.images.numpy(), images)
    assert test.labels.tolist() == [99, 0, 3, 2, 1]
    assert load_dataset(DataConfig(name="cifar100")).num_classes == 100


@pytest.mark.timeout(20)  # imports torchvision
def test_downloads_name_classes_that_torchvision_has() -> None:
    import torchvision

    named = [known.torchvision for known in KNOWN.values() if known.torchvision is not None]
    assert len(named) == 5
    for class_name in named:
        assert issubclass(getattr(torchvision.datasets, class_name), torchvision.datasets.VisionDataset)
