"""The verification ladder: clean prediction, PGD, IBP, CROWN. Three verdicts, one row for each image.

Each rung takes only the images that are still open, all of them as batches. Certified means proved with a
margin above a rounding allowance; falsified means that a plain forward pass misclassifies a point of the region;
anything else is undecided, and counts as not certified.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.attacks import worst_points
from ccdist.bounds import (
    difference_weights,
    interval_bounds,
    logit_difference_lower_bounds,
    logit_differences,
)
from ccdist.config import ThreatModel, VerifyConfig
from ccdist.linear_bounds import crown_lower_bounds
from ccdist.networks import Network
from ccdist.precision import exact_float32
from ccdist.threats import Region, contains, perturbation_set

# A float32 bound is trusted when its margin exceeds this share of the sum of the absolute terms that make it up.
# float32 rounds each operation by 6e-8 of its size; sums of some 10^4 terms stay well inside a hundred times that.
ROUNDING_ALLOWANCE = 1e-5

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("label", pa.int16()),
        ("prediction", pa.int16()),
        ("verdict", pa.string()),
        ("method", pa.string()),  # the rung that decided; "" while undecided
        ("lower_bound", pa.float32()),  # best proved lower bound of the margin, in logits; null without one
        ("seconds", pa.float32()),  # this image's share of the rungs it went through
        ("branches", pa.int32()),
    ]
)


class Verdict(StrEnum):
    CERTIFIED = "certified"
    FALSIFIED = "falsified"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Accuracies:
    """Fractions of N images. certified <= certified_upper <= adversarial <= standard for each image."""

    standard: float
    adversarial: float
    certified: float  # proved / N
    certified_upper: float  # (N - falsified) / N
    num_images: int


@dataclass
class _Open:
    """The rows while the ladder runs, as tensors on the network's device."""

    verdict: list[Verdict]
    method: list[str]
    lower_bound: list[float | None]
    seconds: Tensor
    remaining: Tensor  # indices of undecided images, ascending

    def decide(self, indices: Tensor, decided: Tensor, verdict: Verdict, method: str) -> None:
        for index in indices[decided].tolist():
            self.verdict[index], self.method[index] = verdict, method


def verify(
    network: Network,
    images: Float[Tensor, "N C H W"],
    labels: Int[Tensor, " N"],
    config: VerifyConfig,
    *,
    on_rung: Callable[[str, int], None] | None = None,
) -> pa.Table:
    """Decide for each image whether every perturbed image that the threat allows keeps the label.

    Args:
        network: as deployed; read in eval mode, on any device.
        images: pixels in [0, 1].
        config: threat, rungs, attack.
        on_rung: called after each rung with its name and the number of images still open.

    Returns:
        A table of `SCHEMA` with one row for each image, in order. A misclassified clean image is falsified by
        "clean". `branches` counts branch and bound nodes.

    Raises:
        ValueError: images and labels differ in number, or the network is in train mode.
        UnsupportedLayerError: a bound rung meets a layer without a rule (for l2: see `ccdist.bounds.propagate`).
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; expected as many labels as images")
    if any(module.training for module in network.modules()):
        raise ValueError("the network is in train mode; call .eval() on it, a verdict is about the deployed network")
    device = next(network.parameters()).device
    images, labels = images.to(device), labels.to(device)
    count = len(labels)
    rows = _Open([Verdict.UNDECIDED] * count, [""] * count, [None] * count, torch.zeros(count), torch.arange(count))
    with exact_float32(), torch.no_grad():
        predictions = _clean(network, images, labels, config, rows)
        for rung in ("clean", *config.rungs):
            if rung != "clean":
                _run_rung(rung, network, images, labels, config, rows)
            if on_rung is not None:
                on_rung(rung, len(rows.remaining))
    columns = [
        list(range(count)),
        labels.tolist(),
        predictions.tolist(),
        [str(verdict) for verdict in rows.verdict],
        rows.method,
        rows.lower_bound,
        rows.seconds.tolist(),
        [0] * count,
    ]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA)


def _clean(network: Network, images: Tensor, labels: Tensor, config: VerifyConfig, rows: _Open) -> Tensor:
    predictions = []
    for chunk in _chunks(rows, config):
        started = time.perf_counter()
        logits = network(images[chunk])
        predictions.append(logits.argmax(1).cpu())
        # A tie is no classification, nor is NaN: the margin decides, as it does for attacks.
        wrong = ~(logit_differences(logits, labels[chunk]).amin(1) > 0).cpu()
        rows.decide(chunk, wrong, Verdict.FALSIFIED, "clean")
        rows.seconds[chunk] += (time.perf_counter() - started) / len(chunk)
    _drop_decided(rows)
    return torch.cat(predictions) if predictions else torch.zeros(0, dtype=torch.long)


def _chunks(rows: _Open, config: VerifyConfig) -> list[Tensor]:
    """The open images in batches; none when nothing is open, where split() gives one empty batch."""
    return [chunk for chunk in rows.remaining.split(config.batch_size) if len(chunk)]


def _drop_decided(rows: _Open) -> None:
    rows.remaining = torch.tensor(
        [index for index in rows.remaining.tolist() if rows.verdict[index] is Verdict.UNDECIDED],
        dtype=torch.long,
    )


def _run_rung(
    rung: str,
    network: Network,
    images: Tensor,
    labels: Tensor,
    config: VerifyConfig,
    rows: _Open,
) -> None:
    for chunk in _chunks(rows, config):
        started = time.perf_counter()
        region = perturbation_set(images[chunk], config.threat.norm, config.threat.radius)
        if rung == "pgd":
            _falsify(network, images[chunk], labels[chunk], region, config, rows, chunk)
        else:
            _certify(rung, network, labels[chunk], region, rows, chunk)
        rows.seconds[chunk] += (time.perf_counter() - started) / len(chunk)
    _drop_decided(rows)


def _falsify(
    network: Network,
    images: Tensor,
    labels: Tensor,
    region: Region,
    config: VerifyConfig,
    rows: _Open,
    chunk: Tensor,
) -> None:
    # One stream for each chunk: with one for all, the restarts of a chunk would move the next one's starts.
    generator = torch.Generator(images.device).manual_seed((config.seed * 2**31 + int(chunk[0])) % 2**63)
    points, _ = worst_points(
        network,
        images,
        labels,
        region=region,
        steps=config.attack.steps,
        step_size=config.attack.step_size,
        restarts=config.attack.restarts,
        generator=generator,
    )
    # Shown, not believed: the point lies in the region and a plain forward pass misclassifies it.
    inside = contains(region, points)
    margins = logit_differences(network(points), labels).amin(1)
    rows.decide(chunk, (inside & (margins <= 0)).cpu(), Verdict.FALSIFIED, "pgd")


def _certify(rung: str, network: Network, labels: Tensor, region: Region, rows: _Open, chunk: Tensor) -> None:
    bound = logit_difference_lower_bounds if rung == "ibp" else crown_lower_bounds
    lower = bound(network, region, labels)
    scale = _summed_magnitude(network, labels, region)
    margins = lower.amin(1)
    rows.decide(chunk, (margins > ROUNDING_ALLOWANCE * scale).cpu(), Verdict.CERTIFIED, rung)
    for index, margin in zip(chunk.tolist(), margins.tolist(), strict=True):
        previous = rows.lower_bound[index]
        if math.isfinite(margin):
            rows.lower_bound[index] = margin if previous is None else max(previous, margin)


def _summed_magnitude(network: Network, labels: Tensor, region: Region) -> Tensor:
    """Largest sum of the absolute terms in a logit difference over the region; what its rounding is relative to.

    Not the difference itself: large features may cancel in the head, their rounding does not.
    """
    features = interval_bounds(network.features, region)
    weight, offset = difference_weights(network.head, labels)
    largest = torch.maximum(features.lower.abs(), features.upper.abs())
    sums = torch.einsum("bjd,bd->bj", weight.abs(), largest) + offset.abs()
    return sums.amax(1)


def accuracies(table: pa.Table) -> Accuracies:
    """Standard, adversarial and certified accuracy of a table of verdicts.

        standard = 1 - #(falsified by clean) / N,   adversarial = 1 - #(falsified by clean or an attack) / N
        certified in [#certified / N, 1 - #falsified / N]

    Raises:
        ValueError: the table has no rows.
    """
    count = table.num_rows
    if count == 0:
        raise ValueError("no images were verified; accuracies of an empty table are not defined")
    verdicts, methods = table["verdict"].to_pylist(), table["method"].to_pylist()
    falsified = [method for verdict, method in zip(verdicts, methods, strict=True) if verdict == Verdict.FALSIFIED]
    clean = falsified.count("clean")
    # Counts are subtracted before the division: 1 - 10/24 is less than 14/24, which would turn the order around.
    return Accuracies(
        standard=(count - clean) / count,
        adversarial=(count - clean - falsified.count("pgd")) / count,
        certified=verdicts.count(Verdict.CERTIFIED) / count,
        certified_upper=(count - len(falsified)) / count,
        num_images=count,
    )


def quick_accuracies(
    network: Network, images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"], threat: ThreatModel
) -> tuple[float, float]:
    """(standard accuracy, IBP certified accuracy) in one pass each: a curve to watch, not a verdict."""
    with exact_float32(), torch.no_grad():
        standard = (network(images).argmax(1) == labels).float().mean()
        region = perturbation_set(images, threat.norm, threat.radius)
        lower = logit_difference_lower_bounds(network, region, labels)
        return float(standard), float((lower.amin(1) > 0).float().mean())
