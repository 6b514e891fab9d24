"""The files of cluster/ that others read: KubeRay, SkyPilot, Slurm, Docker, clouds; and each command line in them."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayswift import __version__
from rayswift.arguments import parse_arguments
from rayswift.cli.doctor import doctor_parser
from rayswift.cli.main import COMMANDS, find_command

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
#: A folder with KubeRay's CRDs (ray-operator/config/crd/bases of its repository).
CRDS = os.environ.get("RAYSWIFT_KUBERAY_CRDS", "")


def manifest(kind: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "kuberay" / f"{kind}.yaml").read_text(encoding="utf-8"))


def ray_cluster(spec: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster's part of any of the three kinds."""
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def test_every_variant_is_what_its_source_says() -> None:
    spec = importlib.util.spec_from_file_location("cluster_files", REPOSITORY / "tools" / "cluster_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drifted = [path.name for path, text in module.files().items() if path.read_text(encoding="utf-8") != text]
    assert drifted == [], "run python tools/cluster_files.py"


# --- Kubernetes ---------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown keys, which a Kubernetes API server would drop without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if closed and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema = {**schema, "additionalProperties": False}
    return {key: strict(value) for key, value in schema.items() if key != "format"}


def errors(manifest: dict[str, Any]) -> list[str]:
    import jsonschema

    text = Path(CRDS, f"ray.io_{manifest['kind'].lower()}s.yaml").read_text(encoding="utf-8")
    [version] = [one for one in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {}
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]


@pytest.mark.skipif(not CRDS, reason="RAYSWIFT_KUBERAY_CRDS names no folder of KubeRay's CRDs")
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kuberay_accepts_the_manifest_and_no_spoilt_one(path: Path) -> None:
    good = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert errors(good) == []
    spoilt = copy.deepcopy(good)
    ray_cluster(spoilt["spec"])["workerGroupSpecs"][0]["maxReplica"] = 1
    assert any("maxReplica" in error for error in errors(spoilt))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_ray_cluster_asks_for_a_token_and_shares_a_folder(path: Path) -> None:
    cluster = ray_cluster(yaml.safe_load(path.read_text(encoding="utf-8"))["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert {"/mnt/shared", "/dev/shm"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert [group.get("labels") for group in groups[1:]] == [None, {"ray-subcluster": "data"}][: len(groups) - 1]


def test_a_lost_job_runs_again_and_a_lost_head_takes_no_deployment_with_it() -> None:
    job = manifest("rayjob")["spec"]
    assert job["backoffLimit"] >= 1
    assert "--resume_from_checkpoint auto" in job["entrypoint"]
    assert {rule["policy"] for rule in job["deletionStrategy"]["deletionRules"]} == {"DeleteCluster", "DeleteWorkers"}
    for kind in ("raycluster", "rayservice"):
        cluster = ray_cluster(manifest(kind)["spec"])
        assert cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
        assert manifest(kind)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_serve_accepts_the_service_with_a_gateway_on_every_node() -> None:
    from ray.serve.schema import ServeDeploySchema

    from rayswift.generate.model_spec import ModelSpec

    spec = manifest("rayservice")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    config = yaml.safe_load(spec["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    assert config["proxy_location"] == "EveryNode"
    model, state, door = config["applications"]
    assert ModelSpec(**model["args"]).use_gpu
    assert door["route_prefix"] == "/"
    assert door["args"]["models"][0]["app"] == model["name"]
    assert door["args"]["shared"] == state["name"]


# --- clouds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", ["gcp", "azure"])
def test_ray_accepts_the_file_of_another_cloud(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / f"autoscaler-{cloud}.yaml").read_text(encoding="utf-8"))
    aws = yaml.safe_load((CLUSTER / "autoscaler.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["provider"]["type"] == cloud
    key = {"gcp": "machineType", "azure": "azure_arm_parameters"}[cloud]
    for name, node in config["available_node_types"].items():
        assert key in node["node_config"]
        ours = aws["available_node_types"][name]
        assert {**node, "node_config": 0} == {**ours, "node_config": 0}
    same = ("auth", "file_mounts", "setup_commands", "head_start_ray_commands", "max_workers", "rsync_exclude")
    assert {name: config[name] for name in same} == {name: aws[name] for name in same}
    assert "boto3" not in (CLUSTER / f"autoscaler-{cloud}.yaml").read_text(encoding="utf-8")


def test_spot_nodes_are_there_to_be_switched_on() -> None:
    types = yaml.safe_load((CLUSTER / "autoscaler.yaml").read_text(encoding="utf-8"))["available_node_types"]
    spot, fixed = types["gpu-8xa100-spot"], types["gpu-8xa100"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert spot["node_config"].items() > fixed["node_config"].items()
    assert spot["max_workers"] == 0


# --- command lines ------------------------------------------------------------------------------------------------


def command_lines() -> list[Any]:
    """Each `rayswift …` in the files, with shell variables as Slurm and SkyPilot set them."""
    found = []
    for path in [*MANIFESTS, *CLUSTER.glob("*.yaml"), CLUSTER / "slurm.sh", CLUSTER / "Dockerfile"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        text = re.sub(r"\n {4}(?=--|\S+ --)", " ", text) if path in MANIFESTS else text
        for line in re.findall(r"(?:^|[\s`])(rayswift (?:submit|doctor|pt|sft|deploy)\b[^`\n]*)", text):
            line = re.sub(r"\"?\$[{]?\w*NODES?[}]?\"?", "2", line).replace("...", "x").replace("…", "--model x")
            line = re.sub(r" \|\| .*| >.*|\s\s+#.*", "", line)
            found.append(pytest.param(shlex.split(line)[1:], id=f"{path.name}: {line[:50]}"))
    return found


@pytest.mark.parametrize("words", command_lines())
def test_a_command_line_parses(words: list[str]) -> None:
    command, rest = find_command(words)
    if command == "submit" and rest:
        place = next(number for number, word in enumerate(rest) if word in COMMANDS)
        command, rest = rest[place], [*rest[place + 1 :], "--dataset", "d"]
    if not rest or command == "doctor":
        doctor_parser().parse_args(rest)
    else:
        parse_arguments(command, rest if "--dataset" in rest or command == "deploy" else [*rest, "--dataset", "d"])


def test_there_are_command_lines_in_the_files() -> None:
    files = {param.id.split(":")[0] for param in command_lines()}
    assert files >= {"rayjob.yaml", "rayservice.yaml", "skypilot.yaml", "autoscaler.yaml", "Dockerfile"}


def test_slurm_runs_one_line_on_every_node(tmp_path: Path) -> None:
    """In a shell where Slurm's and Ray's commands only note what they are told."""
    for name in ("srun", "scontrol"):
        tool = tmp_path / name
        tool.write_text(
            "#!/bin/bash\n" + ('printf "%s\\n" "$@"' if name == "srun" else "echo n1; sleep 0.1; echo n2") + "\n"
        )
        tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]",
                   "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "8"}  # fmt: skip
    for given in ([], ["sft", "--model", "m", "--dataset", "a b.jsonl"]):
        done = subprocess.run(
            ["bash", CLUSTER / "slurm.sh", *given], env=environment, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
        ray, command = words[: words.index("--")], words[words.index("--") + 1 :]
        assert ray[1:] == ["ray", "symmetric-run", "--address", "n1:20077", "--min-nodes", "2", "--num-cpus", "8"]
        assert command[0] == "rayswift"
        assert command[1 : 1 + len(given)] == given
        args = parse_arguments(command[1], command[2:])
        assert (args.address, args.resume_from_checkpoint) == ("n1:20077", "auto")


# --- Docker and SkyPilot ------------------------------------------------------------------------------------------


def test_the_image_follows_the_rules() -> None:
    """Those of hadolint that matter here: pinned tags, no package lists or caches in layers, no root, no bare `ADD`."""
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line and not line.startswith("#")]
    targets = [line.split(" AS ")[1] for line in lines if line.startswith("FROM ")]
    assert targets == ["base", "cpu", "cuda"]
    assert [line for line in lines if line.startswith("ADD ")] == []
    external = [line.split()[1] for line in lines if line.startswith("FROM ") and line.split()[1] not in targets]
    assert all(re.search(r":\d+\.\d+", image) for image in external)
    for line in lines:
        if "apt-get install" in line:
            assert "--no-install-recommends" in line
            assert line.endswith("rm -rf /var/lib/apt/lists/*")
        for package in re.findall(r"pip install --no-cache-dir (\S+)", line):
            assert re.fullmatch(r"[\w-]+==[\d.]+", package)
    stages = text.split("FROM ")[2:]
    assert all(stage.rindex("USER ray") < stage.rindex("CMD") for stage in stages)
    for stage, constraints in zip(stages, ("cpu", "cuda"), strict=True):
        assert f"-c constraints/{constraints}.txt" in stage
        assert (REPOSITORY / "constraints" / f"{constraints}.txt").is_file()
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((REPOSITORY / name).exists() for name in copied)


def test_skypilot_leaves_its_own_ray_alone() -> None:
    text = (CLUSTER / "skypilot.yaml").read_text(encoding="utf-8")
    task = yaml.safe_load(text)
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run", "envs", "secrets"}
    assert "~/sky_templates/ray/start_cluster" in task["run"]
    assert "ray stop" not in task["setup"] + task["run"]
    assert "RAY_ADDRESS=127.0.0.1:6379" in task["run"]
    subprocess.run(["bash", "-n", "-c", task["setup"] + task["run"]], check=True, timeout=30)


def test_the_files_are_of_the_ray_that_is_installed() -> None:
    import ray

    assert ray_cluster(manifest("rayjob")["spec"])["rayVersion"] == ray.__version__
    assert __version__
