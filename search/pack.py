"""python -m search.pack SPACE: measures one trial on the device at hand, and says how many at once get most done.

Exit codes: 0 a share is proposed; 2 something asked for is wrong, or not even one trial fits; 130 stopped by Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from search.config import SearchConfig, find_space_file, load_search_config
from search.errors import UserError, check_seconds
from search.sharing.packing import GIB, Machine, Packing, in_yaml, memory_setting, settings, table
from search.sharing.probe import TrialUsage, searched_data, trial_samples
from search.sharing.side_by_side import measure_packing, this_machine
from search.space import Space

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        config = load_search_config(find_space_file(args.space), args.set)
        check_seconds(args.seconds)
        return pack(config, Space(config), args.seconds, args.address or os.environ.get("RAY_ADDRESS"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED


def pack(config: SearchConfig, space: Space, seconds: float, address: str | None) -> int:
    """Measure and propose, on this machine or on one node of each kind of a cluster.

    Raises:
        UserError: something asked for is wrong, or not even one trial fits.
    """
    dataset = searched_data(config)
    if address:
        from search.clusters.node_probes import pack_nodes  # Ray: seconds to import

        for where, packing in pack_nodes(config, space, dataset, seconds, address):
            _show(where, packing, config)
        return OK
    typical, largest = trial_samples(space, dataset)
    machine = this_machine(config.resources, typical.data_bytes)
    _show("this machine", measure_packing(typical, largest, machine, seconds=seconds), config)
    return OK


def _show(where: str, packing: Packing, config: SearchConfig) -> None:
    for line in lines(where, packing, config):
        print(line)


def lines(where: str, packing: Packing, config: SearchConfig) -> Iterator[str]:
    """What was found out, as text, one fact a line."""
    machine, level = packing.machine, packing.best.level
    yield f"space {config.name} on {where}: {_spelled(machine, asks_gpu=config.resources.gpu > 0)}"
    for usage in packing.usages:
        yield _usage_line(usage)
    if len(packing.usages) > 1:
        yield "memory of one is that of the larger; times are those of the first"
    yield from table(packing.exploration.measured)
    if packing.exploration.ended:
        yield f"more were not measured: {packing.exploration.ended}"
    if len(packing.exploration.measured) == 1 and packing.exploration.out_of_time:
        yield "so there is nothing to compare, and nothing to propose; give it more time, for example --seconds 240"
        return
    if level.gpu:
        cap = level.gpu * machine.gpu_memory / GIB
        yield f"a trial's share of the GPU's memory is its cap: {cap:.3g} GiB; a trial that needs more fails"
    yield f"most trials an hour: {level.copies} at once; {settings(level)}"
    yield f"in the space file: {in_yaml(level)}"
    most = max(usage.host_bytes for usage in packing.usages)
    yield f"so that Ray also counts memory: {memory_setting(most)}"


def _usage_line(usage: TrialUsage) -> str:
    gpu = f"{usage.device_bytes / GIB:.3g} GiB of the GPU, " if usage.device_bytes else ""
    return (
        f"one trial ({usage.sample}): {gpu}{usage.host_bytes / GIB:.3g} GiB of memory, at most in {usage.peak_phase}; "
        f"{usage.step * 1e3:.3g} ms a step of the student on {usage.cores:.2g} busy cores, "
        f"{usage.image * 1e3:.3g} ms an image through every rung"
    )


def _spelled(machine: Machine, *, asks_gpu: bool) -> str:
    host = f"{machine.cores} cores, {machine.host_free / GIB:.3g} GiB of memory free, load {machine.load:.1f} before"
    if machine.gpu:
        return f"{machine.gpu}, {machine.gpu_free / GIB:.3g} of {machine.gpu_memory / GIB:.3g} GiB free; {host}"
    return f"{host}; {'no GPU here, so cores are shared out' if asks_gpu else 'without a GPU'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.pack",
        description="Measure one trial of a space, and how many of them at once get most done an hour. Writes nothing.",
    )
    parser.add_argument("space", metavar="SPACE", help="a space file, or the name of a shipped one: digits, cifar, ...")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="as for search.run")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=SECONDS, help=f"limit of the measurement (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--address", metavar="ADDRESS", help="measure on an idle node of each kind of that cluster; as for search.run"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
