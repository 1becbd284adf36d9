"""How many trials share a device: the choice on made-up measurements, and a real measurement of a tiny trial."""

import mmap
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from studies import config_of, space_of, tree, write_space

from ccdist import device_usage
from ccdist.data import load_dataset
from ccdist.device_usage import Gpu, Usage, gpus, host_memory, peak_memory, reset_peak_memory, used
from ccdist.networks import build_network
from search import pack
from search.config import find_space_file, load_search_config
from search.sharing import packing, side_by_side
from search.sharing.packing import (
    GIB,
    Exploration,
    Level,
    Machine,
    Measured,
    NoTimeError,
    OutOfMemoryHere,
    Packing,
    PackingError,
    Reading,
    choose,
    explore,
    in_yaml,
    levels,
    memory_setting,
    settings,
    table,
)
from search.sharing.probe import (
    TrialSample,
    TrialUsage,
    largest_corner,
    measure_trial,
    rungs,
    training_part,
    trial_samples,
    typical,
)
from search.sharing.side_by_side import Copies, measure_packing, this_machine
from search.sharing.side_process import ALONE, Part, serve

pytestmark = pytest.mark.timeout(60)  # the first training of a process pays for imports

CPU = torch.device("cpu")


def machine(cores: int, host: float, gpu: float = 0.0) -> Machine:
    """GiB that are free."""
    name = "H" if gpu else ""
    return Machine(cores, round(host * GIB), name, round(gpu * GIB), round(gpu * GIB))


@pytest.mark.parametrize(
    ("there", "host", "device", "expected"),
    [
        (machine(2, 16), 1, 0, [(1, 2, 0), (2, 1, 0)]),
        (machine(1, 16), 1, 0, [(1, 1, 0)]),
        (machine(6, 16), 1, 0, [(1, 6, 0), (2, 3, 0), (6, 1, 0)]),
        (machine(16, 16), 1, 0, [(1, 16, 0), (2, 8, 0), (4, 4, 0), (8, 2, 0), (14, 1, 0)][:4]),
        (machine(8, 4), 1, 0, [(1, 8, 0), (2, 4, 0)]),  # 3.6 GiB may be used: 3 would need 8 // 2 cores each, so 4
        (machine(9, 4), 1, 0, [(1, 9, 0), (2, 4, 0), (3, 3, 0)]),
        (machine(16, 64, 80), 1, 9, [(1, 16, 1), (2, 8, 0.5), (4, 4, 0.25), (8, 2, 0.125)]),
        (machine(16, 64, 80), 1, 25, [(1, 16, 1), (2, 8, 0.5), (3, 5, 0.3333)]),
        (machine(16, 64, 80), 1, 0.1, [(1, 16, 1), (2, 8, 0.5), (4, 4, 0.25), (8, 2, 0.125), (16, 1, 0.0625)]),
        (machine(4, 64, 80), 1, 0.1, [(1, 4, 1), (2, 2, 0.5), (4, 1, 0.25)]),
        (machine(16, 4, 80), 2, 1, [(1, 16, 1)]),
    ],
)
def test_the_shares_that_are_tried(
    there: Machine, host: float, device: float, expected: list[tuple[int, int, float]]
) -> None:
    found = levels(there, round(host * GIB), round(device * GIB))
    assert [(level.copies, level.cpu, level.gpu) for level in found] == expected


@given(
    cores=st.integers(1, 256),
    free=st.floats(1, 2000),
    gpu=st.sampled_from([0.0, 16.0, 80.0]),
    host=st.floats(0.1, 100),
    device=st.floats(0.1, 100),
)
def test_no_share_takes_more_than_there_is(cores: int, free: float, gpu: float, host: float, device: float) -> None:
    there, need = machine(cores, free, gpu), (round(host * GIB), round(device * GIB) if gpu else 0)
    if need[0] > 0.9 * there.host_free or need[1] > there.gpu_free:
        with pytest.raises(PackingError, match="not even one fits"):
            levels(there, *need)
        return
    found = levels(there, *need)
    assert found[0].copies == 1
    assert [level.copies for level in found] == sorted({level.copies for level in found})
    for level in found:
        # What Ray will start, which counts shares of cores and GPUs and no memory.
        by_ray = int(1 / level.gpu + 1e-9) if gpu else cores // level.cpu
        assert by_ray == level.copies or (gpu and level.copies == 1)
        assert level.copies * level.cpu <= max(cores, level.copies)
        assert level.copies * need[0] <= 0.9 * there.host_free + 1
        assert level.copies * need[1] <= there.gpu_free + 1
        assert not gpu or need[1] <= level.gpu * there.gpu_memory * (1 + 1e-3)
        assert level.resources.cpu == level.cpu


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(PackingError) as caught:
        levels(machine(4, 64, 24), 2 * GIB, 30 * GIB)
    assert str(caught.value) == (
        "one trial takes 30 GiB of memory of the GPU, and 24 GiB are free: not even one fits; lower "
        "student.batch_size or network.width"
    )


def measured(copies: int, *per_hour: float) -> Measured:
    return Measured(Level(copies, 8 // copies), tuple(Reading(value, 0.5, None, GIB) for value in per_hour))


@pytest.mark.parametrize(
    ("found", "copies"),
    [
        ([measured(1, 10, 10, 10), measured(2, 19, 19, 19), measured(4, 30, 31, 30)], 4),
        ([measured(1, 10, 10, 10), measured(2, 19, 19, 19), measured(4, 12, 12, 12)], 2),
        ([measured(1, 10, 10, 10), measured(2, 10.1, 10.1, 10.1)], 1),  # 1 % is no reason for a process more
        ([measured(1, 10, 10, 10), measured(2, 10.5, 10.5, 10.5)], 2),
        ([measured(1, 8, 10, 12), measured(2, 9, 11, 13)], 1),  # one unit apart, errors of 1.2 each
        ([measured(1, 10), measured(2, 11)], 1),  # of one reading nobody knows the spread
        ([measured(1, 10), measured(2, 15)], 2),
        ([measured(1, 10, 10), measured(2, 20, 20), measured(4, 18, 24)], 2),
    ],
)
def test_fewest_copies_among_those_that_noise_could_exchange(found: list[Measured], copies: int) -> None:
    assert choose(found).level.copies == copies
    assert choose(found[::-1]).level.copies == copies


def test_nothing_measured_is_no_choice() -> None:
    with pytest.raises(PackingError, match="nothing could be measured; give --seconds more"):
        choose([])


def test_the_spread_of_readings() -> None:
    """Values 8, 10, 12: standard deviation 2, of the mean 2 / sqrt 3."""
    assert measured(1, 8, 10, 12).spread == pytest.approx(2.0)
    assert measured(1, 8, 10, 12).error == pytest.approx(2 / 3**0.5)
    assert measured(1, 10).spread is None


class FakeDevice:
    """Takes two seconds for a reading, and says what `rates` has for so many copies."""

    def __init__(self, rates: dict[int, float | Exception], *, cost: float = 2.0) -> None:
        self.rates, self.cost, self.now, self.asked = rates, cost, 100.0, list[int]()

    def clock(self) -> float:
        return self.now

    def read(self, level: Level) -> Reading:
        self.asked.append(level.copies)
        self.now += self.cost
        rate = self.rates[level.copies]
        if isinstance(rate, Exception):
            raise rate
        return Reading(rate, 0.5)

    def explore(self, seconds: float, copies: tuple[int, ...] = (1, 2, 4, 8)) -> Exploration:
        candidates = [Level(count, 8 // count) for count in copies]
        return explore(candidates, self.read, seconds=seconds, clock=self.clock)


def counts(found: Exploration) -> dict[int, int]:
    return {each.level.copies: len(each.readings) for each in found.measured}


def test_all_levels_are_read_in_turns() -> None:
    device = FakeDevice({1: 10, 2: 20, 4: 30, 8: 29})
    found = device.explore(100)
    assert device.asked == [1, 2, 4, 8] * 3
    assert (counts(found), found.ended) == ({1: 3, 2: 3, 4: 3, 8: 3}, "")


def test_what_falls_is_the_last() -> None:
    device = FakeDevice({1: 10, 2: 20, 4: 17})
    found = device.explore(100)
    assert device.asked == [1, 2, 4] * 3
    assert found.ended == "4 at once did less than fewer"


def test_what_does_not_fit_ends_the_exploration() -> None:
    device = FakeDevice({1: 10, 2: 20, 4: OutOfMemoryHere("CUDA out of memory")})
    found = device.explore(100)
    assert device.asked == [1, 2, 4, 1, 2, 1, 2]
    assert (counts(found), found.ended) == ({1: 3, 2: 3}, "4 at once do not fit (CUDA out of memory)")


def test_what_fits_only_sometimes_is_not_proposed() -> None:
    device = FakeDevice({1: 10, 2: 20, 4: 40, 8: 80})

    def read(level: Level) -> Reading:
        if level.copies == 4 and device.asked.count(4) == 1:
            device.asked.append(4)
            raise OutOfMemoryHere("late")
        return device.read(level)

    found = explore([Level(count, 8 // count) for count in (1, 2, 4, 8)], read, seconds=100, clock=device.clock)
    assert counts(found) == {1: 3, 2: 3}
    assert found.ended == "4 at once do not fit (late)"
    assert choose(found.measured).level.copies == 2


@pytest.mark.parametrize(
    ("seconds", "asked"), [(5, [1, 2]), (8, [1, 2, 4, 8]), (11, [1, 2, 4, 8, 1]), (2, [1]), (1, [1])]
)
def test_no_reading_is_begun_that_would_end_too_late(seconds: float, asked: list[int]) -> None:
    device = FakeDevice({1: 10, 2: 20, 4: 30, 8: 40})
    found = device.explore(seconds)
    assert device.asked == asked
    assert (found.ended == "") == (len(asked) >= 4)


def test_a_reading_that_does_not_end_leaves_the_others() -> None:
    found = FakeDevice({1: 10, 2: 20, 4: NoTimeError("late")}).explore(100)
    assert (counts(found), found.ended) == ({1: 3, 2: 3}, "no time was left for 4 at once")
    with pytest.raises(NoTimeError, match="late"):
        FakeDevice({1: NoTimeError("late")}).explore(100)
    with pytest.raises(PackingError, match="diverges"):
        FakeDevice({1: 10, 2: PackingError("diverges")}).explore(100)


def test_only_units_within_the_common_time_count() -> None:
    """Units of 4 steps that end at 12, 14, 16, 30 after a start at 10; the others had enough at 17."""
    part = Part(4, 10.0, (12.0, 14.0, 16.0, 30.0), 1.0, 2.0, GIB)
    assert part.each(17.0) == pytest.approx(0.5)
    assert part.each(11.0) == pytest.approx(0.5)  # none: the first one is better than nothing
    assert part.each(99.0) == pytest.approx(20 / 4 / 4)


def test_the_table_and_what_to_type(tmp_path: Path) -> None:
    best = Measured(Level(4, 2, 0.25), (Reading(40.0, 0.5, 0.8, GIB), Reading(44.0, 0.5, 0.9, 2 * GIB)))
    one = Measured(Level(1, 8, 1.0), (Reading(1200.0, 0.25, None, GIB),))
    assert list(table([one, best])) == [
        "at once  cpu    gpu  memory of one  cores busy  GPU busy  trials/hour",
        "      1    8      1       1.00 GiB         25%         ?  1,200 (n = 1)",
        "      4    2   0.25       2.00 GiB         50%       90%  42 ± 2.8 (n = 2)",
    ]
    assert list(table([measured(2, 10.0)]))[1] == "      2    4       1.00 GiB         50%  10 (n = 1)"
    config = config_of(tmp_path, settings(best.level).replace("--set ", "").split())
    assert config.resources == best.level.resources
    write_space(tmp_path / "space.yaml", "\n".join([(tmp_path / "space.yaml").read_text(), in_yaml(best.level)]))
    assert load_search_config(tmp_path / "space.yaml").resources == best.level.resources


def usage(host: float = 1.0, device: float = 0.0, seconds: float = 360.0, name: str = "first point: mlp") -> TrialUsage:
    phases = {
        "student": Usage(2.0, 1.5, round(host * GIB), round(device * GIB)),
        "crown": Usage(1.0, 1.0, round(host * GIB / 2), round(device * GIB / 2)),
    }
    return TrialUsage(name, phases, step=0.01, teacher_step=0.0, image=0.002, seconds=seconds)


def test_what_a_trial_took() -> None:
    found = usage(2, 8)
    assert (found.host_bytes, found.device_bytes, found.peak_phase) == (2 * GIB, 8 * GIB, "student")
    assert (found.cores, found.per_hour) == (0.75, 10.0)


def test_the_command_prints_its_proposal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path / "space.yaml", tree(resources={"cpu": 1, "gpu": 1}))
    there = replace(machine(8, 60, 80), load=0.3)
    best = Measured(Level(4, 2, 0.25), (Reading(40.0, 0.5, 0.8, GIB),))
    packed = Packing(there, (usage(2, 8), usage(3, 16, name="largest corner: mlp, width 9")), Exploration(), best)
    packed.exploration.measured.append(best)
    packed.exploration.ended = "8 at once did less than fewer"
    monkeypatch.setattr(pack, "measure_packing", lambda *_, **__: packed)
    monkeypatch.setattr(pack, "this_machine", lambda *_: there)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 7.0, 7.0))  # what the measurement makes of it
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert pack.main([str(space)]) == 0
    printed = capsys.readouterr().out
    assert "one trial (first point: mlp): 8 GiB of the GPU, 2 GiB of memory, at most in student" in printed
    assert "one trial (largest corner: mlp, width 9): 16 GiB of the GPU" in printed
    assert "more were not measured: 8 at once did less than fewer" in printed
    assert "its cap: 20 GiB; a trial that needs more fails" in printed
    assert "most trials an hour: 4 at once; --set resources.gpu=0.25 --set resources.cpu=2\n" in printed
    assert "in the space file: resources: {cpu: 2, gpu: 0.25}" in printed
    assert "--set resources.memory_gb=3.3\n" in printed
    assert "60 GiB of memory free, load 0.3 before\n" in printed
    for host, asked in ((95, 104.5), (0.83, 0.92), (10, 11)):  # a tenth more, never less
        assert memory_setting(round(host * GIB)) == f"--set resources.memory_gb={asked}"


def test_one_level_for_want_of_time_proposes_nothing() -> None:
    found = FakeDevice({1: 10, 2: NoTimeError("late")}).explore(100)
    config = load_search_config(find_space_file("digits"))
    packing = Packing(machine(8, 60), (usage(2),), found, found.measured[0])
    told = list(pack.lines("here", packing, config))
    assert told[-1] == (
        "so there is nothing to compare, and nothing to propose; give it more time, for example --seconds 240"
    )
    assert not any("--set" in line for line in told)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "nothing"),
        (["SPACE", "--seconds", "0"], "--seconds 0; expected a number above 0"),
        (["SPACE", "--seconds", "inf"], "--seconds inf; expected a number above 0"),
        (["SPACE", "--seconds", "nan"], "--seconds nan; expected a number above 0"),
        (["SPACE", "--set", "resources.gpus=1"], "resources.gpus"),
        (["SPACE", "--set", "data.path=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path / "space.yaml", tree())
    assert pack.main([str(space) if word == "SPACE" else word for word in arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert printed.err.startswith("error: ")
    assert text in printed.err


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> TrialSample:
    config = config_of(tmp_path_factory.mktemp("sample"))
    found, largest = trial_samples(space_of(config), load_dataset(config.data))
    assert largest is None
    return found


def test_a_sample_stands_for_its_trial(sample: TrialSample) -> None:
    """1,527 training images of digits, a fifth of them held out; batches of 64, 2 epochs."""
    assert (sample.images, sample.steps, sample.teacher_steps) == (305, 2 * 20, 0)
    assert (len(sample.part.train), len(sample.part.validation), sample.batches) == (192, 256, 3)
    assert sample.data_bytes == 1527 * 64
    assert len(sample.chunk(CPU)) == 64
    assert sample.trial_seconds(0.5, 0.01, 7.0) == pytest.approx(40 * 0.5 + 305 * 0.01)
    assert replace(sample, teacher_steps=10).trial_seconds(0.5, 0.01, 7.0) == pytest.approx(93.05)
    # A view would be sent to other processes with all images behind it.
    assert sample.part.train.images.untyped_storage().nbytes() == 192 * 64


def test_a_trial_is_measured_in_all_its_phases(sample: TrialSample) -> None:
    ladder = sample.recipe.verification.model_copy(update={"rungs": ("ibp", "branch_and_bound", "crown")})
    recipe = sample.recipe.model_copy(update={"verification": ladder})
    found = measure_trial(replace(sample, recipe=recipe, part=training_part(sample.part, recipe, 1)), CPU)
    assert list(found.phases) == ["teacher", "student", "ibp", "crown"]  # a time limit is not to be measured
    assert all(phase.seconds > 0 and phase.host_bytes > 100 * 2**20 for phase in found.phases.values())
    assert found.device_bytes == 0
    assert found.seconds == pytest.approx(40 * found.step + 305 * found.image)


def test_every_rung_meets_every_image(sample: TrialSample) -> None:
    """However few images a network classifies that has seen three batches: proofs would have nothing to do."""
    network = build_network("mlp", input_shape=(1, 8, 8), num_classes=10, width=8)
    images = sample.chunk(CPU)
    tables = {rung: climb() for rung, climb in rungs(network, images, sample.recipe.verification)}
    assert list(tables) == ["pgd", "ibp", "crown"]
    for rung, found in tables.items():
        assert isinstance(found, pa.Table)
        assert "clean" not in found["method"].to_pylist()
        assert set(found["method"].to_pylist()) <= {rung, ""}


def test_the_largest_corner_is_named(tmp_path: Path) -> None:
    width = {"low": 4, "high": 32, "integer": True}
    config = config_of(tmp_path, network__width=width, student__batch_size={"choices": [32, 128]}, search__points=[])
    dataset = load_dataset(config.data)
    corner = largest_corner(space_of(config), dataset)
    assert corner is not None
    assert (corner["width"], corner["batch_size"], corner["loss"]) == (32, 128, "cc_dist")
    first, largest = trial_samples(space_of(config), dataset)
    assert largest is not None
    assert (first.name, largest.name) == (
        "first point: mlp, width 4, batches of 32",
        "largest corner: mlp, width 32, batches of 128",
    )
    assert largest.teacher_steps == 20  # the network is searched, so each trial trains a teacher of its own


def test_the_first_point_that_says_enough_is_typical(tmp_path: Path) -> None:
    enough = {"loss": "cc_dist", "alpha": 0.5, "beta": 5, "warm_up": 0, "steps": 2}
    assert typical(space_of(config_of(tmp_path, search__points=[{}, {"alpha": 0.1}, enough]))) == enough
    assert typical(space_of(config_of(tmp_path, search__points=[{"alpha": 0.1}])))["alpha"] != 0.1  # a corner


def test_the_peak_of_memory_begins_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = 256 * 2**20
    with used(CPU) as large, mmap.mmap(-1, size) as memory:  # a tensor's may be kept when it is freed
        memory.write(bytes(size // 2))
        memory.write(bytes(size // 2))
    with used(CPU) as small:
        pass
    assert large.host_bytes - small.host_bytes > size // 2
    assert peak_memory() >= small.host_bytes
    before = peak_memory()
    monkeypatch.setattr(device_usage, "_PROC", tmp_path)  # another system
    reset_peak_memory()
    assert peak_memory() == pytest.approx(before, rel=0.1)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("line", "mount", "names"), [("0::/slurm/job_7", "", V2), ("4:memory:/slurm/job_7", "memory", V1)]
)
def test_memory_of_the_control_groups_around_a_process_counts(
    line: str, mount: str, names: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proc, root = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").symlink_to("/proc/meminfo")
    (proc / "self" / "cgroup").write_text(f"5:devices:/elsewhere\n{line}\n1:name=systemd:/x\n")
    monkeypatch.setattr(device_usage, "_PROC", proc)
    monkeypatch.setattr(device_usage, "_GROUPS", root)
    machine_memory = host_memory()
    assert 0 < machine_memory.free <= machine_memory.total

    def group(path: str, limit: str, held: int, caches: int) -> None:
        folder = root / mount / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, told in zip(names, (limit, held), strict=False):
            (folder / name).write_text(f"{told}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {caches}\nactive_file 9\n")

    mib = 2**20
    group("slurm/job_7", "max" if mount == "" else str(2**63 - 4096), 30 * mib, 0)
    assert host_memory().total == machine_memory.total
    group("slurm", str(100 * mib), 70 * mib, 60 * mib)  # of the group around it
    assert host_memory() == device_usage.HostMemory(100 * mib, 90 * mib)
    group("slurm/job_7", str(80 * mib), 30 * mib, 5 * mib)
    assert host_memory() == device_usage.HostMemory(80 * mib, 55 * mib)
    group("", str(40 * mib), 39 * mib, 0)  # as a container sees its own one, whatever it is called outside
    assert host_memory() == device_usage.HostMemory(40 * mib, 1 * mib)


@pytest.fixture
def limited() -> Iterator[Path]:
    """A real control group that may hold 200 MiB, with one in it that says nothing."""
    own = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), None)
    outer = Path(f"/sys/fs/cgroup/memory{own.rpartition(':')[2]}") / f"ccdist-{os.getpid()}" if own else Path("/none")
    try:
        (outer / "inner").mkdir(parents=True)
        (outer / "memory.limit_in_bytes").write_text(str(200 * 2**20))
    except OSError:
        pytest.skip("needs the right to make control groups of version 1")
    yield outer
    for group in (outer / "inner", outer):
        group.rmdir()


def test_memory_of_a_real_control_group(limited: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its process has written 64 MiB of files, which lie in the caches of the group."""
    script = f"echo $$ > {limited}/inner/cgroup.procs; dd if=/dev/zero of={tmp_path}/file bs=1M count=64 2> /dev/null"
    with subprocess.Popen(
        ["sh", "-c", f"{script}; echo; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as there:
        assert there.stdin is not None
        assert there.stdout is not None
        assert there.stdout.readline()
        (tmp_path / "self").symlink_to(f"/proc/{there.pid}")
        (tmp_path / "meminfo").symlink_to("/proc/meminfo")
        monkeypatch.setattr(device_usage, "_PROC", tmp_path)
        found = host_memory()
        there.stdin.close()
    assert found.total == 200 * 2**20
    assert 180 * 2**20 < found.free <= found.total


def test_what_gpus_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    told = "NVIDIA H200, 143771, 512, 37\\nNVIDIA A100 MIG 1g, 9728, 0, [N/A]\\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncase \"$*\" in *--id=7*) exit 9;; esac\nprintf '{told}'\n")
    (tmp_path / "nvidia-smi").chmod(stat.S_IRWXU)
    assert gpus() == [Gpu("NVIDIA H200", 143771 * 2**20, 512 * 2**20, 0.37)]
    assert gpus("7") == []


def test_a_machine_without_a_gpu_shares_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.7, 9.0, 9.0))
    found = this_machine(config.resources, 1000)
    assert (found.cores, found.gpu, found.load) == (len(os.sched_getaffinity(0)), "", 1.7)
    assert this_machine(config.resources, 0, cores=3).cores == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(device_usage, "gpus", lambda _: [Gpu("H200", 140 * GIB, 40 * GIB, 0.0)])
    monkeypatch.setattr(side_by_side, "host_memory", lambda: device_usage.HostMemory(1000 * GIB, 800 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    there = this_machine(config_of(tmp_path, resources={"gpu": 1}).resources, 0)
    assert there == Machine(8, 200 * GIB, "H200", 140 * GIB, 100 * GIB, 1.7)
    assert this_machine(config.resources, 0).gpu == ""  # resources.gpu is 0


class FakeCopies:
    """In place of processes; trials of so many GiB, and so many an hour together."""

    def __init__(self, device: float, rates: dict[int, float]) -> None:
        self.device, self.rates, self.alone_on = device, rates, list[Level]()

    def __call__(self, sample: TrialSample, time_left: Callable[[], float]) -> "FakeCopies":
        self.sample = sample
        return self

    def __enter__(self) -> "FakeCopies":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def alone(self, level: Level) -> TrialUsage:
        self.alone_on.append(level)
        if self.device > 80:
            raise OutOfMemoryHere("CUDA out of memory")
        is_large = self.sample.name.startswith("largest")
        return usage(2, 2 * self.device if is_large else self.device, name=self.sample.name)

    def read(self, level: Level, alone: TrialUsage) -> Reading:
        return Reading(self.rates[level.copies], 0.5, 0.5, GIB)


def test_a_gpu_is_packed_by_memory_and_by_what_was_measured(
    sample: TrialSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCopies(8, {1: 10, 2: 18, 4: 30, 5: 29})
    monkeypatch.setattr(side_by_side, "Copies", fake)
    large = replace(sample, name="largest corner: mlp")
    packed = measure_packing(sample, large, machine(16, 200, 80), seconds=60)
    assert fake.alone_on == [Level(1, 16, 1.0)] * 2
    assert [each.level.copies for each in packed.exploration.measured] == [1, 2, 4, 5]  # 80 / 16 GiB
    assert packed.best.level == Level(4, 4, 0.25)
    assert [each.sample for each in packed.usages] == [sample.name, large.name]
    fake.device = 90
    with pytest.raises(PackingError, match="not even one trial fits into the GPU's 80 GiB that are free"):
        measure_packing(sample, None, machine(16, 200, 80), seconds=60)


@pytest.fixture
def copies(sample: TrialSample) -> Iterator[Copies]:
    before = set(multiprocessing.active_children())
    with Copies(sample, lambda: 100.0, window=0.5) as pool:
        yield pool
    assert set(multiprocessing.active_children()) == before


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_real_processes(copies: Copies) -> None:
    alone = copies.alone(Level(1, 1))
    assert list(alone.phases) == ["teacher", "student", "pgd", "ibp", "crown"]
    assert 2**28 < alone.host_bytes < 2**33
    one, two = copies.read(Level(1, 1), alone), copies.read(Level(2, 1), alone)
    for reading in (one, two):
        assert 0 < reading.per_hour < 3600 * 1000
        assert 0 < reading.busy <= 1.1
        assert reading.host_bytes > 2**28
    # A process that the system kills where memory is short, and then the pool goes on.
    process = copies._running[0][0]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(OutOfMemoryHere, match="a process was killed"):
        copies.read(Level(2, 1), alone)
    assert copies.read(Level(1, 1), alone).per_hour > 0


@dataclass
class Ended:
    """In place of a process that has ended so."""

    exitcode: int

    def join(self, timeout: float | None = None) -> None:
        pass

    def terminate(self) -> None:
        pass

    def is_alive(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("last", "code", "told"),
    [
        (("failed", (True, "CUDA out of memory")), 0, OutOfMemoryHere("CUDA out of memory")),
        (("failed", (False, "diverges")), 0, PackingError("a trial fails: diverges")),
        (None, -9, OutOfMemoryHere("a process was killed, as the system does when memory runs out")),
        (None, 1, PackingError("a process of the measurement ended with exit code 1")),
    ],
)
def test_a_copy_that_is_gone_is_no_traceback(last: object, code: int, told: Exception, sample: TrialSample) -> None:
    """Also when it has gone before anything was asked of it."""
    for ask in (lambda pool: pool.alone(Level(1, 1)), lambda pool: pool.read(Level(1, 1), usage())):
        pool, (ours, theirs) = Copies(sample, lambda: 5.0), multiprocessing.Pipe()
        if last is not None:
            theirs.send(last)
        theirs.close()
        pool._running.append((Ended(code), ours))  # type: ignore[arg-type]
        with pytest.raises(type(told)) as caught:
            ask(pool)
        assert str(caught.value) == str(told)
        assert pool._running == []


def test_an_error_of_the_system_in_a_trial_is_told(sample: TrialSample, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the end of the measurement, which is an error of the system, too."""

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("search.sharing.side_process.measure_trial", no_room)
    monkeypatch.setattr("search.worker.prepare_process", lambda _: CPU)
    ours, theirs = multiprocessing.Pipe()
    ours.send((ALONE, Level(1, 1).resources))
    serve(theirs, pickle.dumps(sample))
    assert ours.recv() == ("failed", (False, "[Errno 28] No space left on device"))
    ours.close()
    serve(theirs, pickle.dumps(sample))
    theirs.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_a_trial_raises_is_told_in_one_line(sample: TrialSample) -> None:
    bad = sample.recipe.student.model_copy(update={"learning_rate": {"kind": "none"}})
    broken = replace(sample, recipe=sample.recipe.model_copy(update={"student": bad}))
    with Copies(broken, lambda: 60.0) as pool, pytest.raises(PackingError, match=r"^a trial fails: ") as caught:
        pool.alone(Level(1, 1))
    assert "\n" not in str(caught.value)
    with Copies(sample, lambda: -1.0) as pool, pytest.raises(NoTimeError, match="took longer than the time limit"):
        pool.alone(Level(1, 1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    space = write_space(tmp_path / "space.yaml", tree())
    assert pack.main([str(space), "--seconds", "90"]) == 0
    printed = capsys.readouterr().out
    assert "one trial (first point: mlp, width 8, batches of 64)" in printed
    assert "most trials an hour: " in printed
    assert list(tmp_path.iterdir()) == [space]


def test_the_proposals_are_pure() -> None:
    """Nothing in the choice imports Ray or starts a process."""
    source = Path(packing.__file__).read_text()
    assert not any(word in source for word in ("import ray", "multiprocessing", "subprocess"))
