"""Auto-PGD: projected gradient ascent that chooses its own step size, untargeted and towards a target class.

Shapes: `B` batch, `b` images still attacked, `C H W` image, `K` classes.

Source: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks", ICML 2020, algorithm 1.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ccdist.attacks import LogitsOf, unit_length
from ccdist.counterexamples import misclassified, pulled_inside
from ccdist.interval import Interval
from ccdist.threats import L2Ball, Region

MOMENTUM = 0.75  # weight of the gradient step; the rest repeats the last movement
INCREASES = 0.75  # rho: the step is kept where at least this share of the steps raised the loss
FEWEST_CLASSES_FOR_DLR = 4


def checkpoints(steps: int) -> list[int]:
    """The steps w_j after which step sizes are reconsidered.

        p_0 = 0,  p_1 = 0.22,  p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06),  w_j = ceil(p_j * steps) <= steps

    Counted in hundredths: in floats 0.41 * 100 lies above 41.
    """
    previous, current = 0, 22
    found = []
    while current <= 100:
        found.append(-(-current * steps // 100))
        previous, current = current, current + max(current - previous - 3, 6)
    return sorted(set(found))


def halves_step(
    increases: Int[Tensor, " b"],
    num_steps: int,
    best_loss: Float[Tensor, " b"],
    best_loss_then: Float[Tensor, " b"],
    halved_then: Bool[Tensor, " b"],
) -> Bool[Tensor, " b"]:
    """Whether a checkpoint halves the step size and goes back to the best point, image by image.

        increases < 0.75 * num_steps,   or   the step was not halved at the checkpoint before
                                             and the best loss is still that of then

    As the paper writes it: exactly 0.75 of the steps are enough, and the second condition holds at the first
    checkpoint too. (The authors' code asks for more than 0.75, and skips the second one there.)

    Args:
        increases: by how many of the steps since the last checkpoint the loss rose.
        num_steps: steps since the last checkpoint.
        best_loss_then, halved_then: the best loss after the last checkpoint, and its decision; at the first
            checkpoint the loss of the start, and False.
    """
    too_few = increases < INCREASES * num_steps
    stuck = ~halved_then & (best_loss <= best_loss_then)
    return too_few | stuck


def targeted_dlr(
    logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], targets: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """The targeted difference-of-logits ratio, which neither scaling nor shifting the logits changes.

        (z[t] - z[y]) / (z_(1) - (z_(3) + z_(4)) / 2),   z_(i) the i-th highest logit

    Defined from four classes on; with fewer the numerator alone: three logits have no z_(4), and it raises the
    same difference without a saturating exponential.
    """
    gap = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    if logits.shape[1] < FEWEST_CLASSES_FOR_DLR:
        return gap
    highest = logits.topk(FEWEST_CLASSES_FOR_DLR, dim=1).values
    return gap / (highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2 + 1e-12)


@dataclass(frozen=True)
class _Ascent:
    """What the attack knows of the images that it has not broken; first dimension b."""

    rows: Tensor  # their numbers in the batch
    labels: Tensor
    targets: Tensor | None
    region: Region
    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor  # [b, 1, 1, 1], pixels
    increases: Tensor
    best_loss_then: Tensor
    halved_then: Tensor

    def only(self, kept: Tensor) -> "_Ascent":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Ascent(**{name: _rows_of(value, kept) for name, value in values.items()})


def _rows_of(value: Any, kept: Tensor) -> Any:
    if value is None:
        return None
    return value[kept] if isinstance(value, Tensor) else region_rows(value, kept)


def region_rows(region: Region, rows: Tensor) -> Region:
    """The region of some images of the batch, by number or mask."""
    if isinstance(region, L2Ball):
        return L2Ball(region.center[rows], region.epsilon)
    return Interval(region.lower[rows], region.upper[rows])


def shared_start(region: Region, generator: torch.Generator) -> Tensor:
    """A random point of each image's region, by one draw for all: it does not depend on who else is in the batch.

    In a box uniform between lower and upper; of a ball a uniform direction of full length, then inside the pixels.
    """
    shape, device, dtype = (1, *region.shape[1:]), region.center.device, region.center.dtype
    if isinstance(region, L2Ball):
        direction = unit_length(torch.randn(shape, generator=generator, device=device, dtype=dtype))
        return region.project(region.center + region.epsilon * direction)
    share = torch.rand(shape, generator=generator, device=device, dtype=dtype)
    return pulled_inside(region.lower + share * (region.upper - region.lower), region)


def apgd(
    logits_of: LogitsOf,
    labels: Int[Tensor, " B"],
    *,
    region: Region,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    targets: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B C H W"]:
    """Points of the region that Auto-PGD reaches; an image leaves the batch at its first misclassified point.

        z = P(x_k + step * direction),  x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))

    P projects to the region; the direction is the gradient's sign (box) or its unit vector (ball). The step starts
    at 2 * epsilon and is halved at `checkpoints` by `halves_step`; the attack then goes on from its best point.

    Args:
        logits_of: the attacked function; deterministic, each row by itself.
        epsilon: the radius in pixels, before the pixel range cuts the region; step sizes are relative to it.
        targets: raises `targeted_dlr` towards these classes; None: raises the cross-entropy.

    Returns:
        A misclassified point where one was met, else the point of highest loss; without a graph.
    """
    x = shared_start(region, generator)
    points = x.clone()
    rows = torch.arange(len(labels), device=x.device)
    gradient, loss, broken = _evaluate(logits_of, x, labels, targets)
    step = torch.full((len(rows), 1, 1, 1), 2 * epsilon, device=x.device, dtype=x.dtype)
    never = torch.zeros_like(broken)
    state = _Ascent(
        rows, labels, targets, region, x, x, gradient, loss, x, gradient, loss, step, never.long(), loss, never
    ).only(~broken)
    planned, last = checkpoints(steps), 0
    for k in range(1, steps + 1):
        if len(state.rows) == 0:
            break
        state, broken = _advance(logits_of, state, MOMENTUM if k > 1 else 1.0)
        points[state.rows] = torch.where(broken.view(-1, 1, 1, 1), state.x, state.best)
        if bool(broken.any()):
            state = state.only(~broken)
        if k in planned:
            state, last = _reconsider(state, k - last), k
    return points


def _evaluate(logits_of: LogitsOf, x: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the loss, loss, whether misclassified) of each point."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        if targets is None:
            loss = F.cross_entropy(logits, labels, reduction="none")
        else:
            loss = targeted_dlr(logits, labels, targets)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return gradient, loss.detach(), misclassified(logits.detach(), labels)


def _advance(logits_of: LogitsOf, state: _Ascent, momentum: float) -> tuple[_Ascent, Tensor]:
    """One step, and which images it broke."""
    ball = isinstance(state.region, L2Ball)
    direction = unit_length(state.gradient) if ball else state.gradient.sign()
    ahead = pulled_inside(state.x + state.step * direction, state.region)
    moved = state.x + momentum * (ahead - state.x) + (1 - momentum) * (state.x - state.previous)
    moved = pulled_inside(moved, state.region)
    gradient, loss, broken = _evaluate(logits_of, moved, state.labels, state.targets)
    better = loss > state.best_loss
    wide = better.view(-1, 1, 1, 1)
    advanced = replace(
        state,
        x=moved,
        previous=state.x,
        gradient=gradient,
        loss=loss,
        best=torch.where(wide, moved, state.best),
        best_gradient=torch.where(wide, gradient, state.best_gradient),
        best_loss=torch.where(better, loss, state.best_loss),
        increases=state.increases + (loss > state.loss),
    )
    return advanced, broken


def _reconsider(state: _Ascent, num_steps: int) -> _Ascent:
    """A checkpoint: half the step and back to the best point where `halves_step` says so."""
    halved = halves_step(state.increases, num_steps, state.best_loss, state.best_loss_then, state.halved_then)
    wide = halved.view(-1, 1, 1, 1)
    return replace(
        state,
        x=torch.where(wide, state.best, state.x),
        gradient=torch.where(wide, state.best_gradient, state.gradient),
        loss=torch.where(halved, state.best_loss, state.loss),
        step=torch.where(wide, state.step / 2, state.step),
        increases=torch.zeros_like(state.increases),
        best_loss_then=state.best_loss,
        halved_then=halved,
    )
