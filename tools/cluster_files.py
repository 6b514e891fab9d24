"""Write the cluster files that are variants of another one: ``python tools/cluster_files.py``; ``--check`` only looks.

From ``cluster/autoscaler.yaml`` (AWS) those for Google Cloud and Azure; from one description of a Kubernetes cluster
the RayCluster, RayJob and RayService. A test holds that they are what this script writes.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
RAY = "2.60.0"

# --- clouds -------------------------------------------------------------------------------------------------------

_GCP_DISK = """disks:
  - boot: true
    autoDelete: true
    type: PERSISTENT
    initializeParams:
      diskSizeGb: {size}
      # CHANGE: an Ubuntu 22.04 image with a recent NVIDIA driver.
      sourceImage: projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570
"""
_GCP_GPU = (
    "machineType: a2-highgpu-8g\n"
    + _GCP_DISK.format(size=500)
    + (
        'metadata: {items: [{key: install-nvidia-driver, value: "True"}]}\n'
        "scheduling:\n  - onHostMaintenance: TERMINATE{spot}\n"
        "# CHANGE for --storage_path gs://...: an account that may read and write the bucket.\n"
        "# serviceAccounts: [{email: rayswift@PROJECT.iam.gserviceaccount.com, scopes: [https://www.googleapis.com/auth/"
        "cloud-platform]}]\n"
    )
)
_AZURE = """azure_arm_parameters:
  vmSize: {size}
  # CHANGE: an Ubuntu 22.04 image with a recent NVIDIA driver.
  imagePublisher: microsoft-dsvm
  imageOffer: ubuntu-hpc
  imageSku: 2204
  imageVersion: latest
"""
CLOUDS: dict[str, dict[str, Any]] = {
    "gcp": {
        "name": "Google Cloud",
        "package": "google-api-python-client google-auth",
        "bucket": "gs://BUCKET/runs",
        "provider": (
            "provider:\n  type: gcp\n  region: us-central1              # CHANGE\n"
            "  availability_zone: us-central1-a  # CHANGE: where you have a quota for A100s\n"
            "  project_id: CHANGE-ME\n"
            "  cache_stopped_nodes: false        # idle nodes are deleted, not kept as paid disks\n"
        ),
        "nodes": {
            "head": "machineType: n2-standard-8\n" + _GCP_DISK.format(size=200),
            "gpu-8xa100": _GCP_GPU.replace("{spot}", ""),
            "gpu-8xa100-spot": _GCP_GPU.replace("{spot}", "\n    preemptible: true"),
            "cpu-data": "machineType: n2-standard-32\n" + _GCP_DISK.format(size=200),
        },
        "nccl": "export NCCL_DEBUG=WARN NCCL_SOCKET_IFNAME=^lo,docker;",
        "device": "",
    },
    "azure": {
        "name": "Azure",
        "package": "azure-identity azure-mgmt-compute azure-mgmt-network azure-mgmt-resource msrestazure",
        "bucket": "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/runs",
        "provider": (
            "provider:\n  type: azure\n  location: westus2          # CHANGE\n"
            "  resource_group: rayswift   # CHANGE\n"
            "  cache_stopped_nodes: false # idle nodes are deleted, not kept as paid disks\n"
        ),
        "nodes": {
            "head": _AZURE.format(size="Standard_D8s_v5"),
            "gpu-8xa100": _AZURE.format(size="Standard_ND96asr_v4"),
            "gpu-8xa100-spot": _AZURE.format(size="Standard_ND96asr_v4") + "  priority: Spot\n",
            "cpu-data": _AZURE.format(size="Standard_D32s_v5"),
        },
        "nccl": "export NCCL_DEBUG=WARN NCCL_SOCKET_IFNAME=^lo,docker NCCL_IB_PCI_RELAXED_ORDERING=1;",
        "device": ', "--device=/dev/infiniband"',
    },
}


def autoscaler(cloud: str) -> str:
    """``cluster/autoscaler.yaml`` in the words of another cloud."""
    words, text = CLOUDS[cloud], (CLUSTER / "autoscaler.yaml").read_text(encoding="utf-8")
    text = re.sub(r"install --python \.venv/bin/python boto3   # Ray's AWS provider needs it",
                  f"install --python .venv/bin/python {words['package']}", text)  # fmt: skip
    text = text.replace("cluster/autoscaler.yaml", f"cluster/autoscaler-{cloud}.yaml").replace(
        "s3://BUCKET/runs", words["bucket"]
    )
    text = re.sub(r"# Another cloud: .*?(?=provider:)", "", text, flags=re.DOTALL)
    text = _replace_block(text, r"provider:", words["provider"])
    for node, config in words["nodes"].items():
        start = text.index(f"\n  {node}:\n")
        body = "    node_config:\n" + "".join(f"      {line}\n" for line in config.splitlines())
        text = text[:start] + _replace_block(text[start:], r"    node_config:.*", body)
    text = re.sub(r'"\$HOME/venv/bin/python" boto3 ', f'"$HOME/venv/bin/python" {words["package"]} ', text)
    text = re.sub(r"export NCCL_DEBUG=.*?;", words["nccl"], text)
    text = text.replace(', "--device=/dev/infiniband"', words["device"]).replace(
        "EFS, FSx, Filestore or Azure Files", "NFS"
    )
    head, _, rest = text.partition("\n")
    return f"{head}\n# On {words['name']}; written by tools/cluster_files.py from autoscaler.yaml.\n{rest}"


def _replace_block(text: str, first: str, block: str) -> str:
    """Replace the first line that matches, and all deeper ones after it (comments too), by ``block``."""
    found = re.search(rf"^{first}$", text, re.MULTILINE)
    assert found, first
    indent = len(found[0]) - len(found[0].lstrip())
    end = found.end() + 1
    for line in text[end:].splitlines(keepends=True):
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        if not line.strip():
            break
        end += len(line)
    return text[: found.start()] + block + text[end:]


# --- Kubernetes ---------------------------------------------------------------------------------------------------

IMAGE = "REGISTRY/rayswift:cuda"  # cluster/Dockerfile
_SHARED = {"name": "shared", "mountPath": "/mnt/shared"}
_HEADS = {
    "raycluster": """A cluster for many jobs. `rayswift submit --address http://127.0.0.1:8265 pt …` after
#   kubectl port-forward svc/rayswift-head-svc 8265:8265
#   export RAY_AUTH_TOKEN=$(kubectl get secret rayswift -o jsonpath='{.data.auth_token}' | base64 -d)""",
    "rayjob": """One training job with a cluster of its own. When the cluster is lost (its head too) the operator
# starts another one, up to backoffLimit times, and the same command line goes on from its last checkpoint.""",
    "rayservice": """A deployment that is upgraded without a refused request: on a change of the cluster's part KubeRay
# starts a second cluster and turns the traffic over; on one of serveConfigV2 alone Serve replaces replicas in turn.
# `rayswift deploy … --dry_run true` prints serveConfigV2 for other models; with keys give it --api_key.""",
}  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def kuberay(kind: str) -> str:
    """The manifest of a RayCluster, RayJob or RayService."""
    text = yaml.dump(_MANIFESTS[kind](), Dumper=_Dumper, sort_keys=False, width=110)
    return (
        f"# {_HEADS[kind]}\n#\n"
        "# Written by tools/cluster_files.py. CHANGE: the image, the claim `shared` (a ReadWriteMany volume: EFS,\n"
        "# Filestore, Azure Files, or NAS and CPFS of Alibaba Cloud's ACK), the sizes of nodes. Needs KubeRay 1.7\n"
        "# with the feature gates GCSFaultToleranceEmbeddedStorage and RayJobDeletionPolicy. The label queue-name is\n"
        "# Kueue's; a cluster without Kueue does not look at it.\n" + text
    )


def _pod(cpus: int, memory: str, shm: str, gpus: int = 0) -> dict[str, Any]:
    size: dict[str, Any] = {"cpu": cpus, "memory": memory} | ({"nvidia.com/gpu": gpus} if gpus else {})
    container = {
        "name": "ray", "image": IMAGE,
        "env": [
            {"name": "NCCL_DEBUG", "value": "WARN"},
            {"name": "HF_HOME", "value": "/mnt/shared/hub"}, {"name": "MODELSCOPE_CACHE", "value": "/mnt/shared/hub"},
        ],
        "resources": {"limits": size, "requests": copy.deepcopy(size)},
        "volumeMounts": [dict(_SHARED), {"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
    ]
    return {"spec": {"containers": [container], "volumes": volumes}}


def _ray(*, gpu_nodes: int, data_nodes: int, fault_tolerant: bool) -> dict[str, Any]:
    """The Ray cluster that all three manifests have."""
    spec: dict[str, Any] = {
        "rayVersion": RAY,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 600},
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(8, "32Gi", "8Gi"),
        },
        "workerGroupSpecs": [
            {
                "groupName": "train", "replicas": 0, "minReplicas": 0, "maxReplicas": gpu_nodes,
                "rayStartParams": {},
                "template": _pod(96, "1000Gi", "220Gi", 8),
            },
        ],
    }  # fmt: skip
    if data_nodes:
        spec["workerGroupSpecs"].append({
            "groupName": "data", "replicas": 0, "minReplicas": 0, "maxReplicas": data_nodes,
            "labels": {"ray-subcluster": "data"}, "rayStartParams": {}, "template": _pod(32, "128Gi", "60Gi"),
        })  # fmt: skip
    if fault_tolerant:
        # No Redis: RocksDB on a volume of the head. What lives through a lost head is Serve, not a training driver.
        spec["gcsFaultToleranceOptions"] = {"backend": "rocksdb", "storage": {"size": "10Gi"}}
    return spec


def _manifest(kind: str, spec: dict[str, Any], name: str = "rayswift") -> dict[str, Any]:
    labels = {"kueue.x-k8s.io/queue-name": "rayswift"}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": spec}


def _cluster() -> dict[str, Any]:
    return _manifest("RayCluster", _ray(gpu_nodes=4, data_nodes=8, fault_tolerant=True))


def _job() -> dict[str, Any]:
    command = (
        "rayswift pt --model Qwen/Qwen2.5-7B --dataset swift/chinese-c4 --streaming true --train_type full "
        "--deepspeed zero2 --num_workers 8,32 --max_steps 10000 --save_steps 500 --save_total_limit 3 "
        "--storage_path /mnt/shared/runs --max_failures 10 --resume_from_checkpoint auto"
    )
    return _manifest("RayJob", {
        "entrypoint": command,
        "submissionMode": "K8sJobMode",
        "backoffLimit": 3,
        "deletionStrategy": {"deletionRules": [
            {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}},
            {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}},
            {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 86400}},
        ]},
        "rayClusterSpec": _ray(gpu_nodes=4, data_nodes=8, fault_tolerant=False),
    }, "rayswift-pt")  # fmt: skip


def _service() -> dict[str, Any]:
    return _manifest("RayService", {
        "serveConfigV2": yaml.safe_dump(_serve_config(), sort_keys=False),
        # Zero downtime; NewClusterWithIncrementalUpgrade needs a Gateway API class and takes the traffic over in steps.
        "upgradeStrategy": {"type": "NewCluster"},
        "excludeHeadPodFromServeSvc": True,
        "rayClusterDeletionDelaySeconds": 600,
        "rayClusterConfig": _ray(gpu_nodes=4, data_nodes=0, fault_tolerant=True),
    }, "rayswift-qwen")  # fmt: skip


def _serve_config() -> dict[str, Any]:
    """Qwen2.5-7B-Instruct as `rayswift deploy` would serve it; a gateway behind Serve's proxy on every node."""
    from rayswift.arguments import make_arguments
    from rayswift.generate.engine_settings import engine_kwargs, environment
    from rayswift.generate.model_spec import ModelSpec
    from rayswift.serve.application import serve_config

    model = "/mnt/shared/models/Qwen2.5-7B-Instruct"
    args = make_arguments(
        "deploy", model=model, infer_backend="vllm", served_model_name="qwen", host="0.0.0.0", use_gpu=True,
        max_replicas=32, vllm_max_model_len=32768, vllm_enable_prefix_caching=True,
    )  # fmt: skip
    with mock.patch.dict(os.environ, clear=True):  # not what is set where this script runs
        env_vars = environment(args, True, 32)
    spec = ModelSpec(
        name="qwen", model=model, engine="vllm", use_gpu=True, max_model_len=32768,
        engine_kwargs=engine_kwargs(args, use_gpu=True), max_replicas=32, max_queued_requests=2048,
        bundles=[{"GPU": 1.0, "CPU": 2.0}], env_vars=env_vars, local=False,
    )  # fmt: skip
    return serve_config([spec], args, listen=False)


_MANIFESTS = {"raycluster": _cluster, "rayjob": _job, "rayservice": _service}


def files() -> dict[Path, str]:
    """Every file that this script writes, with its text."""
    clouds = {CLUSTER / f"autoscaler-{cloud}.yaml": autoscaler(cloud) for cloud in CLOUDS}
    return clouds | {CLUSTER / "kuberay" / f"{kind}.yaml": kuberay(kind) for kind in _MANIFESTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a file is not what it should be")
    only_check, drifted = parser.parse_args().check, []
    for path, text in files().items():
        if only_check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            drifted.append(str(path))
        elif not only_check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if drifted:
        print(f"run python tools/cluster_files.py: {', '.join(drifted)}", file=sys.stderr)
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
