"""Every cluster file of the repository against Ray's own schema and the project's promises; no cloud, no network."""

import copy
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import ClickException
from jsonschema import ValidationError  # type: ignore[import-untyped]
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).parent.parent
SKIPPED = ("build", "runs", "mlruns", "reruns")  # what commands leave behind
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
CLOUDS = ("aws", "gcp", "azure")
KINDS = (*CLOUDS, "local")
LOOPBACK = "127.0.0.1"
# Shell variables that the files set to the head's private address.
PRIVATE = ("$address", "$CCDIST_HEAD")

Cluster = dict[str, Any]


def found_files() -> Iterator[Path]:
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in SKIPPED]
    for path in [*ROOT.glob("*.yaml"), *(file for folder in folders for file in folder.rglob("*.yaml"))]:
        if re.search(r"^cluster_name:", path.read_text(), re.MULTILINE):
            yield path


FILES = sorted(found_files())
NAMES = {path: str(path.relative_to(ROOT)) for path in FILES}
every_file = pytest.mark.parametrize("path", FILES, ids=NAMES.get)


def load(path: Path) -> Cluster:
    loaded: Cluster = yaml.safe_load(path.read_text())
    return loaded


def kind(cluster: Cluster) -> str:
    return str(cluster["provider"]["type"])


CLOUD_FILES = [path for path in FILES if kind(load(path)) in CLOUDS]
every_cloud_file = pytest.mark.parametrize("path", CLOUD_FILES, ids=NAMES.get)


def commands(cluster: Cluster) -> list[str]:
    return [command for name in COMMANDS for command in cluster.get(name, [])]


def ray_commands(cluster: Cluster) -> list[str]:
    return [command for command in commands(cluster) if re.search(r"\bray (start|stop)\b", command)]


def node_types(cluster: Cluster) -> dict[str, Any]:
    types: dict[str, Any] = cluster["available_node_types"]
    return types


def worker_types(cluster: Cluster) -> dict[str, Any]:
    return {name: value for name, value in node_types(cluster).items() if name != cluster["head_node_type"]}


def header(path: Path) -> str:
    """The comment that a file begins with."""
    text, _, _ = path.read_text().partition("\n\n")
    return text


def validate(cluster: Cluster) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_there_is_a_file_for_each_kind_of_cluster() -> None:
    assert sorted(kind(load(path)) for path in FILES) == sorted(KINDS)
    assert ROOT / "ray_cluster.yaml" in FILES


# ---- Ray's schema -----------------------------------------------------------------------------------------------


@every_file
def test_ray_accepts_the_file(path: Path) -> None:
    cluster = load(path)
    before = copy.deepcopy(cluster)
    validate(cluster)  # raises where the file breaks Ray's schema
    assert cluster == before


def with_an_unknown_key(cluster: Cluster) -> None:
    cluster["setup_comands"] = cluster["setup_commands"]


def with_a_time_in_words(cluster: Cluster) -> None:
    cluster["idle_timeout_minutes"] = "ten"


def with_a_proxy_that_is_not_named(cluster: Cluster) -> None:
    cluster["auth"]["ssh_proxy_use_node_id"] = True


def with_a_command_that_is_a_mapping(cluster: Cluster) -> None:
    cluster["setup_commands"].append({"MODE=token ray": "stop"})  # what an unquoted colon makes of a command


def with_a_head_type_that_is_not_listed(cluster: Cluster) -> None:
    cluster["head_node_type"] = "heads"


def with_a_worker_type_that_says_no_machine(cluster: Cluster) -> None:
    del cluster["available_node_types"]["gpu_spot"]["node_config"]


def with_a_number_of_workers_in_words(cluster: Cluster) -> None:
    cluster["max_workers"] = "four"


def with_a_fraction_of_a_gpu_on_a_node(cluster: Cluster) -> None:
    cluster["available_node_types"]["gpu_worker"]["resources"] = {"GPU": 0.25}


def without_the_heads_address(cluster: Cluster) -> None:
    del cluster["provider"]["head_ip"]


def with_node_types_of_a_cloud(cluster: Cluster) -> None:
    cluster["available_node_types"] = {"head": {"resources": {}, "node_config": {}}}
    cluster["head_node_type"] = "head"


Break = Callable[[Cluster], None]
OF_ANY: list[Break] = [
    with_an_unknown_key,
    with_a_time_in_words,
    with_a_proxy_that_is_not_named,
    with_a_command_that_is_a_mapping,
]
OF_A_CLOUD: list[Break] = [
    with_a_head_type_that_is_not_listed,
    with_a_worker_type_that_says_no_machine,
    with_a_number_of_workers_in_words,
    with_a_fraction_of_a_gpu_on_a_node,
]
OF_MACHINES: list[Break] = [without_the_heads_address, with_node_types_of_a_cloud]
BROKEN = [
    pytest.param(path, break_it, id=f"{NAMES[path]}-{break_it.__name__}")
    for path in FILES
    for break_it in [*OF_ANY, *(OF_A_CLOUD if path in CLOUD_FILES else OF_MACHINES)]
]


@pytest.mark.parametrize(("path", "break_it"), BROKEN)
def test_ray_refuses_broken_variants(path: Path, break_it: Break) -> None:
    cluster = load(path)
    break_it(cluster)
    with pytest.raises((ValueError, ValidationError, ClickException)):
        validate(cluster)


# ---- what a file promises ---------------------------------------------------------------------------------------


@every_file
def test_the_environment_is_the_lock_with_hashes(path: Path) -> None:
    cluster = load(path)
    assert cluster["file_mounts"]["~/ccdist/requirements.lock"] == "./requirements.lock"
    (sync,) = [command for command in commands(cluster) if "pip sync" in command]
    assert sync.endswith("--python .venv/bin/python --require-hashes requirements.lock")
    installs = [command for command in commands(cluster) if "pip install" in command]
    # uv itself; the project without anything else; packages of the cloud, hashed.
    allowed = ("uv==", "--no-deps --no-build-isolation --editable .", "--require-hashes --requirement ")
    assert [command for command in installs if not any(form in command for form in allowed)] == []


@every_file
def test_uv_has_the_makefile_version(path: Path) -> None:
    (version,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [v for command in commands(load(path)) for v in re.findall(r"uv==(\S+)", command)] == [version]


def locked(path: Path) -> dict[str, str]:
    """The versions in a lock, by name, each of which must have a hash."""
    entries = re.split(r"^(?=[a-z0-9])", path.read_text(), flags=re.MULTILINE)[1:]
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    return dict(entry.split()[0].split("==") for entry in entries)


def test_the_lock_holds_the_dashboard_and_the_clients_of_object_storage() -> None:
    versions = locked(ROOT / "requirements.lock")
    needed = [text for text in requires("ray") or [] if re.search(r"extra == .default.$", text)]
    names = {re.split(r"[^A-Za-z0-9._-]", text)[0].lower().replace("_", "-") for text in needed}
    assert "aiohttp" in names
    assert names - set(versions) == set()
    assert {"boto3", "pyarrow", "psycopg-binary"} <= set(versions)


@pytest.mark.parametrize("cloud", ["gcp", "azure"])
def test_the_packages_of_a_cloud_fit_the_lock(cloud: str) -> None:
    versions = locked(ROOT / "requirements.lock")
    packages = locked(ROOT / "docs" / "clusters" / f"{cloud}.lock")
    assert {name: version for name, version in packages.items() if versions.get(name, version) != version} == {}
    cluster = load(ROOT / "docs" / "clusters" / f"{cloud}.yaml")
    assert cluster["file_mounts"][f"~/ccdist/{cloud}.lock"] == f"./docs/clusters/{cloud}.lock"
    (install,) = [command for command in cluster["head_setup_commands"] if "pip install" in command]
    assert install.endswith(f"--require-hashes --requirement {cloud}.lock")


@every_file
def test_everything_mounted_exists_and_every_package_is_mounted(path: Path) -> None:
    mounts = load(path)["file_mounts"]
    local = {source for source in mounts.values() if source.startswith("./")}
    assert [source for source in local if not (ROOT / source).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    named = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    assert {f"./{name}" for name in [*packages, *named]} <= local
    assert {f"~/ccdist/{source[2:]}" for source in local if "docs" not in source} <= set(mounts)


@every_file
def test_every_ray_command_says_that_tokens_are_used(path: Path) -> None:
    cluster = load(path)
    assert len(ray_commands(cluster)) == 4
    assert [c for c in ray_commands(cluster) if not re.search(r"RAY_AUTH_MODE=token ray (start|stop)\b", c)] == []
    assert "'export RAY_AUTH_MODE=token'" in "\n".join(cluster["setup_commands"])
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@every_file
def test_nothing_listens_on_every_address(path: Path) -> None:
    text = "\n".join(commands(load(path)))
    assert not re.search(r"0\.0\.0\.0|::[ '\"]|--host=?\s*\*", text)
    hosts = re.findall(r"--([a-z-]*host)[= ](\S+)", text)
    assert ("dashboard-host", LOOPBACK) in hosts
    assert [host for name, host in hosts if name == "host"] != []  # MLflow's
    assert [host for _, host in hosts if host not in (LOOPBACK, *PRIVATE)] == []


@every_cloud_file
def test_no_node_has_a_public_address(path: Path) -> None:
    cluster = load(path)
    assert cluster["provider"]["use_internal_ips"] is True
    assert cluster["provider"].get("use_external_head_ip", False) is False
    for node_type in node_types(cluster).values():
        node = node_type["node_config"]
        if kind(cluster) == "aws":
            assert node["SubnetIds"]
            assert node["SecurityGroupIds"]
            assert "NetworkInterfaces" not in node  # may ask for one
            assert node["MetadataOptions"] == {"HttpTokens": "required"}
        if kind(cluster) == "gcp":
            # Ray gives all nodes of a type without any interface a public address.
            assert [set(interface) for interface in node["networkInterfaces"]] == [{"subnetwork"}]


@every_cloud_file
def test_gpu_workers_come_on_demand_and_as_spot_nodes_from_none_to_32(path: Path) -> None:
    cluster = load(path)
    workers = worker_types(cluster)
    assert set(workers) == {"gpu_worker", "gpu_spot"}
    on_demand, spot = workers["gpu_worker"], workers["gpu_spot"]
    assert (on_demand["min_workers"], spot["min_workers"]) == (0, 0)
    assert spot["max_workers"] == cluster["max_workers"] == 32
    assert 0 < on_demand["max_workers"] < 32
    assert spot["resources"] == on_demand["resources"]
    assert spot["priority"] > on_demand.get("priority", 0)
    assert spot_only(kind(cluster), spot["node_config"], on_demand["node_config"])
    head = node_types(cluster)[cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}


def launched(cluster: Cluster, refused_lately: str = "") -> Counter[str]:
    """What Ray's autoscaler would start for 128 trials of a quarter of a GPU, 2 cores each."""
    of_the_instance_type = {"CPU": 8, "GPU": 1}  # where Ray looks it up
    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=value.get("min_workers", 0),
            max_worker_nodes=value.get("max_workers", 0) + (name == cluster["head_node_type"]),
            resources=value["resources"] or of_the_instance_type,
            priority=value.get("priority", 0),
        )
        for name, value in node_types(cluster).items()
    }
    request = SchedulingRequest(
        node_type_configs=types,
        max_num_nodes=cluster["max_workers"] + 1,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 2, "GPU": 0.25})] * 128),
        recoverable_resource_availabilities={refused_lately: 0.0},
        disable_launch_config_check=True,
    )
    return Counter(
        {started.instance_type: started.count for started in ResourceDemandScheduler().schedule(request).to_launch}
    )


@every_cloud_file
def test_rays_autoscaler_takes_spot_nodes_first_and_others_where_there_are_none(path: Path) -> None:
    cluster = load(path)
    assert launched(cluster) == {"gpu_spot": 32}
    most = worker_types(cluster)["gpu_worker"]["max_workers"]
    assert launched(cluster, refused_lately="gpu_spot") == {"gpu_worker": most, "gpu_spot": 32 - most}


def spot_only(cloud: str, spot: Any, on_demand: Any) -> bool:
    """Whether the one node is a spot node, the other is not, and they are equal otherwise."""
    spot, on_demand = copy.deepcopy(spot), copy.deepcopy(on_demand)
    if cloud == "aws":
        return bool(spot.pop("InstanceMarketOptions") == {"MarketType": "spot"} and spot == on_demand)
    if cloud == "gcp":
        same = {"onHostMaintenance": "TERMINATE", "automaticRestart": False}
        taken_away = {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        return bool(
            spot.pop("scheduling") == same | taken_away and on_demand.pop("scheduling") == same and spot == on_demand
        )
    spot, on_demand = spot["azure_arm_parameters"], on_demand["azure_arm_parameters"]
    return bool((spot.pop("priority"), spot.pop("billingProfile")) == ("Spot", {"maxPrice": -1}) and spot == on_demand)


@every_cloud_file
def test_what_a_teardown_leaves(path: Path) -> None:
    cluster = load(path)
    assert cluster["provider"]["cache_stopped_nodes"] is False  # said: the default differs from cloud to cloud
    for node_type in node_types(cluster).values():
        node = node_type["node_config"]
        if kind(cluster) == "aws":
            assert [mapping["Ebs"]["DeleteOnTermination"] for mapping in node["BlockDeviceMappings"]] == [True]
        if kind(cluster) == "gcp":
            assert [disk["autoDelete"] for disk in node["disks"]] == [True]
        if kind(cluster) == "azure":
            assert node["azure_arm_parameters"].get("evictionPolicy", "Delete") == "Delete"


@every_file
def test_the_header_says_how_to_begin_and_how_to_end(path: Path) -> None:
    text = header(path)
    for command in ("ray get-auth-token --generate", f"ray up {NAMES[path]}", f"ray down {NAMES[path]}"):
        assert command in text, command
    if path in CLOUD_FILES:
        assert f"ray rsync-down {NAMES[path]} '~/runs/'" in text  # before the head's disk goes
        assert re.search(r"(stays|costing)", text)
        assert "~/runs/mlflow" in "\n".join(cluster_start(path))  # which that copies


def cluster_start(path: Path) -> list[str]:
    started: list[str] = load(path)["head_start_ray_commands"]
    return started


@every_file
def test_no_host_outside_the_cluster_is_named(path: Path) -> None:
    text = path.read_text()
    # The names of a right, of an account and of a container.
    for name in ("https://www.googleapis.com/auth/cloud-platform", ".iam.gserviceaccount.com", ".dfs.core.windows.net"):
        text = text.replace(name, "")
    hosts = set(re.findall(r"https?://(\$?[\w.-]+)", text))
    assert hosts <= {LOOPBACK, "$CCDIST_HEAD", "$head"}
    assert re.findall(r"index-url|find-links|pypi|\.(?:com|org|io|dev|net)\b", text) == []


@every_file
def test_every_command_is_shell(path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = "\n".join(f"check() {{\n{command}\n}}" for command in commands(load(path)))
    parsed = subprocess.run([bash, "-n"], input=script, text=True, capture_output=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")


# ---- every line explained ---------------------------------------------------------------------------------------


def unexplained(text: str) -> list[str]:
    """The lines that neither carry a comment nor have one directly above.

    A text over several lines counts as its first line.
    """
    lines = text.splitlines()
    ends: dict[int, int] = {}  # where the last token of a line ends
    inside: set[int] = set()  # lines that go on with a text
    for token in yaml.scan(text):
        start, end = token.start_mark, token.end_mark
        if isinstance(token, yaml.ScalarToken) and end.line > start.line:
            inside |= set(range(start.line + 1, end.line + (1 if end.column else 0)))
            ends[start.line] = len(lines[start.line])  # a comment has no place behind `>-`
        elif end.line == start.line:
            ends[end.line] = max(ends.get(end.line, 0), end.column)
    return [
        line
        for number, line in enumerate(lines)
        if number in ends
        and number not in inside
        and not line[ends[number] :].lstrip().startswith("# ")
        and not lines[number - 1].lstrip().startswith("# ")
    ]


def test_what_counts_as_explained() -> None:
    values = "# why\na: 1\nb: '#  2'\nc: 3  # because\n"
    texts = "d:  # a list\n  # its text\n  - >-\n    x\n    y\n  - e # f\n  - g#h\n\n  - i\n"
    assert unexplained(values + texts) == ["b: '#  2'", "  - g#h", "  - i"]


@every_file
def test_every_line_is_explained(path: Path) -> None:
    assert unexplained(path.read_text()) == []


@every_file
def test_what_must_be_filled_in_is_marked(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.search(r"FILLIN", line) and not line.lstrip().startswith("#"):
            above = number
            while lines[above - 1].lstrip().startswith("#"):
                above -= 1
            assert "FILL IN" in "\n".join(lines[above : number + 1]), line
