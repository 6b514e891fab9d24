"""What ``deploy`` makes of its arguments: Serve's applications, engines, prompts, what is shown while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from rayswift.arguments import Arguments

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
ASKED = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three new"},
]


class Seen(Exception):
    """All that there is to see is seen."""


def prompts(encoder: Any) -> Any:
    """How a model is asked: token ids of a question, with tools, of an answer to go on with; what ends an answer."""
    asks = [encoder.encode_prompt(ASKED), encoder.encode_prompt(ASKED[:1], TOOLS), encoder.encode_prompt(ASKED[:2])]
    return [*asks, encoder.eos_token_ids]


def application(app: dict[str, Any]) -> Any:
    """An application of the configuration as Serve builds it; of a model's the engine, as its replicas make it."""
    from rayswift.generate.model_spec import ModelSpec
    from rayswift.serve import application

    build, made = app["import_path"].rpartition(":")[2], []

    def deployment(cls: Any, **options: Any) -> Any:  # as Ray's, which takes its time to make one
        return mock.Mock(bind=lambda *_, **bound: made.append([cls.__name__, options, bound]))

    with mock.patch("ray.serve.deployment", deployment):
        getattr(application, build)(app["args"])
    seen = [app["name"], app["route_prefix"], made]
    if build != "build_model":
        return seen
    spec = ModelSpec(**app["args"])
    lora = [spec.adapters, spec.default_adapter, spec.adapter_root, spec.max_adapters, spec.max_lora_rank]
    return [*seen, spec.name, spec.local, spec.revision, spec.use_hf, lora if spec.takes_adapters else [], engine(spec)]


def engine(spec: Any) -> Any:
    """The engine of a replica."""
    from rayswift.serve.replica import transformers

    if spec.engine == "vllm":
        return spec.llm_config(spec.model)
    if spec.task_type != "causal_lm":
        return spec.task_type
    seen: list[Any] = []

    def load(encoder: Any, **how: Any) -> None:
        seen.append([encoder.max_length, encoder.trust_remote_code, how])

    def serve(_: Any, *about: Any, defaults: Any) -> None:
        seen.append(defaults)

    with (
        mock.patch.object(transformers.TransformersEngine, "load", load),
        mock.patch.object(transformers, "BatchRunner"), mock.patch.object(transformers, "make_app"),
        mock.patch.object(transformers, "seed_everything", seen.append),
        mock.patch.object(transformers.TransformersServing, "__init__", serve),
    ):  # fmt: skip
        transformers.TransformersServing.from_plan(spec, spec.encoders(spec.model))
    return seen


@contextlib.contextmanager
def serve_here(seen: dict[str, Any]) -> Iterator[None]:
    """Deployments are planned and not started: Serve's applications, what is kept secret, how they end."""
    from rayswift.serve import deploy
    from rayswift.serve.application import serve_config

    gateways = mock.MagicMock()
    gateways.names = gateways.others = []

    def made(settings: Any, specs: Any) -> Any:
        for listen in (True, False):
            config = serve_config(specs, settings, listen=listen)
            seen[f"listen {listen}"] = [config["proxy_location"], config["http_options"],
                                        [application(app) for app in config["applications"]]]  # fmt: skip
        return gateways

    def keep_secret(name: str, value: Any) -> None:
        seen.setdefault("secrets", {}).setdefault(name, value)

    with (
        mock.patch.multiple(
            deploy, Gateways=made, check_room=lambda *_: None, require_free_port=lambda *_: None,
            wait_until_ready=lambda *_: None, stop_applications=lambda _, seconds: seen.update(drain=seconds),
        ),
        mock.patch("ray.serve.start"), mock.patch("ray.serve.get_deployment_handle"),
        mock.patch("rayswift.private.keep_secret", keep_secret),
    ):  # fmt: skip
        yield


def plan(args: Arguments) -> Any:
    """Everything of a deployment but how prompts are laid out (see :func:`asked`)."""
    from rayswift.cluster import address_of
    from rayswift.serve import deploy

    seen: dict[str, Any] = {"address": address_of(args)}

    def status_line(*about: Any) -> Any:
        seen["status"] = about[2]
        raise Seen

    with (
        contextlib.redirect_stdout(None), serve_here(seen),
        mock.patch("rayswift.serve.status_line.StatusLine", status_line), contextlib.suppress(Seen),
    ):  # fmt: skip
        deploy.deploy(args)  # type: ignore[arg-type]
    return seen


def asked(args: Arguments) -> Any:
    """The prompts of each model."""
    from rayswift.generate.model_spec import model_specs

    return [prompts(spec.encoders(spec.model)[""]) for spec in model_specs(args)]  # type: ignore[arg-type]


@contextlib.contextmanager
def machine(gpus: int) -> Iterator[None]:
    """Plan for a machine with so many GPUs."""
    from rayswift.cluster import Cluster

    cluster = Cluster(embedded=True, cpus=64, gpus=gpus, nodes=1, gpus_per_node=gpus)
    with (
        mock.patch.multiple(
            "rayswift.generate.preflight", has_nvidia_driver=lambda: gpus > 0, _is_gpu_vllm=lambda: False,
            check_memory=lambda *_: None, connect=lambda _: cluster,
        ),
        mock.patch("rayswift.cluster.connect", return_value=cluster), mock.patch("signal.signal"),
    ):  # fmt: skip
        yield
