"""What the tests of a training step share: tiny configurations, networks, batches, and how to run one step."""

from typing import Any

import strategies
import torch
from torch import Tensor, nn

from ccdist.batch_norm import batch_norm_layers
from ccdist.config import StudentConfig, ThreatModel
from ccdist.networks import Network, build_network
from ccdist.training_step import Batch, EpsilonSchedule, StepPrecision, StudentStep

# float64: folding batch norm rounds in another order, and a network multiplies the difference layer by layer.
ROUNDING = 1e-10
# Share by which a loss may move when attack or training compute in bfloat16, 8 bits, on a trained network.
BFLOAT16_LOSS = 0.05

THREAT = ThreatModel(epsilon="1/10")
# 80 steps: epsilon is 0 at step 0, a ten-thousandth of the whole at 2, 38 % at 20, the whole from 40 on. Step 1 is
# below the step's smallest box, which the reference does not have.
NUM_STEPS = 80
SCHEDULE = {"warm_up": 0, "ramp": "1/2"}
TINY_EPSILON, MID_EPSILON, FULL_EPSILON = 2, 20, 40
SHAPE = (2, 8, 8)
WIDTHS = {"cnn3": 2, "cnn7": 4, "resnet": 2, "mlp": 6}


def make_config(**changes: Any) -> StudentConfig:
    values = {
        "epochs": 1,
        "loss": {"kind": "cc_dist", "alpha": 0.3, "beta": 5.0},
        "attack": {"steps": 2, "step_size": 0.5},
        "epsilon_schedule": SCHEDULE,
    }
    return StudentConfig.model_validate(values | changes)


def make_network(name: str = "cnn3", seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Network:
    """Weights of order one, batch norms with scales of either sign; float64."""
    statistics = {"mean": [0.4] * shape[0], "std": [0.3] * shape[0]}
    network = build_network(name, width=WIDTHS[name], input_shape=shape, num_classes=4, **statistics)
    return strategies.randomize(network, torch.Generator().manual_seed(seed))


def make_batch(index: int, count: int = 6, shape: tuple[int, int, int] = SHAPE) -> Batch:
    generator = torch.Generator().manual_seed(11)
    images = torch.rand((count, *shape), generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (count,), generator=generator)
    return Batch(index, images, labels, torch.Generator().manual_seed(12))


def make_step(
    network: Network,
    teacher: Network | None,
    config: StudentConfig,
    threat: ThreatModel = THREAT,
    precision: StepPrecision | None = None,
) -> StudentStep:
    schedule = EpsilonSchedule(config.epsilon_schedule, threat, NUM_STEPS)
    return StudentStep(network, teacher, config, threat, schedule, precision or StepPrecision())


def run(
    config: StudentConfig, index: int = MID_EPSILON, *, name: str = "cnn3", teacher: bool = True, **options: Any
) -> tuple[Tensor, Network]:
    """The step's loss, and the network that it has left its gradients in."""
    network = make_network(name)
    loss, _ = make_step(network, make_network(name, 1) if teacher else None, config, **options)(make_batch(index))
    loss.backward()
    return loss.detach(), network


def assert_same_gradients(actual: Network, expected: Network, rounding: float = ROUNDING) -> None:
    """Relative to the largest entry of the network."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in expected.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert largest > 0
    for name, parameter in actual.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = float((found - grads[name]).abs().max())
        assert error <= rounding * largest, f"{name}: {error:.3g} of {largest:.3g}"


def running(network: Network) -> list[Tensor]:
    return [x.clone() for layer in batch_norm_layers(network) for x in (layer.running_mean, layer.running_var)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
