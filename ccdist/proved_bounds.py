"""Lower bounds that certify: in float64, each with the allowance that rounding may take from it.

Shapes: `B` batch, `J` other classes (the specifications), `S` linear functions.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ccdist.bounds import difference_weights, elided_lower_bounds
from ccdist.interval import Interval
from ccdist.linear_bounds import has_kink, least, relaxation
from ccdist.linear_rules import Back, Step, backward
from ccdist.neurons import Images
from ccdist.proof_network import ProofNetwork
from ccdist.rounding import GuardedBounds, GuardedStep, guarded_bounds, guarded_ibp, head_error
from ccdist.subproblems import Batch, Objective
from ccdist.threats import L2Ball, Region
from ccdist.unit_bounds import unit_bounds

BoundRung = Literal["ibp", "crown", "alpha_crown"]
Proved = tuple[Float[Tensor, "B J"], Float[Tensor, "B J"]]

# Bytes for the weights of one chunk of linear functions on their way back; a few tensors of this size exist at once.
CHUNK_BYTES = 64 * 2**20


def proved_bounds(
    rung: BoundRung, proof: ProofNetwork, region: Region, labels: Int[Tensor, " B"], *, steps: int = 20
) -> Proved:
    """(lower, allowance) of z[y] - z[j], in logits: an image is certified where lower > allowance for each j.

    ibp:          interval bounds with elided head
    crown:        the better of that and CROWN over interval pre-activation bounds
    alpha_crown:  the better of that and, over pre-activation bounds that CROWN has tightened, CROWN with the slopes of
                  each open specification improved by `steps` gradient steps

    Args:
        region: float64, see `exact_region`.

    Raises:
        UnsupportedLayerError: a layer has no rule.
    """
    if rung == "ibp":
        return guarded_ibp(proof, region, labels)
    with torch.no_grad():
        guarded = guarded_bounds(proof, region)
        proved = better(elided(proof, guarded, labels), crown(proof, region, labels, guarded))
        if rung == "crown":
            return proved
        guarded = tightened(proof, region, guarded)
        proved = better(proved, crown(proof, region, labels, guarded))
        return better(proved, sloped(proof, region, labels, guarded, proved, steps))


def elided(proof: ProofNetwork, guarded: GuardedBounds, labels: Tensor) -> Proved:
    lower = elided_lower_bounds(proof.exact.head, guarded.features, labels)
    return lower, head_error(proof, guarded.features, labels)


def better(one: Proved, other: Proved) -> Proved:
    """Element by element the pair whose bound leaves more above its allowance."""
    first = ~(other[0] - other[1] > one[0] - one[1])  # NaN of the other does not win
    return torch.where(first, one[0], other[0]), torch.where(first, one[1], other[1])


def linear_steps(guarded: GuardedBounds) -> list[Step]:
    """The steps of a backward pass in float64, with errors; slopes as CROWN chooses them."""
    return [
        Step(step.layer, step.box.shape[1:], relaxation(step.layer, step.box), step.error) for step in guarded.steps
    ]


def crown(proof: ProofNetwork, region: Region, labels: Tensor, guarded: GuardedBounds) -> Proved:
    """CROWN of every specification over the given pre-activation bounds."""
    weights, offset = difference_weights(proof.exact.head, labels)
    error = head_error(proof, guarded.features, labels)
    steps = linear_steps(guarded)
    rows = chunk_rows(guarded)
    lower, allowance = torch.empty_like(offset), torch.empty_like(offset)
    each = max(1, rows // offset.shape[1])
    for images in torch.arange(len(labels)).split(each):
        part, some = _steps_of(steps, images), select_region(region, images)
        for specs in torch.arange(offset.shape[1]).split(rows):
            place = (images[:, None], specs)
            bound = backward(proof.exact.features, Back(weights[place], offset[place], error[place]), part)
            lower[place] = least(bound.weights, some) + bound.offset
            allowance[place] = bound.allowance
    return lower, allowance


def chunk_rows(guarded: GuardedBounds) -> int:
    widest = max(step.box.lower[0].numel() for step in guarded.steps)
    return max(1, CHUNK_BYTES // (8 * widest))


def select_region(region: Region, rows: Tensor) -> Region:
    if isinstance(region, L2Ball):
        return L2Ball(region.center[rows], region.epsilon)
    return Interval(region.lower[rows], region.upper[rows])


def select_images(guarded: GuardedBounds, rows: Tensor) -> GuardedBounds:
    """The bounds of some images."""
    steps = [
        GuardedStep(step.layer, Interval(step.box.lower[rows], step.box.upper[rows]), step.error[rows])
        for step in guarded.steps
    ]
    return GuardedBounds(steps, Interval(guarded.features.lower[rows], guarded.features.upper[rows]))


def tightened(proof: ProofNetwork, region: Region, guarded: GuardedBounds) -> GuardedBounds:
    """Pre-activation bounds of units that may have either sign, met with CROWN's; first layer first.

    Bounds before the first activation are exact already, up to rounding. Units with a known sign need none better.
    """
    steps = list(guarded.steps)
    first = next((number for number, step in enumerate(steps) if relaxation(step.layer, step.box) is not None), None)
    for number, step in enumerate(steps):
        if first is None or number == first or not has_kink(step.layer):
            continue
        lower, upper = step.box.lower.clone(), step.box.upper.clone()
        rows = chunk_rows(guarded)
        before = linear_steps(GuardedBounds(steps[:number], guarded.features))
        for image in range(len(lower)):
            here = torch.tensor([image], device=lower.device)
            units = ((lower[image] < 0) & (upper[image] > 0)).flatten().nonzero().squeeze(1)
            part, some = _steps_of(before, here), select_region(region, here)
            above, below = unit_bounds(proof, part, number, lower.shape[1:], units, rows).least(some)
            for old, new, pick in ((lower, above, torch.maximum), (upper, -below, torch.minimum)):
                old[image].view(-1)[units] = pick(old[image].view(-1)[units], new)
        steps[number] = replace(step, box=Interval(lower, upper))
    return replace(guarded, steps=steps)


def _steps_of(steps: Sequence[Step], images: Tensor) -> list[Step]:
    """Steps of some images."""
    return [
        replace(
            step,
            relaxation=None if step.relaxation is None else step.relaxation.select(images),
            error=None if step.error is None else step.error[images],
        )
        for step in steps
    ]


def root_batch(images: Images, labels: Tensor, guarded: GuardedBounds, owner: Tensor, specs: Tensor) -> Batch:
    """One sub-problem without splits for each pair of an image and a specification."""
    weights, offset = difference_weights(images.proof.exact.head, labels)
    error = head_error(images.proof, guarded.features, labels)
    objective = Objective(weights[owner, specs], offset[owner, specs], error[owner, specs])
    shape = (len(owner), len(images.kinks))
    signs = torch.zeros((len(owner), sum(images.widths)), dtype=torch.int8, device=owner.device)
    box = images.neuron_box()
    own = Interval(box.lower[owner], box.upper[owner])
    return Batch(images, owner, signs, own, objective, torch.ones(shape, device=owner.device))


def sloped(
    proof: ProofNetwork, region: Region, labels: Tensor, guarded: GuardedBounds, known: Proved, steps: int
) -> Proved:
    """alpha-CROWN of the specifications that `known` leaves open; the others get `known`."""
    lower, allowance = known[0].clone(), known[1].clone()
    images = Images.of(proof, region, guarded.steps)
    if any(kink.slope > 1 for kink in images.kinks):  # sub-problems know convex kinks only
        return known
    owner, specs = (~(lower > allowance)).nonzero().unbind(1)
    for pairs in torch.arange(len(owner), device=owner.device).split(chunk_rows(guarded)):
        if len(pairs) == 0:  # how split() cuts nothing
            break
        rows, columns = owner[pairs], specs[pairs]
        batch = root_batch(images, labels, guarded, rows, columns)
        target = (2 * allowance[rows, columns]).float()
        alpha = images.adaptive()[rows]
        best = batch.optimize(alpha, torch.zeros_like(alpha), steps, target)
        found = batch.proved(best.alpha, best.beta)
        lower[rows, columns], allowance[rows, columns] = found.lower, found.allowance
    return lower, allowance
