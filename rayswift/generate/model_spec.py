"""From the arguments of ``rayswift deploy`` to what is deployed: one `ModelSpec` per model, checked before Ray starts.

A spec is plain data: it travels in the Serve configuration (``--dry_run`` prints it) to the replicas. The commands that
start engines themselves (`infer`, `sample`) are given what ``deploy`` would start for the same flags.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import hub
from rayswift.arguments import DeployArguments, make_arguments, read_saved_arguments, take_over
from rayswift.arguments.fields import specs_of
from rayswift.cluster import Cluster, address_of
from rayswift.errors import UserError
from rayswift.generate.engine_settings import bundles, engine_kwargs, environment, sampling_defaults
from rayswift.generate.preflight import check_engine, check_model, context_limit, wants_gpu
from rayswift.modeling.adapter_folder import check_adapter, lora_rank, read_adapter_config
from rayswift.modeling.adapter_kinds import only_merged
from rayswift.modeling.loading import folder_fingerprint, read_config, resolve_dtype
from rayswift.modeling.positions import with_positions
from rayswift.modeling.resolved import ResolvedModel, resolve_model

if TYPE_CHECKING:
    from rayswift.data.tokens.encoder import Encoder

logger = logging.getLogger("rayswift.generate.model_spec")

#: Ranks that vLLM's LoRA layers come in.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_CPU_TARGET = 8


@dataclass(frozen=True)
class ModelSpec:
    """One model to serve.

    ``model``: folder, id or URI. ``engine_kwargs``: vLLM's. ``adapters``: name → folder, given at start;
    ``default_adapter`` answers for the model's own name. ``template``: fields of :class:`Encoder`. ``bundles``: Ray
    resources of a replica, the first with the replica itself; ``node_labels``: those of its nodes. ``local``: gateway
    and replicas share this machine.
    ``sampling``: what requests that do not say so get (the flags' names; ``max_new_tokens`` is also their limit).
    ``fingerprints``: served name → what tells the weights behind it from others: with other weights in the same folder
    deploying again replaces the replicas, and ``/v1/models`` tells clients.
    """

    name: str
    model: str
    engine: str
    task_type: str = "causal_lm"
    use_hf: bool = False
    revision: str | None = None
    torch_dtype: str | None = None
    attn_impl: str | None = None
    use_gpu: bool = False
    max_model_len: int | None = None
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int = 42
    fingerprints: dict[str, str] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    default_adapter: str | None = None
    adapter_root: str | None = None
    load_args: bool = True
    max_adapters: int = 16
    max_lora_rank: int = 16
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: int = 64
    max_ongoing_requests: int = 256
    max_queued_requests: int = 512
    upscale_delay: int = 10
    downscale_delay: int = 300
    drain_timeout: int = 600
    bundles: list[dict[str, float]] = field(default_factory=lambda: [{"CPU": 1.0}])
    node_labels: dict[str, str] = field(default_factory=dict)
    env_vars: dict[str, str] = field(default_factory=dict)
    local: bool = True

    @property
    def _positions(self) -> dict[str, Any]:
        names = ("rope_scaling", "max_model_len")
        return {name: self.model_kwargs[name] for name in names if name in self.model_kwargs}

    @property
    def takes_adapters(self) -> bool:
        """Whether the engine has to be ready for LoRA."""
        return bool(self.adapters or self.adapter_root)

    @property
    def together(self) -> dict[str, float]:
        """The resources of a replica in all its bundles."""
        return dict(sum((Counter(bundle) for bundle in self.bundles), Counter[str]()))

    @property
    def placement_strategy(self) -> str:
        """How the bundles lie on nodes: tensor parallel parts speak at every layer, and share one."""
        return "PACK" if self.engine_kwargs.get("pipeline_parallel_size", 1) > 1 else "STRICT_PACK"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; what is at its default is left out."""
        default = ModelSpec(self.name, self.model, self.engine)
        return {k: v for k, v in asdict(self).items() if k in ("name", "model", "engine") or v != getattr(default, k)}

    def resolve_model(self, token: str | None = None) -> str:
        """The model's local folder on this node; downloads it, with the token of ``--hub_token``."""
        return hub.resolve_model(self.model, revision=self.revision, use_hf=self.use_hf, token=token)

    def encoders(self, model_dir: str) -> dict[str, Encoder]:
        """How prompts are laid out: under ``""`` and the served name for the model itself."""
        from rayswift.data.tokens.encoder import Encoder

        own = Encoder(model_dir=model_dir, **self.template)
        if self.default_adapter is not None:
            own = self.adapter_encoder(self.adapters[self.default_adapter], own)
        return {"": own, self.name: own}

    def adapter_encoder(self, folder: str, own: Encoder) -> Encoder:
        """As `own`, with template and system prompt that the adapter was trained with (its ``args.json``), unless
        ``--load_args false`` says otherwise."""
        saved = (read_saved_arguments(folder) if self.load_args else None) or {}
        wanted = (
            "template", "system", "use_chat_template", "agent_template", "response_prefix", "template_backend",
            "template_date", "task_type", "num_labels", "problem_type",
        )  # fmt: skip
        known = {key: saved[key] for key in wanted if saved.get(key) is not None and key not in self.template}
        return replace(own, **known)

    def llm_config(self, model_dir: str) -> dict[str, Any]:
        """The arguments of ``ray.serve.llm.LLMConfig``."""
        kwargs = dict(self.engine_kwargs)
        kwargs.setdefault("dtype", resolve_dtype(self.torch_dtype, model_dir, self.use_gpu, training=False))
        if positions := with_positions(read_config(model_dir), self._positions):
            kwargs.setdefault("hf_overrides", positions)
        if self.max_model_len:
            kwargs.setdefault("max_model_len", self.max_model_len)
        lora = {"enable_lora": True, "max_lora_rank": self.max_lora_rank, "max_loras": min(4, self.max_adapters)}
        if self.takes_adapters:
            # Twice: those that are replaced leave when their last request has ended.
            kwargs = {**lora, "max_cpu_loras": 2 * self.max_adapters + lora["max_loras"], **kwargs}
        return {
            "model_loading_config": {"model_id": self.name, "model_source": model_dir},
            "engine_kwargs": kwargs,
            "placement_group_config": {"bundles": self.bundles, "strategy": self.placement_strategy},
            "accelerator_config": {"kind": "gpu" if self.use_gpu else "cpu"},
            # vLLM's own metrics stay on; Ray's copy of them costs a call per metric and step.
            "log_engine_metrics": False,
        }


def hub_token(app: str) -> str:
    """Name under which a cluster keeps the hub's token for the replicas of a model's Serve application."""
    return f"hub_token/{app}"


def model_specs(args: DeployArguments) -> list[ModelSpec]:
    """The models of one ``rayswift deploy``: ``--models``, or the one of ``--model``/``--adapters``.

    Raises:
        UserError: a model, adapter or engine that is not there, or that this machine cannot run.
    """
    if not args.models:
        return _names_differ([model_spec(resolve_model(args))])
    shared = {name: getattr(args, name) for name in args.given if name not in ("models", "model", "adapters")}
    specs = []
    for name, flags in args.models.items():
        try:
            one = make_arguments("deploy", **{**shared, **flags, "served_model_name": name})
            specs.append(model_spec(resolve_model(one)))
        except UserError as error:
            raise UserError("\n".join(f"--models {name}: {line}" for line in str(error).split("\n"))) from None
    return _names_differ(specs)


def _names_differ(specs: list[ModelSpec]) -> list[ModelSpec]:
    """``specs``. UserError when an adapter is called like a model: who asks for that name means the model."""
    served = {spec.name for spec in specs}
    for name in (name for spec in specs for name in spec.adapters if name in served):
        raise UserError(f"--adapters {name}=...: a model is served as {name}; choose another name for the adapter")
    return specs


def model_spec(model: ResolvedModel, replicas: tuple[int, int] | None = None) -> ModelSpec:
    """What is started for a model. ``replicas``: fewest and most, in place of those of the flags.

    Raises:
        UserError: as :func:`model_specs`.
    """
    args, command = serving_settings(model.args), model.args.command
    if replicas is not None:
        args.min_replicas, args.max_replicas = replicas
    check_engine(args.infer_backend)
    use_gpu, is_local = wants_gpu(args), address_of(args) is None
    model = replace(model, args=args).merged()
    if args.infer_backend == "vllm" or command not in ("infer", "sample"):
        check_served(model.adapters)
    if args.task_type != "causal_lm" and args.infer_backend == "transformers" and model.adapters:
        hint = "add --merge_lora true, or --infer_backend vllm"
        raise UserError(f"--task_type {args.task_type} takes --adapters with vLLM only: {hint}")
    if args.task_type == "generative_reranker" and args.infer_backend == "vllm":
        raise UserError("--task_type generative_reranker: served by --infer_backend transformers, not by vllm")
    args, folder = model.args, model.args.model
    if is_local or os.path.isdir(folder):
        folder = model.folder()
        check_model(args, folder, use_gpu)
    ongoing = args.max_ongoing_requests or args.vllm_max_num_seqs
    target = args.target_ongoing_requests or (max(1, args.vllm_max_num_seqs // 4) if use_gpu else _CPU_TARGET)
    side_by_side = args.vllm_data_parallel_size
    max_replicas = max(args.max_replicas or 1, side_by_side)
    queued = args.max_queued_requests
    root = args.adapter_root
    if root is not None and not hub.is_remote_uri(root):
        if not Path(root).is_dir():
            raise UserError(f"--adapter_root {root}: no such folder")
        root = str(Path(root).resolve())
    name, adapters, default = args.served_model_name or model.name, dict(model.adapters), model.default_adapter
    if default == name:  # it answers for the model, whose name no adapter can have
        adapters = {(default := f"{name}-adapter"): adapters[name]}
    rank = max([args.vllm_max_lora_rank, *map(lora_rank, model.adapters.values())])
    same = {f.name: getattr(args, f.name) for f in fields(ModelSpec) if hasattr(args, f.name)}
    name = args.served_model_name or model.name
    return ModelSpec(**{
        **same,
        "name": name,
        "model": folder,
        "engine": args.infer_backend,
        "revision": args.model_revision,
        "use_gpu": use_gpu,
        "max_model_len": context_limit(args)[1],
        "engine_kwargs": engine_kwargs(args, use_gpu),
        "sampling": sampling_defaults(args),
        "fingerprints": fingerprints(name, folder, model),
        "template": encoder_settings(args, model.adapter or folder),
        "adapters": adapters,
        "default_adapter": default,
        "adapter_root": root,
        "max_adapters": max(args.max_adapters, len(model.adapters)),
        # The engine's: more than asked for where an adapter given at start has more.
        "max_lora_rank": next((known for known in LORA_RANKS if known >= rank), rank),
        "min_replicas": max(args.min_replicas, side_by_side if side_by_side > 1 else 0),
        "max_replicas": max_replicas,
        "target_ongoing_requests": target,
        "max_ongoing_requests": ongoing,
        "max_queued_requests": 2 * ongoing * max_replicas if queued is None else queued,
        "bundles": bundles(args, use_gpu),
        "env_vars": environment(args, use_gpu, max_replicas),
        "local": is_local,
    })  # fmt: skip


def check_served(adapters: Mapping[str, str]) -> None:
    """UserError for an adapter (name → folder) that can be served merged only. The Transformers engine of `infer` and
    `sample`, which answers with one adapter, takes them all."""
    for folder in adapters.values():
        if reason := only_merged(read_adapter_config(folder), check_adapter(folder)):
            raise UserError(f"--adapters {folder}: {reason}, or add --merge_lora true")


def check_nodes(spec: ModelSpec, cluster: Cluster) -> None:
    """Raises UserError when no node, and none that the autoscaler may start, can hold an engine: it would wait for
    ever."""
    labelled = [kind for kind in cluster.kinds if kind.takes(spec.node_labels)]
    if cluster.kinds and not labelled:
        asked = ", ".join(f"{key}={value}" for key, value in spec.node_labels.items())
        raise UserError(f"--node_labels {asked}: no node here, and none that the autoscaler can start, has them")
    if spec.placement_strategy == "PACK" or not labelled or any(kind.room(spec.together) for kind in labelled):
        return
    needed = ", ".join(f"{amount:g} {name}" for name, amount in spec.together.items())
    mend = "lower --resources_per_worker"
    if len(spec.bundles) > 1:
        mend = "lower --vllm_tensor_parallel_size; --vllm_pipeline_parallel_size spreads a model over nodes"
    raise UserError(f"{spec.name}: an engine needs {needed} on one node, and no node can have that; {mend}")


def serving_settings(args: Any) -> Any:
    """A copy of ``args`` as the arguments of ``rayswift deploy``: what both commands have is taken over."""
    if isinstance(args, DeployArguments):
        return copy.copy(args)
    known = specs_of(DeployArguments)
    settings = take_over("deploy", args)
    settings.restored = args.restored & frozenset(known)
    for name in (*settings.restored, "model", "adapters"):
        setattr(settings, name, getattr(args, name))
    return settings


# --- pieces of a spec -------------------------------------------------------------------------------------------


def encoder_settings(args: DeployArguments, folder: str) -> dict[str, Any]:
    """The fields of :class:`Encoder` that flags or the checkpoint (model or adapter in ``folder``) set. Without a task:
    a model that was not trained for it here reads texts as its tokenizer gives them; a judge is always asked as one."""
    from rayswift.data.tokens.encoder import Encoder

    names = [f.name for f in fields(Encoder) if f.name not in ("model_dir", "max_length", "truncation_strategy")]
    found = {name: getattr(args, name) for name in names if args.is_set(name) and hasattr(args, name)}
    saved = read_saved_arguments(folder) if os.path.isdir(folder) else None
    was_trained = (saved or {}).get("task_type", "causal_lm") == args.task_type != "causal_lm"
    if not was_trained and args.task_type != "generative_reranker":
        for name in ("task_type", "num_labels", "problem_type"):
            found.pop(name, None)
    return found


def fingerprints(name: str, folder: str, model: ResolvedModel) -> dict[str, str]:
    """`ModelSpec.fingerprints` of what lies on this machine."""
    found = {known: folder_fingerprint(path) for known, path in model.adapters.items() if os.path.isdir(path)}
    if os.path.isdir(folder):
        marks = [folder_fingerprint(folder), *([found[model.default_adapter]] if model.default_adapter else [])]
        found[name] = "-".join(marks)
    return found


#: How vLLM runs a model that gives vectors or scores instead of text, by ``--task_type``.
