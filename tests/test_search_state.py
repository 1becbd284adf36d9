"""A branch and bound that is killed goes on to the same outcomes; a state of anything else is refused."""

import copy
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import strategies
import test_branch_and_bound as bab
import torch
from strategies import Deployed
from torch import Tensor, nn

from ccdist import search_state
from ccdist.branch_and_bound import Counts, Outcome, branch_and_bound
from ccdist.checkpoint import CorruptCheckpointError, load
from ccdist.config import BranchAndBoundConfig, DataConfig, ThreatModel
from ccdist.data import load_test_set
from ccdist.device_memory import Budget
from ccdist.networks import Network

pytestmark = pytest.mark.timeout(40)

ASSETS = Path(__file__).parent / "assets" / "verification"
OnRound = bab.search.OnRound


class Killed(Exception):
    pass


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is written after every round, and few images are open at once."""
    monkeypatch.setattr(search_state, "INTERVAL_S", 0.0)
    monkeypatch.setattr(search_state, "PATIENCE", 0.0)
    monkeypatch.setattr(Budget, "images", lambda *_: 5)
    monkeypatch.setattr(bab.search, "ROOT_IMAGES", 2)


def killer(rounds: int) -> OnRound:
    """Stops in the round of this number, before its state is written."""
    left = itertools.count(rounds, -1)

    def on_round(counts: Counts, new: list[Outcome]) -> None:
        if next(left) <= 1:
            raise Killed

    return on_round


def search(case: Deployed, state: Path, on_round: OnRound | None = None, **values: object) -> list[Outcome]:
    return branch_and_bound(
        case.network,
        case.images,
        case.labels,
        threat=case.threat,
        config=bab.options(**values),
        state=state,
        on_round=on_round,
    )


def killed_once(case: Deployed, state: Path, rounds: int = 4) -> None:
    with pytest.raises(Killed):
        search(case, state, killer(rounds))
    assert (state / "rounds.safetensors").exists()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))])
def test_killed_at_random_rounds(seed: int, tmp_path: Path) -> None:
    case, state, draw = bab.hard(), tmp_path / "deep" / "state", random.Random(seed)
    expected, kills = bab.outcomes(case, max_branches=16), 0
    while True:
        try:
            found = search(case, state, killer(draw.randint(2, 7)), max_branches=16)
            break
        except Killed:
            kills += 1
            assert kills < 100
    assert kills >= 1
    assert [outcome.position for outcome in found] == list(range(len(expected)))
    for one, other in zip(expected, found, strict=True):
        bab.assert_same(one, other)
    bab.assert_confirmed(case, found)
    assert not state.exists()


@pytest.mark.usefixtures("eager")
def test_counts_go_on_where_they_stood(tmp_path: Path) -> None:
    case, state = bab.hard(), tmp_path / "state"
    first: list[tuple[Counts, list[Outcome]]] = []

    def five(counts: Counts, new: list[Outcome]) -> None:
        first.append((counts, new))
        if len(first) == 5:
            raise Killed

    with pytest.raises(Killed):
        search(case, state, five, max_branches=16)
    second: list[tuple[Counts, list[Outcome]]] = []
    found = search(case, state, lambda counts, new: second.append((counts, new)), max_branches=16)
    # The last round of the first call was not stored: what it decided is decided again.
    stored, again = [o for _, new in first[:-1] for o in new], [o for _, new in second for o in new]
    positions = sorted(outcome.position for outcome in [*stored, *again])
    assert positions == list(range(len(found)))
    assert second[0][0].proved + second[0][0].falsified >= len([o for o in stored if bab.is_decided(o)])
    seconds = {outcome.position: outcome.seconds for outcome in found}
    for outcome in stored:
        assert seconds[outcome.position] == outcome.seconds


@pytest.mark.usefixtures("eager")
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    case, state = bab.hard(), tmp_path / "state"
    killed_once(case, state)
    positions = {int(file.stem.split("-")[1]) for file in state.glob("image-*")}
    assert positions
    assert not list(state.glob(".*"))
    search(case, state)
    assert list(tmp_path.iterdir()) == []


# --- Whose state it is


def changed(case: Deployed, what: str) -> tuple[Deployed, dict[str, object]]:
    images, labels, network, threat = case.images.clone(), case.labels.clone(), copy.deepcopy(case.network), case.threat
    values: dict[str, object] = {}
    if what == "images":
        images[3, 0, 0, 0] = 1 - images[3, 0, 0, 0]
    elif what == "labels":
        labels[3] = (labels[3] + 1) % 3
    elif what == "network":
        with torch.no_grad():
            network.head.bias[0] += 1e-6
    elif what == "threat":
        threat = ThreatModel(epsilon=case.threat.epsilon + Fraction(1, 10**6))
    elif what == "norm":
        threat = ThreatModel(norm="l2", epsilon=case.threat.epsilon)
    elif what == "config":
        values = {"candidates": 4}
    elif what == "activation":
        network.features[2] = nn.LeakyReLU(0.5).eval()
    elif what == "count":
        images, labels = images[:-1], labels[:-1]
    return Deployed.of(network, images, labels, threat), values


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("what", ["images", "labels", "network", "threat", "norm", "config", "count", "activation"])
def test_a_state_of_something_else_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    killed_once(bab.hard(), tmp_path / "state")
    other, values = changed(bab.hard(), what)
    kept = (tmp_path / "state" / "rounds.safetensors").read_bytes()
    named = {"norm": "threat", "count": "images", "activation": "network"}.get(what, what)
    with pytest.raises(ValueError, match=f"holds a branch and bound with another.* {named}") as error:
        search(other, tmp_path / "state", **values)
    assert "\n" not in str(error.value)
    assert (tmp_path / "state" / "rounds.safetensors").read_bytes() == kept  # of someone who may still want it


@pytest.mark.usefixtures("eager")
def test_images_of_another_shape_are_other_images(tmp_path: Path) -> None:
    """The same pixels as one row, for a network that flattens them."""
    case = bab.hard()
    killed_once(case, tmp_path / "state")
    other = Deployed.of(case.network, case.images.reshape(12, 1, 12, 1), case.labels, case.threat)
    with pytest.raises(ValueError, match="another images"):
        search(other, tmp_path / "state")


# --- Damage


@pytest.mark.usefixtures("eager")
def test_a_damaged_file_is_refused_or_tells_the_truth(tmp_path: Path) -> None:
    """Any byte of any file: in the tensors, in the header, in its length; files cut short, emptied, gone."""
    case, state, draw = bab.hard(), tmp_path / "state", random.Random(0)
    expected = bab.outcomes(case, max_branches=8)
    with pytest.raises(Killed):
        search(case, state, killer(4), max_branches=8)
    files = {file: file.read_bytes() for file in state.iterdir()}
    rounds = state / "rounds.safetensors"
    damaged: list[tuple[Path, bytes | None]] = [(file, content[: len(content) // 2]) for file, content in files.items()]
    damaged += [(file, b"") for file in files] + [(file, None) for file in files if file != rounds]
    for _ in range(24):
        file = draw.choice([rounds, *files])
        content = bytearray(files[file])
        header = int.from_bytes(content[:8], "little")
        place = draw.choice([draw.randrange(8), 8 + draw.randrange(header), draw.randrange(len(content))])
        content[place] ^= 1 << draw.randrange(8)
        damaged.append((file, bytes(content)))
    refused = 0
    for file, content in damaged:
        state.mkdir(exist_ok=True)
        for kept, original in files.items():
            kept.write_bytes(original)
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        try:
            found = search(case, state, max_branches=8)
        except ValueError as error:
            # Damage may be in what says whose state it is.
            message = str(error)
            understood = isinstance(error, CorruptCheckpointError) or "holds a branch and bound with another" in message
            if not understood or "\n" in message:
                raise
            refused += 1
            continue
        for one, other in zip(expected, found, strict=True):
            bab.assert_same(one, other)
    assert refused >= len(damaged) // 2


@pytest.mark.usefixtures("eager")
def test_a_header_that_was_changed_is_damage(tmp_path: Path) -> None:
    """One image marked as certified by hand."""
    case, state = bab.hard(), tmp_path / "state"
    killed_once(case, state, 3)
    file = state / "rounds.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    stored = json.loads(header["__metadata__"]["state"])
    inner = json.loads(stored["search"])
    inner["waiting"], lost = inner["waiting"][1:], inner["waiting"][0]
    inner["outcomes"].append(
        {"position": lost, "certified": True, "falsified": False, "lower_bound": 1.0, "seconds": 0.0, "branches": 0}
    )
    stored["search"] = json.dumps(inner)
    header["__metadata__"]["state"] = json.dumps(stored)
    changed_header = json.dumps(header).encode()
    file.write_bytes(len(changed_header).to_bytes(8, "little") + changed_header + content[8 + size :])
    with pytest.raises(CorruptCheckpointError):
        search(case, state)


def test_a_state_without_rounds_begins_anew(tmp_path: Path) -> None:
    """Killed after the first image was written and before the rounds were."""
    case, state = bab.hard(), tmp_path / "state"
    state.mkdir()
    (state / "image-0.safetensors").write_bytes(b"half a file")
    for one, other in zip(bab.outcomes(case, max_branches=8), search(case, state, max_branches=8), strict=True):
        bab.assert_same(one, other)
    assert not state.exists()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", ["l2", "double", "convolution"])
def test_other_kinds_of_networks_go_on_too(kind: str, tmp_path: Path) -> None:
    if kind == "convolution":
        layers = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 14))
        network = Network(nn.Sequential(*layers, nn.LeakyReLU(0.2)), nn.Linear(14, 3))
        network = strategies.randomize(network, torch.Generator().manual_seed(3)).float()
        images = torch.rand((8, 1, 3, 11), generator=torch.Generator().manual_seed(0))
    else:
        network, images = bab.hard().network, bab.hard().images[:6]
        if kind == "double":
            network, images = copy.deepcopy(network).double(), images.double()
    labels = network(images).argmax(1)
    threat = ThreatModel(norm="l2", epsilon=Fraction(1, 2)) if kind == "l2" else ThreatModel(epsilon=Fraction(1, 5))
    case = Deployed.of(network, images, labels, threat)
    expected = bab.outcomes(case, max_branches=8)
    assert sum(outcome.branches for outcome in expected) >= 4
    kills = 0
    while True:
        try:
            found = search(case, tmp_path / "state", killer(3), max_branches=8)
            break
        except Killed:
            kills += 1
            assert kills < 100
    assert kills
    for one, other in zip(expected, found, strict=True):
        bab.assert_same(one, other)


# --- A real kill

POSITIONS = [190, 155]
SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_search_state import stored_search
stored_search(Path(sys.argv[1]), lambda counts, new: print(counts, flush=True))
"""


def stored_case() -> tuple[Network, Tensor, Tensor]:
    """Two images of a stored model that stay open for long."""
    name = "fashion_mnist"
    data = load_test_set(DataConfig(name=name, path=str(ASSETS / "images" / name)))
    images, labels = data.images[POSITIONS].float() / 255, data.labels[POSITIONS]
    return load(ASSETS / "fashion_mnist_cnn3"), images, labels


def stored_search(state: Path | None, on_round: OnRound | None = None) -> list[Outcome]:
    network, images, labels = stored_case()
    search_state.INTERVAL_S = search_state.PATIENCE = 0.0
    config = BranchAndBoundConfig(timeout_s=None, max_branches=32, round_size=2, root_steps=4, steps=3, candidates=3)
    return branch_and_bound(
        network,
        images,
        labels,
        threat=ThreatModel(epsilon="1/10"),
        config=config,
        state=state,
        on_round=on_round,  # type: ignore[arg-type]
    )


def test_killed_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle of a round; then to its end."""
    for name in ("INTERVAL_S", "PATIENCE"):
        monkeypatch.setattr(search_state, name, getattr(search_state, name))  # put back after stored_search
    expected, state = stored_search(None), tmp_path / "state"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(paths=paths), str(state)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert process.stdout is not None
    for _ in range(3):
        assert b"Counts" in process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert (state / "rounds.safetensors").exists()
    found = stored_search(state)
    for one, other in zip(expected, found, strict=True):
        bab.assert_same(one, other)
        assert one.branches >= 32
    assert not state.exists()
