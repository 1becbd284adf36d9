"""The state of a branch and bound on disk, from which a killed one goes on.

Two kinds of files in one folder: for each open image what its search began with, written once; and one file with all
open sub-problems and counts, written after a round when the last one is old enough. Both are written atomically, the
images' first, so that the file of the rounds never speaks of an image that is not there.
"""

import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccdist.branching import OpenImage
from ccdist.checkpoint import CorruptCheckpointError, load_state, save_state, weights_sha256
from ccdist.config import BranchAndBoundConfig, ThreatModel, fingerprint
from ccdist.frontier import Frontier
from ccdist.interval import Interval
from ccdist.linear_bounds import has_kink
from ccdist.networks import Network
from ccdist.rounding import GuardedBounds

# Seconds between two states, and at least so many times what writing the last one took.
INTERVAL_S, PATIENCE = 2.0, 20.0
# OpenImage fields that are plain numbers.
_NUMBERS = ("position", "target", "assumed", "root", "proved", "branches", "seconds", "stuck")


def identity_of(
    network: Network, images: Tensor, labels: Tensor, threat: ThreatModel, config: BranchAndBoundConfig
) -> dict[str, str]:
    """What a state belongs to, each part as a hash."""

    def digest(values: Tensor) -> str:
        return hashlib.sha256(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()

    return {
        # Layers too: another activation over the same weights is another network.
        "network": hashlib.sha256(f"{network!r} {weights_sha256(network)}".encode()).hexdigest(),
        "images": f"{tuple(images.shape)} {digest(images)}",
        "labels": digest(labels),
        "threat": str(threat),
        "config": fingerprint(config),
    }


class SearchState:
    """The folder of one search."""

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder, self.identity = folder, identity
        self._rounds = folder / "rounds.safetensors"
        self._stored: set[int] = set()
        self._due = time.monotonic() + INTERVAL_S

    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def save(
        self,
        opened: list[OpenImage],
        waiting: list[int],
        outcomes: list[dict[str, Any]],
        points: dict[int, Tensor],
        seconds: float,
    ) -> None:
        """Everything between two rounds. points: counter-examples by position."""
        started = time.monotonic()
        for image in opened:
            if image.position not in self._stored:
                save_state(self._root(image.position), _root_tensors(image), {"neurons": image.neurons})
                self._stored.add(image.position)
        tensors: dict[str, Tensor] = {f"point.{position}": point for position, point in points.items()}
        described = []
        for image in opened:
            bounds, ages, rows = image.frontier.arrays()
            name = f"image.{image.position}"
            tensors |= {
                f"{name}.bounds": torch.from_numpy(bounds),
                f"{name}.ages": torch.from_numpy(ages),
                f"{name}.rows": torch.from_numpy(rows.copy()),
                f"{name}.scales": image.scales,
            }
            described.append({key: getattr(image, key) for key in _NUMBERS} | {"pushed": image.frontier.pushed})
        content = {
            "identity": self.identity,
            "images": described,
            "waiting": waiting,
            "outcomes": outcomes,
            "seconds": seconds,
        }
        text = json.dumps(content)
        save_state(self._rounds, tensors, {"search": text, "search_sha256": _text_sha256(text)})
        for position in self._stored - {image.position for image in opened}:
            self._root(position).unlink(missing_ok=True)
            self._stored.discard(position)
        now = time.monotonic()
        self._due = now + max(INTERVAL_S, PATIENCE * (now - started))

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """(content, tensors) of the last state; None: there is none.

        Raises:
            CorruptCheckpointError: it is damaged.
            ValueError: it is about another network, other images, another threat or configuration.
        """
        if not self._rounds.exists():
            return None
        tensors, metadata = load_state(self._rounds)
        if metadata.get("search_sha256") != _text_sha256(metadata["search"]):
            raise CorruptCheckpointError(
                f"{self._rounds} is damaged (its header has another hash); delete {self.folder}"
            )
        content = json.loads(metadata["search"])
        differing = [key for key, value in self.identity.items() if content["identity"].get(key) != value]
        if differing:
            raise ValueError(
                f"{self.folder} holds a branch and bound with another {' and '.join(differing)}; use another folder, "
                "or delete it to begin anew"
            )
        return content, tensors

    def restored(self, described: dict[str, Any], tensors: dict[str, Tensor], fresh: OpenImage) -> OpenImage:
        """An open image as it was; `fresh` has what need not be stored."""
        position, device = fresh.position, fresh.scales.device
        boxes, metadata = load_state(self._root(position))
        self._stored.add(position)
        name = f"image.{position}"
        frontier = Frontier.restored(
            tensors[f"{name}.bounds"].numpy(),
            tensors[f"{name}.ages"].numpy(),
            tensors[f"{name}.rows"].numpy(),
            described["pushed"],
        )
        image = replace(
            fresh,
            guarded=_with_kinks(fresh.guarded, {key: value.to(device) for key, value in boxes.items()}),
            neurons=list(metadata["neurons"]),
            scales=tensors[f"{name}.scales"].to(device),
            frontier=frontier,
        )
        for key in _NUMBERS:
            setattr(image, key, described[key])
        return image

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _root(self, position: int) -> Path:
        return self.folder / f"image-{position}.safetensors"


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _root_tensors(image: OpenImage) -> dict[str, Tensor]:
    """The pre-activation bounds that fix which neurons its rows are about."""
    kinks = {number: step.box for number, step in enumerate(image.guarded.steps) if has_kink(step.layer)}
    return {f"{number}.lower": box.lower for number, box in kinks.items()} | {
        f"{number}.upper": box.upper for number, box in kinks.items()
    }


def _with_kinks(guarded: GuardedBounds, boxes: dict[str, Tensor]) -> GuardedBounds:
    steps = [
        replace(step, box=Interval(boxes[f"{number}.lower"], boxes[f"{number}.upper"]))
        if f"{number}.lower" in boxes
        else step
        for number, step in enumerate(guarded.steps)
    ]
    return replace(guarded, steps=steps)
