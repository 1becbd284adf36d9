"""Seconds of one CC-Dist student step against one plain PGD step of the same network, alternating in one run.

python -m benchmarks.training_step [--network cnn7] [--width 64] [--batch 128] [--steps 8] [--repeats 5]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from ccdist.config import (
    CCDistConfig,
    EpsilonScheduleConfig,
    NetworkConfig,
    StudentConfig,
    TeacherConfig,
    ThreatModel,
    TrainingAttackConfig,
)
from ccdist.data import Dataset, ImageSet
from ccdist.networks import build_network
from ccdist.training import train_student, train_teacher


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    dataset, threat = _random_images(args.batch), ThreatModel(epsilon="2/255")
    network = NetworkConfig(name=args.network, width=args.width)
    attack = TrainingAttackConfig(steps=args.steps, step_size=0.25)
    common = {"network": network, "epochs": 1, "batch_size": args.batch, "attack": attack}
    teacher_config = TeacherConfig(**common)
    # No warm-up and no ramp, so that the step is one at the target epsilon.
    schedule = EpsilonScheduleConfig(warm_up=0, ramp=0)
    student_config = StudentConfig(**common, loss=CCDistConfig(alpha=0.01, beta=5), epsilon_schedule=schedule)
    teacher = build_network(args.network, width=args.width, input_shape=(3, 32, 32), num_classes=10)
    timed: dict[str, Callable[[], object]] = {
        "CC-Dist student": lambda: train_student(dataset, threat, student_config, teacher),
        "PGD": lambda: train_teacher(dataset, threat, teacher_config),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(args.repeats + 1):  # the first round warms up
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append((time.perf_counter() - started) / STEPS)
    print(
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(
        f"{args.network} width {args.width}, 3x32x32, batch {args.batch}, {args.steps} attack steps, n = {args.repeats}"
    )
    for name, values in seconds.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:>16}: {statistics.median(values):.3f} s a step ({spread}), start-up of the run included")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"{'ratio':>16}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


STEPS = 3  # in one timed run; the epsilon schedule reaches its target after the first


def _random_images(batch: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    count = STEPS * batch
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    part = ImageSet(images, torch.randint(10, (count,), generator=generator))
    ones = (1.0, 1.0, 1.0)
    return Dataset("random", part, part, 10, (0.0, 0.0, 0.0), ones, flip=False, crop_padding=0, fingerprint="random")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cnn7")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
