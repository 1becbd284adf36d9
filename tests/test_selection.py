"""MODEL, --data, --images, --norm, --epsilon: what they choose, and one line for each mistake."""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from train_cases import QUICK, TINY
from train_cases import run as train

from ccdist import checkpoint, selection
from ccdist.config import DataConfig
from ccdist.data import DATA_DIR_VARIABLE, load_dataset, load_test_set, to_pixels
from ccdist.networks import Network, Normalize, build_network
from ccdist.selection import Selection, SelectionError, parse_images

RECIPE = {
    "data": {"name": "digits", "validation": 0.1, "split_seed": 5},
    "threat": {"norm": "linf", "epsilon": "1/20"},
}
DIGITS = ("--data", "digits", "--epsilon", "2/255")


def load(*arguments: Any) -> Selection:
    parser = argparse.ArgumentParser()
    selection.add_arguments(parser)
    return selection.load(parser.parse_args([str(argument) for argument in arguments]))


def refused(*arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the texts are what the tests look at
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")

    def stored(name: str, shape: tuple[int, int, int], classes: int = 10, **metadata: Any) -> None:
        network = build_network("mlp", input_shape=shape, num_classes=classes, width=4)
        checkpoint.save(folder / name, network, metadata)

    stored("plain", (1, 8, 8))
    stored("trained", (1, 8, 8), recipe=RECIPE)
    stored("larger", (1, 9, 9))
    stored("colour", (3, 8, 8))
    stored("five", (1, 8, 8), classes=5)
    stored("odd", (1, 8, 8), recipe={"threat": {"norm": "linf", "epsilon": "7"}})
    stored("whole", (1, 8, 8), recipe=RECIPE | {"data": {"name": "digits", "validation": 0}})
    return folder


def test_all_test_images_of_a_plain_model(models: Path) -> None:
    chosen = load(models / "plain", *DIGITS)
    test = load_test_set(DataConfig(name="digits"))
    assert torch.equal(chosen.images, to_pixels(test.images))
    assert torch.equal(chosen.labels, test.labels)
    assert chosen.labels.dtype == torch.int64
    assert chosen.indices == range(len(test))
    assert (chosen.data_name, chosen.split, chosen.model_path) == ("digits", "test", models / "plain")
    assert (chosen.threat.norm, chosen.threat.epsilon) == ("linf", Fraction(2, 255))
    assert not any(module.training for module in chosen.network.modules())


def test_some_images(models: Path) -> None:
    everything, some = load(models / "plain", *DIGITS), load(models / "plain", *DIGITS, "--images", "20:25")
    assert some.indices == range(20, 25)
    assert len(some) == 5
    assert torch.equal(some.images, everything.images[20:25])
    assert torch.equal(some.labels, everything.labels[20:25])
    others = load(models / "plain", *DIGITS, "--images", "21:26")
    assert len({each.data_fingerprint for each in (everything, some, others)}) == 3
    assert load(models / "plain", *DIGITS, "--images", "20:25").data_fingerprint == some.data_fingerprint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, range(50)),
        (":", range(50)),
        ("0:10", range(10)),
        (":10", range(10)),
        ("40:", range(40, 50)),
        ("40:1000", range(40, 50)),
        ("7", range(7, 8)),
        ("49", range(49, 50)),
    ],
)
def test_images_are_chosen_as_in_python(text: str | None, expected: range) -> None:
    assert parse_images(text, 50) == expected


@pytest.mark.parametrize("text", ["", "a", "1:2:3", "-1", "1.5", "3-5", "²", "1" * 60])
def test_other_texts_name_no_images(text: str) -> None:
    with pytest.raises(SelectionError, match=r"expected START:STOP|leaves no image"):
        parse_images(text, 50)


@pytest.mark.parametrize("text", ["50", "5:5", "9:3", "50:60", ":0"])
def test_no_image_is_refused(text: str) -> None:
    with pytest.raises(SelectionError, match=f"--images {text} leaves no image; there are 50, counted from 0"):
        parse_images(text, 50)


def test_a_trained_model_needs_no_arguments(models: Path) -> None:
    chosen = load(models / "trained")
    assert (chosen.data_name, str(chosen.threat)) == ("digits", "linf 1/20")
    stored = load_dataset(DataConfig(name="digits", validation=0.1, split_seed=5))
    validation = load(models / "trained", "--split", "validation")
    assert torch.equal(validation.images, to_pixels(stored.validation.images))
    train_part = load(models / "trained", "--split", "train", "--images", ":30")
    assert torch.equal(train_part.labels, stored.train.labels[:30])


def test_arguments_go_before_what_is_stored(models: Path) -> None:
    assert str(load(models / "trained", "--epsilon", "0.1").threat) == "linf 1/10"
    assert str(load(models / "trained", "--norm", "l2", "--epsilon", "3/2").threat) == "l2 3/2"


@pytest.mark.timeout(60)
def test_a_finished_training_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert train(tmp_path / "tiny.yaml", "--out", tmp_path / "out", *QUICK) == 0
    chosen = load(tmp_path / "out", "--images", ":3")
    assert chosen.model_path == tmp_path / "out" / "student"
    assert str(chosen.threat) == "linf 1/20"
    assert load(tmp_path / "out" / "teacher", "--images", ":3").model_path == tmp_path / "out" / "teacher"


def test_a_data_set_of_ones_own(models: Path, tmp_path: Path) -> None:
    stored = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8)
    rows = []
    for label, pixels in enumerate(stored):
        Image.fromarray(pixels).save(tmp_path / "image.png")
        rows.append({"image": {"bytes": (tmp_path / "image.png").read_bytes(), "path": "x.png"}, "label": label})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    chosen = load(models / "plain", "--data", "mine", "--path", tmp_path, "--epsilon", "1/10")
    assert torch.equal(chosen.images[:, 0], torch.from_numpy(stored).float() / 255)
    assert chosen.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("plain", "--data", "digits"), "--epsilon is missing, and MODEL does not store one"),
        (("trained", "--norm", "l2"), "--epsilon is missing, and MODEL's own is for linf"),
        (("plain", "--epsilon", "2/255"), "--data is missing, and MODEL does not store it; known: digits"),
        (("plain", "--data", "digits", "--epsilon", "8"), "--epsilon: epsilon is 8; expected a radius above 0"),
        (("plain", "--data", "digits", "--epsilon", "8"), "write 8/255 if that is what you mean"),
        (("plain", "--data", "digits", "--epsilon", "many"), "got many"),
        (("odd", "--data", "digits"), "MODEL's recipe: threat.epsilon: epsilon is 7"),
        (("plain", "--data", "digit", "--epsilon", "0.1"), "unknown --data 'digit'; known: digits"),
        (("plain", "--data", "digit", "--epsilon", "0.1"), "your own data needs --path, a folder with Parquet files"),
        (("plain", *DIGITS, "--path", "/nowhere"), "/nowhere has no test.parquet"),
        (("whole", "--split", "validation"), "holds out no images of digits"),
        (("larger", *DIGITS), "the images of digits are 1 x 8 x 8 (channels, height, width), and the network cannot"),
        (("colour", *DIGITS), "the network reads 3 channels"),
        (("five", *DIGITS), "the labels of digits go up to 9, but the network has 5 classes"),
        (("", *DIGITS), "holds no network.json"),
        (("missing", *DIGITS), "missing is not there"),
        (("plain/network.json", *DIGITS), "network.json is no folder"),
    ],
)
def test_each_mistake_has_its_line(models: Path, arguments: tuple[str, ...], expected: str) -> None:
    model, *rest = arguments
    assert expected in refused(models / model, *rest)


def test_missing_data_is_told_by_the_options(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    answers = [
        refused(models / "plain", "--data", "tiny_imagenet", "--epsilon", "0.1"),
        refused(models / "plain", "--data", "mine", "--epsilon", "0.1"),
        refused(models / "plain", *DIGITS, "--path", "/nowhere", "--split", "train"),
    ]
    assert "give a folder by --path" in answers[0]
    for answer in answers:
        assert "--path" in answer
        assert "data.path" not in answer
        assert "--set" not in answer
        assert len(answer) < 300


def test_an_unfinished_training_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TINY)
    assert "is not finished" in refused(tmp_path, *DIGITS)


def test_a_damaged_model_is_refused(models: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", checkpoint.load(models / "plain"))
    weights = tmp_path / "model" / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "is damaged" in refused(tmp_path / "model", *DIGITS)


def test_grey_images_are_not_broadcast_to_colours(tmp_path: Path) -> None:
    # Normalisation alone would turn [1, 8, 8] into the [3, 8, 8] that the next layer reads.
    features = nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten())
    checkpoint.save(tmp_path / "model", Network(features, nn.Linear(72, 10)))
    assert "the network reads 3 channels" in refused(tmp_path / "model", *DIGITS)
