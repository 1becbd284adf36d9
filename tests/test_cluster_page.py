"""docs/CLUSTER.md: at most twelve commands, each checked against what would read it, as far as no cloud is needed."""

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray._private.authentication import authentication_constants
from ray.scripts.scripts import cli

from search import front, run
from search.config import SearchConfig, find_space_file, load_search_config
from search.errors import UserError
from search.storage import DEFAULT_STORAGE

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "CLUSTER.md"
TEXT = PAGE.read_text()
STEPS, REST = re.split(r"^## What runs where$", TEXT, flags=re.MULTILINE)
MOST = 12
# Modules that a command of the page may run; each has its parser there.
MODULES = ("search.run", "search.front", "search.doctor", "search.pack")
SLURM = ROOT / "docs" / "clusters" / "slurm.sh"
pytestmark = pytest.mark.timeout(30)  # the first command of a kind imports what reads it


class PageError(Exception):
    """A command of the page that whoever types it would see refused."""


# ---- what the page says -----------------------------------------------------------------------------------------


def in_blocks(text: str) -> list[str]:
    """The commands of the blocks, one for each line, or for lines joined by a backslash."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def in_text(text: str) -> list[str]:
    """Commands that are written out in a sentence; `ray up` alone is a name."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [
        span
        for span in spans
        if re.match(r"(ray( job)?|make|sbatch|python -m) \S+ \S", span) and span != "ray job stop"
    ]


TWELVE = in_blocks(STEPS)
ALL = [*TWELVE, *in_blocks(REST), *in_text(TEXT)]


def the_one(start: str) -> list[str]:
    """The words of the only command of the twelve that begins so."""
    (found,) = [command for command in TWELVE if command.startswith(start)]
    return words_of(found)


# ---- what would read it -----------------------------------------------------------------------------------------


def words_of(command: str) -> list[str]:
    """The words of one command.

    Raises:
        PageError: it is more than one: they would not be counted.
    """
    pieces = shlex.shlex(command, posix=True, punctuation_chars=True)
    pieces.whitespace_split = True
    words = list(pieces)
    if any(re.fullmatch(r"[;&|<>()]+", word) for word in words):
        raise PageError(f"{command}: more than one command")
    return words


def check(command: str) -> None:
    """Whether all that reads a command would take it.

    Raises:
        PageError, SystemExit, click.ClickException, UserError: it would not.
    """
    words = words_of(command)
    if words[0] not in CHECKS:
        raise PageError(f"{command}: not a program that is checked here")
    CHECKS[words[0]](words[1:])


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [word.partition("=")[0] for word in words]
    if words[0] not in targets or not set(named[1:]) <= set(variables):
        raise PageError(f"make {' '.join(words)}: the Makefile has no such target or variable")


def check_source(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    if words != [".venv/bin/activate"] or "\nVENV := .venv\n" not in makefile:
        raise PageError(f"source {words}: make setup makes no such file")


def check_export(words: list[str]) -> None:
    if words != ["RAY_AUTH_MODE=token"]:
        raise PageError(f"export {words}: nothing reads that")


def check_cd(words: list[str]) -> None:
    mounted = {name.rsplit("/", 1)[0] for name in cluster("ray_cluster.yaml")["file_mounts"]}
    if len(words) != 1 or words[0] not in mounted:
        raise PageError(f"cd {words}: no such folder on a node")


def check_bash(words: list[str]) -> None:
    if len(words) != 1 or words[0] not in cluster("docs/clusters/local.yaml")["file_mounts"]:
        raise PageError(f"bash {words}: no such file on a machine of one's own")


def check_ray(words: list[str]) -> None:
    """By Ray's own command line, and its cluster file by being there."""
    context = click.Context(cli, info_name="ray")
    name, command, rest = cli.resolve_command(context, words)
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, info_name=name)
        name, command, rest = command.resolve_command(context, rest)
    assert command is not None
    params = command.make_context(name, list(rest), parent=context).params
    if "cluster_config_file" in params:
        cluster(params["cluster_config_file"])
    for part in (params.get("cmd") or "").split("&&"):  # on the head
        if part.strip():
            check(part.strip())


def check_python(words: list[str]) -> None:
    if words[0] != "-m" or words[1] not in MODULES:
        raise PageError(f"python {' '.join(words)}: not a module that is checked here")
    parsed(words[1], words[2:])


def check_sbatch(words: list[str]) -> None:
    options = [word for word in words if word.startswith("--export=ALL,")]
    script, *arguments = words[len(options) :]
    for name in re.findall(r",(\w+)=", "".join(options)):
        if not re.search(rf"\$\{{{name}\b", SLURM.read_text()):
            raise PageError(f"{name}: {script} does not read it")
    if ROOT / script != SLURM:
        raise PageError(f"{script}: no such script")
    parsed("search.run", arguments)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "source": check_source,
    "export": check_export,
    "cd": check_cd,
    "bash": check_bash,
    "ray": check_ray,
    "python": check_python,
    "sbatch": check_sbatch,
}


def parsed(module: str, arguments: list[str]) -> Any:
    """By the module's own parser; a space file and its settings by the search's own reader."""
    args = importlib.import_module(module)._parser().parse_args(arguments)
    if hasattr(args, "space") or getattr(args, "cluster", False):
        config_of(args)
    return args


def config_of(args: Any) -> SearchConfig:
    name = args.space if hasattr(args, "space") else args.study
    return load_search_config(ROOT / name if (ROOT / name).is_file() else find_space_file(name), args.set)


@cache
def cluster(name: str) -> Any:
    if not (ROOT / name).is_file():
        raise PageError(f"{name}: no such cluster file")
    return yaml.safe_load((ROOT / name).read_text())


# ---- the tests --------------------------------------------------------------------------------------------------


def test_at_most_twelve_commands_and_each_has_its_number() -> None:
    assert 8 <= len(TWELVE) <= MOST
    numbers = re.findall(r"^\*\*([\d, ]+)\.", STEPS, flags=re.MULTILINE)
    assert [int(number) for text in numbers for number in text.split(",")] == list(range(1, len(TWELVE) + 1))
    assert ("Twelve commands" in STEPS) == (len(TWELVE) == 12)


@pytest.mark.parametrize("command", ALL)
def test_a_command_is_taken_by_what_reads_it(command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make serach",
        "ray up ray_clusters.yaml",
        "ray attach ray_cluster.yaml --port-forwards 5000",
        "ray job submit --adress http://127.0.0.1:8265 -- nvidia-smi",
        "ray exec ray_cluster.yaml 'cd ~/ccdist && python -m search.doctor --clusters spaces/cifar.yaml'",
        "ray exec ray_cluster.yaml 'cd ~/project && python -m search.pack spaces/cifar.yaml'",
        "ray exec docs/clusters/local.yaml 'bash ~/ccdist/halt.sh'",
        "python -m search.run spaces/cifar.yaml --detatch",
        "python -m search.run spaces/cifar.yaml --set resources.gpus=0.25",
        "python -m search.run spaces/cifar.yaml --set resources.gpu=1.5",
        "python -m search.pack spaces/cifar10.yaml",
        "python -m search.front cifar --adress http://127.0.0.1:8265",
        "sbatch --export=ALL,SHARE=/scratch docs/clusters/slurm.sh spaces/cifar.yaml",
        "make search && make ui",
        "curl http://127.0.0.1:8265",
    ],
)
def test_a_command_with_a_mistake_is_found(command: str) -> None:
    with pytest.raises((PageError, SystemExit, click.ClickException, UserError)):
        check(command)


def test_every_part_of_the_way_is_there() -> None:
    """From the laptop to the cluster, preflight, packing, search, watching, home, and nothing left."""
    order = [
        "make search",
        "ray up",
        "ray attach",
        "search.doctor --cluster",
        "search.pack",
        "--detach",
        "search.front",
    ]
    order += ["ray rsync-down", "ray down"]
    places = [next((number for number, command in enumerate(TWELVE) if part in command), -1) for part in order]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == len(TWELVE) - 1


def test_the_tunnels_lead_to_where_the_head_listens() -> None:
    started = "\n".join(cluster("ray_cluster.yaml")["head_start_ray_commands"])
    (dashboard,) = re.findall(r"--dashboard-host=127\.0\.0\.1 --dashboard-port=(\d+)", started)
    (mlflow,) = re.findall(r"mlflow server --host 127\.0\.0\.1 --port (\d+)", started)
    words = the_one("ray attach")
    tunnels = [port for option, port in pairwise(words) if option == "--port-forward"]
    assert tunnels == [dashboard, mlflow]
    addresses = re.findall(r"--address (http://\S+)", "\n".join(ALL))
    assert set(addresses) == {f"http://127.0.0.1:{dashboard}"}
    assert len(addresses) >= 3


def test_the_search_fills_the_gpus_that_the_file_allows() -> None:
    args = parsed("search.run", the_one("python -m search.run")[3:])
    resources = config_of(args).resources
    assert args.detach
    assert isinstance(resources.concurrency, int)
    assert resources.concurrency * resources.gpu == cluster("ray_cluster.yaml")["max_workers"] == 32


def test_all_commands_are_about_the_same_study_and_the_same_bucket() -> None:
    config = config_of(parsed("search.run", the_one("python -m search.run")[3:]))
    assert parsed("search.front", the_one("python -m search.front")[3:]).study == config.study_name
    assert set(re.findall(r"storage\.artifacts=([^\s']+)", "\n".join(TWELVE))) == {config.storage.artifacts}
    source, target = the_one("ray rsync-down")[3:]
    # Paths of a detached search are below the head's home folder.
    assert source == f"~/{DEFAULT_STORAGE}/"
    assert f"mkdir -p ~/{DEFAULT_STORAGE}/mlflow;" in cluster("ray_cluster.yaml")["head_start_ray_commands"][1]
    assert f"--storage {target.rstrip('/')}" in TEXT


def test_the_other_files_are_there() -> None:
    files = set(re.findall(r"`(docs/clusters/[\w.]+)`", REST))
    assert files == {f"docs/clusters/{name}" for name in ("gcp.yaml", "azure.yaml", "local.yaml", "slurm.sh")}
    assert [name for name in files if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", ["CLUSTER.md", "clusters/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / "docs" / page
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        if re.match(r"https?://127\.0\.0\.1", name):
            continue
        target = path.parent / name if name else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


# ---- messages ---------------------------------------------------------------------------------------------------


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a source, with a mark for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


@cache
def all_texts() -> list[str]:
    ours = [text for path in (ROOT / "search").rglob("*.py") for text in texts_of(path)]
    return [*ours, authentication_constants.TOKEN_AUTH_ENABLED_BUT_NO_TOKEN_FOUND_ERROR_MESSAGE]


MESSAGES = [row for row in re.findall(r"^\| `([^`]+)` \|", REST, re.MULTILINE) if " " in row]


def test_there_are_messages() -> None:
    assert len(MESSAGES) >= 8


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_programs(message: str) -> None:
    pieces = [re.escape(piece).replace("=N", "=.*") for piece in message.split("...")]
    assert [text for text in all_texts() if re.search(".*".join(pieces), text, re.DOTALL)] != []


def test_without_the_tunnel_the_message_of_the_page_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    closed = "http://127.0.0.1:9"
    (message,) = [row for row in MESSAGES if row.startswith("no Ray dashboard answers")]
    assert front.main(["cifar", "--address", closed]) == 2
    assert message.replace("...", closed) in capsys.readouterr().err
    assert run.main([str(ROOT / "spaces" / "digits.yaml"), "--detach", "--address", closed]) == 2
    assert message.replace("...", closed) in capsys.readouterr().err
