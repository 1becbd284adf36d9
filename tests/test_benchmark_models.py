"""The stored networks: they load, their figures are what is counted now, and they stay small."""

import pytest
import torch

from benchmarks.verification_models import ASSETS, MODELS, figures, is_stored, stored_images
from ccdist import checkpoint

MOST_BYTES = 1_048_576
# Another processor rounds otherwise, and an image at a margin of 0 may fall on the other side.
ROUNDED_IMAGES = 1


def num_bytes(name: str) -> int:
    return (ASSETS / name / checkpoint.WEIGHTS).stat().st_size


SMALLEST = sorted(MODELS, key=num_bytes)[:2]


@pytest.mark.parametrize("name", MODELS)
def test_a_stored_network_loads(name: str) -> None:
    model, network = MODELS[name], checkpoint.load(ASSETS / name)
    assert is_stored(model, ASSETS / name)
    images, labels = stored_images(model)
    assert len(images) == len(labels) == model.num_images
    with torch.no_grad():
        clean = int((network(images).argmax(1) == labels).sum())
    metadata = checkpoint.load_description(ASSETS / name)["metadata"]
    assert metadata["figures"]["images"] == model.num_images
    assert clean == pytest.approx(metadata["figures"]["clean"], abs=ROUNDED_IMAGES)


@pytest.mark.parametrize("name", SMALLEST)
def test_stored_figures_are_those_counted_now(name: str) -> None:
    stored = checkpoint.load_description(ASSETS / name)["metadata"]["figures"]
    counted = figures(checkpoint.load(ASSETS / name), MODELS[name])
    assert counted == pytest.approx(stored, abs=ROUNDED_IMAGES)
    assert counted["ibp"] <= counted["crown"] <= counted["pgd"] <= counted["clean"] <= counted["images"]
    assert counted["open"] == counted["pgd"] - counted["crown"]


def test_the_assets_are_small() -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < MOST_BYTES


def test_nothing_else_is_stored() -> None:
    assert {path.name for path in ASSETS.iterdir()} == {*MODELS, "images", "README.md"}
