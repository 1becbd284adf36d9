"""Seconds and memory of one CC-Dist training step: this project's paths against the plain order of the public codes.

    python -m benchmarks.training_step [--data DIR] [--repeats 7] [--threads 1 2] [--steps 8 1] [--device cpu]

Each path has a process of its own and they take turns, step by step, so that a change of the machine's speed meets all
of them; ratios are taken within a round. The network is first trained past its epsilon ramp, and every step starts
from those weights, the same batch and the same attack start.

    reference             ccdist.reference, as a plain PyTorch program runs it
    reference, allocator  the same with ccdist.host_memory, which this project's command lines turn on
    float32               this project's step, everything in float32
    default               the same, attack and teacher in bfloat16, as `auto` has it where the processor has such units
    bfloat16              the same, every pass in bfloat16
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_paths import BATCH, EQUALITY_STEPS, PATHS, PRECISIONS, Clock, StepPath, prepare
from ccdist import checkpoint
from ccdist.fused import product
from ccdist.host_memory import keep_freed_memory
from ccdist.networks import Network


def serve(name: str, folder: Path, device: str, pipe: Connection) -> None:
    """A path's process: answers requests until it is told to stop."""
    if name not in ("reference",):
        keep_freed_memory()
    path = StepPath(name, folder, device)
    while True:
        request = pipe.recv()
        if request is None:
            return
        kind, argument = request
        if kind == "threads":
            torch.set_num_threads(argument)
            pipe.send(None)
        elif kind == "step":
            pipe.send(path.timed_step(argument))
        else:
            pipe.send(_peak_memory(path.device))


def _peak_memory(device: torch.device) -> float:
    """MB: of the whole process on a CPU, of what PyTorch reserved on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A path in its process."""

    name: str
    process: Any
    pipe: Connection

    @classmethod
    def start(cls, name: str, folder: Path, device: str) -> "Contestant":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, folder, device, theirs), daemon=True)
        process.start()
        return cls(name, process, ours)

    def ask(self, kind: str, argument: Any = None) -> Any:
        self.pipe.send((kind, argument))
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join()


def measure(folder: Path, args: argparse.Namespace, steps: int, threads: int) -> dict[str, Any]:
    """Rounds in which every path makes one step; the first round warms up and is not counted."""
    contestants = [Contestant.start(name, folder, args.device) for name in args.paths]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.paths}
    for contestant in contestants:
        contestant.ask("threads", threads)
    for number in range(args.repeats + 1):
        for contestant in contestants:
            answer = contestant.ask("step", steps)
            if number:
                rounds[contestant.name].append(answer)
    memory = {contestant.name: contestant.ask("memory") for contestant in contestants}
    for contestant in contestants:
        contestant.stop()
    return {"rounds": rounds, "memory_mb": memory}


def passes(steps: int, *, reference: bool) -> int:
    """Forward passes' worth of a step's products: forward 1, gradient of inputs 1, of weights 1, bounds twice that."""
    attack = 2 * steps + (steps > 1)  # keeping the best iterate costs one more forward pass
    differentiated = 3 * (1 + 2)  # adversarial points, centres, radii; each forward, inputs, weights
    return attack + differentiated + 1 + reference  # teacher; the clean pass of the public codes


def peaks(threads: int, device: torch.device) -> dict[str, float]:
    """FLOP/s of the best large product that PyTorch offers here, for each precision."""
    torch.set_num_threads(threads)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(4096, 4096, device=device).to(dtype) for _ in range(2))
        x = torch.randn(128, 128, 16, 16, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        w = torch.randn(128, 128, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        candidates = {
            "matmul": (lambda a=a, b=b: F.linear(a, b), 2 * 4096**3),
            "product": (lambda a=a, b=b: product(a, b), 2 * 4096**3),
            "convolution": (lambda x=x, w=w: F.conv2d(x, w, None, 1, 1), 2 * 128 * 128 * 256 * 128 * 9),
        }
        for name, (compute, flops) in candidates.items():
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = flops / _best_seconds(compute, device)
    return found


def _best_seconds(compute: Callable[[], object], device: torch.device) -> float:
    clock = Clock(device)
    times = []
    with torch.no_grad():
        for _ in range(8):
            clock.start()
            compute()
            times.append(clock.total())
    return min(times)


def equality(folder: Path, device: str, steps: int, name: str) -> dict[str, float]:
    """Largest relative loss difference and smallest gradient cosine over steps that start from equal weights."""
    ours, reference = StepPath(name, folder, device), StepPath("reference", folder, device)
    worst_loss, worst_cosine = 0.0, 1.0
    for index in range(EQUALITY_STEPS):
        ours.network.load_state_dict(reference.network.state_dict())
        losses, gradients = [], []
        for path in (reference, ours):
            path.optimizer.zero_grad(set_to_none=True)
            # The clean pass moves the running statistics that the attack reads, and nothing else.
            loss = path.loss(index, steps, clean_pass=False)
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(torch.cat([p.grad.flatten().double() for p in path.network.parameters()]))
        worst_loss = max(worst_loss, abs(losses[1] - losses[0]) / abs(losses[0]))
        worst_cosine = min(worst_cosine, float(F.cosine_similarity(*gradients, dim=0)))
        nn.utils.clip_grad_norm_(reference.network.parameters(), 10.0)
        reference.optimizer.step()
    return {"relative_loss_difference": worst_loss, "gradient_cosine": worst_cosine}


# ---- telling -------------------------------------------------------------------------------------------------------


def tell(result: dict[str, Any], forward_flops: float, peak: float, steps: int, threads: int, repeats: int) -> None:
    print(f"\n{steps} attack steps, {threads} threads, n = {repeats} rounds: median (lowest to highest)")
    print(
        f"{'':>21} {'seconds a step':>24} {'images/s':>9} {'passes':>7} {'of peak':>8} {'peak MB':>8} "
        f"{'times faster':>22}"
    )
    base = [answer["seconds"] for answer in result["rounds"][PATHS[0]]]
    for name, answers in result["rounds"].items():
        seconds = [answer["seconds"] for answer in answers]
        median = statistics.median(seconds)
        count = passes(steps, reference=name.startswith("reference"))
        ratios = [b / s for b, s in zip(base, seconds, strict=True)]
        spread = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        faster = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:>21} {spread:>24} {BATCH / median:>9.1f} {count:>6}F {count * forward_flops / median / peak:>8.0%} "
            f"{result['memory_mb'][name]:>8.0f} {faster:>22}"
        )
    for name, answers in result["rounds"].items():
        phases = {
            key: statistics.median([answer["phases"].get(key, 0.0) for answer in answers])
            for key in answers[0]["phases"]
        }
        print(f"{name:>21}: " + ", ".join(f"{key} {value:.3f}" for key, value in phases.items()))


def forward_flops(network: Network) -> float:
    """Twice the multiplications of one forward pass of a batch."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += 2 * output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return float(total * BATCH)


def main() -> None:
    args = _arguments()
    keep_freed_memory()
    folder = prepare(args)
    device = torch.device(args.device)
    flops = forward_flops(checkpoint.load(folder / "student"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores of {_processor()}"
    print(f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    print(
        f"CNN7 width {args.width}, 3x32x32, batch {BATCH}; F = one forward pass = {flops / 1e9:.1f} GFLOP; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    stored: list[dict[str, Any]] = []
    for threads in args.threads if args.timing else ():
        found = peaks(threads, device)
        print(f"\npeaks with {threads} threads, GFLOP/s: " + ", ".join(f"{k} {v / 1e9:.0f}" for k, v in found.items()))
        for steps in args.steps:
            result = measure(folder, args, steps, threads)
            peak = max(value for key, value in found.items() if "float32" in key and "bfloat16" not in key)
            tell(result, flops, peak, steps, threads, args.repeats)
            stored.append({"threads": threads, "steps": steps, "peaks": found} | result)
    if args.equality:
        torch.set_num_threads(max(args.threads))
        print(f"\nagainst the reference, {EQUALITY_STEPS} steps from equal weights, batch and attack start:")
        for path in PRECISIONS:
            for steps in args.steps:
                found = equality(folder, args.device, steps, path)
                print(
                    f"{path:>21}, {steps} attack steps: relative loss difference up to "
                    f"{found['relative_loss_difference']:.1e}, gradient cosine down to {found['gradient_cosine']:.6f}",
                    flush=True,
                )
    (folder / "last.json").write_text(json.dumps(stored))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with CIFAR-10's train.parquet; without it random images")
    parser.add_argument("--out", default="runs/benchmark", help="where the trained network is kept")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--train-images", type=int, default=EQUALITY_STEPS * BATCH)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-equality", dest="equality", action="store_false", help="times only")
    parser.add_argument("--no-timing", dest="timing", action="store_false", help="the comparison of losses only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
