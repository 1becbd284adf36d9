"""ray_cluster.yaml against Ray's own schema and against what the project promises of a cluster; no cloud."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError  # type: ignore[import-untyped]
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
CLUSTER_FILE = ROOT / "ray_cluster.yaml"
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER_FILE.read_text())
    return loaded


def commands(cluster: dict[str, Any]) -> list[str]:
    return [command for kind in COMMANDS for command in cluster[kind]]


def validate(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    before = copy.deepcopy(cluster)
    validate(cluster)  # raises where the file breaks Ray's schema
    assert cluster == before


def with_an_unknown_key(cluster: dict[str, Any]) -> None:
    cluster["setup_comands"] = cluster["setup_commands"]


def with_a_head_type_that_is_not_listed(cluster: dict[str, Any]) -> None:
    cluster["head_node_type"] = "heads"


def with_a_worker_type_that_says_no_instance(cluster: dict[str, Any]) -> None:
    del cluster["available_node_types"]["gpu_worker"]["node_config"]


def with_a_number_of_workers_in_words(cluster: dict[str, Any]) -> None:
    cluster["max_workers"] = "four"


@pytest.mark.parametrize(
    "break_it",
    [
        with_an_unknown_key,
        with_a_head_type_that_is_not_listed,
        with_a_worker_type_that_says_no_instance,
        with_a_number_of_workers_in_words,
    ],
)
def test_ray_refuses_broken_variants(cluster: dict[str, Any], break_it: Callable[[dict[str, Any]], None]) -> None:
    break_it(cluster)
    with pytest.raises((ValueError, ValidationError)):
        validate(cluster)


def test_gpu_workers_scale_from_none_to_four(cluster: dict[str, Any]) -> None:
    worker = cluster["available_node_types"]["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"], cluster["max_workers"]) == (0, 4, 4)


def test_the_environment_is_the_lock_with_hashes(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/ccdist/requirements.lock"] == "./requirements.lock"
    (sync,) = [command for command in commands(cluster) if "pip sync" in command]
    assert "--require-hashes requirements.lock" in sync
    assert ".venv" in sync


def test_uv_has_the_makefile_version(cluster: dict[str, Any]) -> None:
    (version,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [v for command in commands(cluster) for v in re.findall(r"uv==(\S+)", command)] == [version]


def test_everything_mounted_exists_and_every_package_is_mounted(cluster: dict[str, Any]) -> None:
    local = {source for source in cluster["file_mounts"].values() if source.startswith("./")}
    assert [source for source in local if not (ROOT / source).exists()] == []
    assert {"./ccdist", "./search", "./tracking", "./spaces", "./pyproject.toml"} <= local


def test_every_ray_command_says_that_tokens_are_used(cluster: dict[str, Any]) -> None:
    ray_commands = [command for command in commands(cluster) if re.search(r"\bray (start|stop)\b", command)]
    assert len(ray_commands) == 4
    assert [c for c in ray_commands if not re.search(r"RAY_AUTH_MODE=token ray (start|stop)\b", c)] == []
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_nothing_listens_on_a_public_address(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"]["SubnetIds"]
        assert node_type["node_config"]["SecurityGroupIds"]
    text = "\n".join(commands(cluster))
    assert "0.0.0.0" not in text
    assert "mlflow server --host $address" in text
    assert "--dashboard-host=127.0.0.1" in text


def test_no_host_outside_the_cluster_is_named(cluster: dict[str, Any]) -> None:
    text = CLUSTER_FILE.read_text()
    urls = re.findall(r"https?://(\$address|\$\(hostname -I|\S*)", text)
    assert set(urls) == {"$address", "$(hostname -I"}
    assert re.findall(r"index-url|find-links|pypi|\.(?:com|org|io|dev|net)\b", text) == []
