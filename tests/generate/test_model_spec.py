"""From ``rayswift deploy``'s flags to what Serve is given; mistakes end before Ray starts."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from in_process import rayswift

from rayswift.arguments import make_arguments
from rayswift.cluster import Cluster
from rayswift.errors import UserError
from rayswift.generate import preflight
from rayswift.generate.engine_settings import engine_kwargs
from rayswift.generate.model_spec import ModelSpec, model_spec, model_specs
from rayswift.modeling.resolved import resolve_model
from rayswift.serve.application import serve_config

EIGHT_BITS = {"group_0": {"weights": {"num_bits": 8}}}


def plans(model: str, **settings: object) -> list[ModelSpec]:
    return model_specs(make_arguments("deploy", model=model, infer_backend="vllm", use_gpu=False, **settings))


def test_a_plan_is_plain_data_that_gives_the_same_plan(smollm2_dir: str) -> None:
    (plan,) = plans(smollm2_dir, temperature=0.5, vllm_max_model_len=512, system="Be brief.", max_replicas=3)
    assert ModelSpec(**json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.name == "SmolLM2-135M-Instruct"
    assert plan.template == {"system": "Be brief."}
    assert plan.engine_kwargs["override_generation_config"] == {"temperature": 0.5}
    config = plan.llm_config(smollm2_dir)
    assert config["engine_kwargs"]["max_model_len"] == 512
    assert config["accelerator_config"] == {"kind": "cpu"}


def test_on_cpus_prompts_are_computed_whole_unless_asked_otherwise(smollm2_dir: str) -> None:
    (plan,) = plans(smollm2_dir)
    assert plan.engine_kwargs["enable_chunked_prefill"] is False
    (asked,) = plans(smollm2_dir, vllm_engine_kwargs={"enable_chunked_prefill": True})
    assert asked.engine_kwargs["enable_chunked_prefill"] is True
    args = make_arguments("deploy", model=smollm2_dir, infer_backend="vllm")
    assert "enable_chunked_prefill" not in engine_kwargs(args, use_gpu=True)


def test_the_checkpoint_says_model_template_and_system(checkpoint: str, smollm2_dir: str) -> None:
    (plan,) = model_specs(
        make_arguments("deploy", adapters=[f"poet={checkpoint}"], infer_backend="vllm", use_gpu=False)
    )
    assert plan.model == smollm2_dir
    assert plan.adapters == {"poet": checkpoint}
    assert plan.default_adapter is None
    own = plan.encoders(smollm2_dir)[""]
    assert plan.adapter_encoder(checkpoint, own).system == "Answer with one word."
    settings = {"infer_backend": "vllm", "use_gpu": False, "load_args": False}
    (bare,) = model_specs(make_arguments("deploy", model=smollm2_dir, adapters=[f"poet={checkpoint}"], **settings))
    assert bare.adapter_encoder(checkpoint, bare.encoders(smollm2_dir)[""]).system is None
    (unnamed,) = model_specs(make_arguments("deploy", adapters=[checkpoint], infer_backend="vllm", use_gpu=False))
    assert unnamed.default_adapter == "checkpoint-7"


def test_no_adapter_is_called_like_a_model(checkpoint: str, smollm2_dir: str) -> None:
    def made(**settings: object) -> list[ModelSpec]:
        return model_specs(make_arguments("deploy", infer_backend="vllm", use_gpu=False, **settings))

    with pytest.raises(UserError, match=r"--adapters poet=\.\.\.: a model is served as poet; choose another name"):
        made(adapters=[f"poet={checkpoint}"], served_model_name="poet")
    with pytest.raises(UserError, match="a model is served as large"):
        made(models={"large": {"model": smollm2_dir}, "small": {"adapters": [f"large={checkpoint}"]}})
    # One that answers for the model itself is found by the model's name.
    (plan,) = made(adapters=[checkpoint], served_model_name="checkpoint-7")
    assert (plan.name, plan.default_adapter) == ("checkpoint-7", "checkpoint-7-adapter")
    assert plan.adapters == {"checkpoint-7-adapter": checkpoint}


@pytest.mark.parametrize("command", ["deploy", "infer", "sample", "eval", "app"])
def test_a_cluster_without_gpus_is_asked_and_gets_replicas_on_cpus(
    command: str, smollm2_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Cluster(embedded=False, cpus=8, gpus=0, nodes=2)
    monkeypatch.setattr(preflight, "connect", lambda args: found)
    monkeypatch.setattr(preflight, "has_nvidia_driver", lambda: True)  # of the machine that submits
    monkeypatch.setattr(preflight, "_is_gpu_vllm", lambda: False)
    own = {"eval_dataset": ["arc"]} if command == "eval" else {"dataset": ["x.jsonl"]} if command == "sample" else {}
    settings = {"model": smollm2_dir, "address": "auto", **own}

    def spec(**flags: object) -> ModelSpec:
        return model_spec(resolve_model(make_arguments(command, **settings, **flags)))

    assert (spec().use_gpu, spec().bundles) == (False, [{"CPU": 1.0}])
    with pytest.raises(UserError, match=r"--use_gpu true: the cluster \(2 nodes\) has at most 8 CPUs and no GPU"):
        spec(use_gpu=True)
    found = replace(found, gpus=2)
    assert spec().bundles == [{"CPU": 2.0, "GPU": 1.0}]
    assert spec(use_gpu=False).bundles == [{"CPU": 1.0}]


def test_the_real_cluster_is_asked(smollm2_dir: str, ray_cluster: None) -> None:
    """Ray is there already: an address then means that one."""
    assert not model_spec(resolve_model(make_arguments("infer", model=smollm2_dir, address="auto"))).use_gpu


def test_several_models_share_flags_and_have_their_own(smollm2_dir: str) -> None:
    args = make_arguments(
        "deploy", infer_backend="vllm", use_gpu=False, vllm_max_model_len=512,
        models={"one": {"model": smollm2_dir}, "two": {"model": smollm2_dir, "vllm_max_model_len": 256}},
    )  # fmt: skip
    one, two = model_specs(args)
    assert (one.name, one.max_model_len, two.name, two.max_model_len) == ("one", 512, "two", 256)
    config = serve_config([one, two], args, listen=True)
    assert [app["name"] for app in config["applications"]] == ["rayswift-one", "rayswift-two", "rayswift"]
    assert config["applications"][-1]["args"]["listen"] == {"host": "127.0.0.1", "port": 8000}


def test_the_configuration_holds_no_key(smollm2_dir: str) -> None:
    args = make_arguments("deploy", model=smollm2_dir, infer_backend="vllm", use_gpu=False, api_key=["top-secret"])
    assert "top-secret" not in json.dumps(serve_config(model_specs(args), args, listen=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vllm_max_model_len": 100_000}, "--vllm_max_model_len 100000: the model has 8192 positions"),
        ({"max_length": 9000}, "--max_length 9000: the model has 8192 positions"),
        ({"vllm_tensor_parallel_size": 2}, "--vllm_tensor_parallel_size 2: spreads a model over GPUs"),
        ({"min_replicas": 4000}, "--model .*: 4000 replica\\(s\\) need .* GiB .* are free"),
        ({"adapter_root": "/no/such/folder"}, "--adapter_root /no/such/folder: no such folder"),
        ({"adapters": ["/no/such/folder"]}, "--adapters /no/such/folder"),
        ({"max_replicas": 1, "min_replicas": 2}, "--max_replicas 1 is below --min_replicas 2"),
        ({"models": {"a": 3}}, "--models: a is 3, expected the flags"),
        ({"models": {"a": {"model": "/no/such"}}}, "--models a: --model /no/such"),
    ],
)
def test_what_cannot_work_is_one_line(smollm2_dir: str, settings: dict, says: str) -> None:
    merged = {"model": smollm2_dir, "infer_backend": "vllm", "use_gpu": False, **settings}
    with pytest.raises(UserError, match=says):
        model_specs(make_arguments("deploy", **merged))


def test_a_limit_of_another_engine_limits_nothing(smollm2_dir: str) -> None:
    flags = {"model": smollm2_dir, "infer_backend": "transformers", "use_gpu": False, "max_length": 4096}
    (spec,) = model_specs(make_arguments("deploy", vllm_max_model_len=100_000, **flags))
    assert spec.max_model_len == 4096


@pytest.mark.parametrize(
    ("capability", "found", "says"),
    [
        ("AVX2", {"quant_method": "gptq", "bits": 4}, "vLLM needs AVX-512, which this CPU does not have, for gptq"),
        ("AVX2", {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "vLLM needs AVX-512"),
        ("AVX512", {"quant_method": "gptq", "bits": 8}, "vLLM needs a GPU, or 4 bits for gptq"),
        ("AVX512", {"quant_method": "gptq", "bits": 4, "sym": False}, "vLLM needs 4 or 8 bits and --quant_sym true"),
        (
            "AVX512",
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": EIGHT_BITS},
            "vLLM needs a GPU, or 4 bits for compressed-tensors weights \\(these have 8 bits\\)",
        ),
        ("AVX512", {"quant_method": "awq", "bits": 4}, None),
        ("AVX2", {"quant_method": "compressed-tensors", "format": "int-quantized"}, None),
    ],
)
def test_packed_weights_are_refused_where_vllm_cannot_multiply_them(
    tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, found: dict, says: str | None
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if says is None:
        assert plans(str(model))
        return
    with pytest.raises(UserError, match=f"{says}.*--infer_backend transformers"):
        plans(str(model))
    assert model_specs(make_arguments("deploy", model=str(model), infer_backend="transformers", use_gpu=False))


def test_dry_run_prints_what_serve_takes(smollm2_dir: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    words = ["deploy", "--model", smollm2_dir, "--infer_backend", "vllm", "--use_gpu", "false", "--dry_run", "true"]
    done = rayswift(*words)
    assert done.returncode == 0, done.stderr
    schema = ServeDeploySchema.model_validate(yaml.safe_load(done.stdout))
    assert [app.import_path for app in schema.applications] == [
        "rayswift.serve.application:build_model",
        "rayswift.serve.application:build_state",
        "rayswift.serve.application:build_gateway",
    ]
    assert "listen" not in schema.applications[-1].args


def test_a_taken_port_is_named_with_its_owner_and_a_free_one(smollm2_dir: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["deploy", "--model", smollm2_dir, "--infer_backend", "vllm", "--port", str(port)]
        done = rayswift(*words)
    assert done.returncode == 2
    assert f"--port {port}: already in use by python" in done.stderr
    assert "is free" in done.stderr
    assert "Traceback" not in done.stderr
