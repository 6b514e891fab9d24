"""cluster/autoscaler.yaml as Ray reads it: its validation, its autoscaler, its `ray start` options."""

from __future__ import annotations

import copy
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "cluster" / "autoscaler.yaml"
WORKER = {"CPU": 1.0, "GPU": 1.0}  # what RaySwift asks per GPU worker


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


@pytest.fixture
def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The file with Ray's defaults filled in, as `ray up` goes on with it."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(config))


def start_commands(config: dict[str, Any]) -> dict[str, list[str]]:
    return {"head": config["head_start_ray_commands"], "worker": config["worker_start_ray_commands"]}


# --- Ray's validation and its autoscaler -------------------------------------------------------------------------


def test_ray_accepts_the_file(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(head_node_typ="head"),
        lambda config: config.update(head_node_type="gpu"),
        lambda config: config["available_node_types"]["cpu-data"].pop("resources"),
        lambda config: config["available_node_types"]["cpu-data"]["labels"].update({"ray-subcluster": 1}),
    ],
    ids=["unknown key", "unknown head type", "no resources", "label that is no text"],
)
def test_ray_refuses_a_spoilt_file(prepared: dict[str, Any], spoil: Any) -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    spoil(prepared)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepared)


def nodes_for(config: dict[str, Any], bundles: list[dict[str, float]], *, gang: bool) -> tuple[Counter[str], int]:
    """Nodes per type that Ray's autoscaler would start for these demands, and how many demands it cannot meet."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    settings = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    requests = [ResourceRequestUtil.make(bundle) for bundle in bundles]
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=settings.get_node_type_configs(),
            max_num_nodes=settings.get_max_num_nodes(),
            resource_requests=[] if gang else ResourceRequestUtil.group_by_count(requests),
            gang_resource_requests=[GangResourceRequest(requests=requests)] if gang else [],
        )
    )
    launched = Counter({request.instance_type: request.count for request in reply.to_launch})
    return launched, len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)


@pytest.mark.parametrize(("num_workers", "nodes"), [(1, 1), (8, 1), (9, 2), (32, 4)])
def test_training_starts_as_few_a100_nodes_as_hold_its_workers(
    config: dict[str, Any], num_workers: int, nodes: int
) -> None:
    assert nodes_for(config, [WORKER] * num_workers, gang=True) == ({"gpu-8xa100": nodes}, 0)


def test_more_workers_than_the_cluster_may_grow_to_are_infeasible(config: dict[str, Any]) -> None:
    launched, infeasible = nodes_for(config, [WORKER] * 33, gang=True)
    assert infeasible == 1
    assert not launched


def test_preprocessing_starts_cpu_nodes_and_no_gpu_node(config: dict[str, Any]) -> None:
    assert nodes_for(config, [{"CPU": 1.0}] * 64, gang=False) == ({"cpu-data": 2}, 0)


def test_nothing_costs_money_while_no_job_runs(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert [name for name, node in types.items() if node["min_workers"]] == []
    assert config["idle_timeout_minutes"] <= 15
    assert types["head"]["resources"] == {"CPU": 0}  # no work on the head, and no GPU paid for there
    assert types["head"]["max_workers"] == 0


def test_preprocessing_nodes_carry_the_label_to_pin_ray_data(config: dict[str, Any]) -> None:
    labels = {name: node.get("labels") for name, node in config["available_node_types"].items()}
    assert labels["cpu-data"] == {"ray-subcluster": "data"}
    assert labels["gpu-8xa100"] != labels["cpu-data"]


# --- what a node runs --------------------------------------------------------------------------------------------


def run_start_commands(commands: list[str], home: Path) -> list[tuple[str, list[str]]]:
    """Run a node's start commands in a shell where `ray` only notes RAY_AUTH_MODE and its arguments."""
    ray = home / "venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    ray.write_text('#!/bin/bash\n{ echo "${RAY_AUTH_MODE-}"; printf "%s\\n" "$@"; echo --end; } >> "$HOME/calls"\n')
    ray.chmod(0o755)
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1"}
    for command in commands:
        subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True, timeout=30)
    calls = (home / "calls").read_text().split("--end\n")[:-1]
    return [(mode, words) for mode, *words in (call.rstrip("\n").split("\n") for call in calls)]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_starts_ray_with_token_authentication(prepared: dict[str, Any], role: str, tmp_path: Path) -> None:
    calls = run_start_commands(start_commands(prepared)[role], tmp_path)
    assert [words[0] for _, words in calls] == ["stop", "start"]
    assert calls[-1][0] == "token"


def ray_start_options(words: list[str]) -> dict[str, Any]:
    """What Ray's command line makes of ``ray start ...``; an unknown option raises."""
    from ray.scripts.scripts import start

    assert words[0] == "start"
    return start.make_context("ray start", words[1:]).params


def test_the_head_keeps_its_dashboard_to_itself_and_runs_the_autoscaler(
    prepared: dict[str, Any], tmp_path: Path
) -> None:
    options = ray_start_options(run_start_commands(start_commands(prepared)["head"], tmp_path)[-1][1])
    assert options["head"] is True
    assert options["dashboard_host"] == "127.0.0.1"
    assert options["num_cpus"] == 0
    # bash leaves the tilde of --option=~/file alone; Ray expands it
    assert options["autoscaling_config"].removeprefix(str(tmp_path)).lstrip("~") == "/ray_bootstrap_config.yaml"


def test_workers_join_the_head(prepared: dict[str, Any], tmp_path: Path) -> None:
    head = ray_start_options(run_start_commands(start_commands(prepared)["head"], tmp_path / "head")[-1][1])
    worker = ray_start_options(run_start_commands(start_commands(prepared)["worker"], tmp_path / "worker")[-1][1])
    assert worker["head"] is False
    assert worker["address"] == f"10.0.0.1:{head['port']}"


def test_nothing_listens_on_every_address(prepared: dict[str, Any]) -> None:
    commands = [command for listed in start_commands(prepared).values() for command in listed]
    assert not [command for command in commands if "0.0.0.0" in command or "::" in command]


def test_the_token_reaches_every_node_from_where_ray_keeps_it(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    # The token itself, or a path to another one, is nowhere in the file.
    assert not re.search(r"RAY_AUTH_TOKEN(_PATH)?=", FILE.read_text(encoding="utf-8"))


def test_the_installation_finds_every_file_it_needs_on_the_node(config: dict[str, Any]) -> None:
    mounts = {remote: local for remote, local in config["file_mounts"].items() if "auth_token" not in remote}
    assert [local for local in mounts.values() if not (REPOSITORY / local).exists()] == []
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = ["pyproject.toml", "rayswift", project["readme"], *project["license-files"]]
    assert [name for name in needed if f"~/rayswift/{name}" not in mounts] == []

    commands = "\n".join(config["setup_commands"])
    constraints = re.search(r'-c "\$HOME/rayswift/(\S+)"', commands)
    assert constraints is not None
    assert constraints[1] == "constraints/cuda.txt"
    assert (REPOSITORY / constraints[1]).is_file()
    assert '-e "$HOME/rayswift"' in commands


def test_setup_commands_are_valid_shell(prepared: dict[str, Any]) -> None:
    for command in [*prepared["head_setup_commands"], *prepared["worker_setup_commands"]]:
        subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True, timeout=30)


def test_all_node_types_use_one_image(config: dict[str, Any]) -> None:
    nodes = config["available_node_types"].values()
    assert len({node["node_config"]["ImageId"] for node in nodes}) == 1
