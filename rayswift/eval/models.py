"""Who is evaluated: an endpoint's model, a model, checkpoints, adapters, or several of them side by side.

Those that one deployment can serve together (a model and its adapters) share it; the others come one after the other.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError
from rayswift.eval.results import folder_name

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments


@dataclass(frozen=True)
class EvalModel:
    """One model to evaluate.

    ``label`` names it in tables and folders; ``name`` is what the endpoint is asked for (None: its first model).
    ``weights``: the folder or id that its line in ``eval_result.jsonl`` goes to. ``tokenizer``: folder with its
    tokenizer, where that is on this machine.
    """

    label: str
    name: str | None
    weights: str
    adapter: str | None = None
    tokenizer: str | None = None

    @property
    def folder(self) -> str:
        """Name of its folder in a run."""
        return folder_name(self.label)


@dataclass
class EvalEndpoint:
    """One endpoint and who is asked there. ``args``: its deployment's, or with ``--eval_url`` the endpoint's."""

    args: EvalArguments
    models: list[EvalModel]

    @property
    def is_own(self) -> bool:
        """Whether this command starts it."""
        return not self.args.eval_url

    def sources(self) -> dict[str, str]:
        """Marks of what answers (for `rayswift.journal`)."""
        if self.is_own:
            from rayswift.modeling.resolved import resolve_model

            return resolve_model(self.args).sources()
        from rayswift.generate.endpoint import endpoint_sources

        url = self.args.eval_url
        found = [endpoint_sources(f"--eval_url {one.label}", url, one.name, api_key(self.args)) for one in self.models]
        return {name: mark for each in found for name, mark in each.items()}


def plan_endpoints(args: EvalArguments) -> list[EvalEndpoint]:
    """What is served for ``args``, in order.

    Raises:
        UserError: two models of one name, or several adapters without names.
    """
    endpoints = _endpoints(args)
    labels = [model.label for endpoint in endpoints for model in endpoint.models]
    if twice := next((label for number, label in enumerate(labels) if label in labels[:number]), None):
        raise UserError(f"--adapters: two of them are called {twice}; write NAME=DIR")
    return endpoints


def _endpoints(args: EvalArguments) -> list[EvalEndpoint]:
    if args.models:
        return [endpoint for name, flags in args.models.items() for endpoint in _named(args, name, flags)]
    if args.eval_url:
        asked = args.served_model_name or args.model
        label = os.path.basename((asked or "model").rstrip("/")) or "model"
        tokenizer = args.model if args.model and os.path.isdir(args.model) else None
        # A folder is no name of a served model: it only lends its tokenizer.
        name = args.served_model_name or (None if tokenizer else args.model)
        return [EvalEndpoint(args, [EvalModel(label, name, args.model or label, tokenizer=tokenizer)])]
    if not args.adapters:
        return [EvalEndpoint(args, [EvalModel(args.served_model_name or args.model_suffix, None, args.model or "")])]
    return _with_adapters(args)


def _named(args: EvalArguments, name: str, flags: dict[str, Any]) -> list[EvalEndpoint]:
    """The endpoint of one entry of ``--models``: its flags over the command's own."""
    from rayswift.arguments import make_arguments

    kept = {key: getattr(args, key) for key in args.given if key not in ("models", "model", "adapters")}
    if args.eval_url:
        flags = {"served_model_name": name, **flags}
    try:
        one: Any = make_arguments("eval", **{**kept, **flags})
    except UserError as error:
        raise UserError("\n".join(f"--models {name}: {line}" for line in str(error).split("\n"))) from None
    endpoints = _endpoints(one)
    if len(endpoints) == 1 and len(endpoints[0].models) == 1:
        endpoints[0].models[0] = replace(endpoints[0].models[0], label=name)
    return endpoints


def _with_adapters(args: EvalArguments) -> list[EvalEndpoint]:
    named = {}
    for text in args.adapters:
        name, _, path = text.rpartition("=")
        name = name or os.path.basename(path.rstrip("/"))
        if name in named:
            raise UserError(f"--adapters {text}: the name {name} is taken; write NAME={path}")
        named[name] = path
    tuned = [EvalModel(name, name, path, adapter=path) for name, path in named.items()]
    if args.merge_lora:  # merged weights are models of their own
        own = [replaced(args, adapters=[one.weights]) for one in tuned]
        merged = [EvalEndpoint(each, [replace(one, name=None)]) for each, one in zip(own, tuned, strict=True)]
        if args.eval_base:
            alone = replaced(args, adapters=[], merge_lora=False, model=_base_model(args, whole=True))
            merged.insert(0, EvalEndpoint(alone, [EvalModel(_base_model(args), None, alone.model or "")]))
        return merged
    if not args.eval_base and len(tuned) == 1 and "=" not in args.adapters[0]:
        return [EvalEndpoint(args, [replace(tuned[0], name=None)])]
    together = replaced(args, adapters=[f"{name}={path}" for name, path in named.items()])
    base = [EvalModel(_base_model(args), None, _base_model(args, whole=True))] if args.eval_base else []
    return [EvalEndpoint(together, [*base, *tuned])]


def _base_model(args: EvalArguments, *, whole: bool = False) -> str:
    """The model that the adapters belong to: ``--model``, else what the first adapter's ``args.json`` says."""
    from rayswift.modeling.resolved import resolve_model

    model = args.model or resolve_model(args).args.model or ""
    return model if whole else os.path.basename(model.rstrip("/")) or "model"


def replaced(args: EvalArguments, **changes: Any) -> EvalArguments:
    """A copy of the arguments with other values."""
    other = copy.copy(args)
    for name, value in changes.items():
        setattr(other, name, value)
    other.given = args.given | set(changes)
    return other


def check_endpoints(endpoints: list[EvalEndpoint]) -> None:
    """Refuse, before anything starts, what cannot be served or reached.

    Raises:
        UserError: a model, adapter or engine that is not there, an endpoint that does not answer.
    """
    from rayswift.generate.model_spec import model_specs

    for endpoint in endpoints:
        if endpoint.is_own:
            plan = model_specs(endpoint.args)[0]
            endpoint.models = [replace(one, tokenizer=_tokenizer(plan, one)) for one in endpoint.models]
        else:
            _check_endpoint(endpoint)


def _tokenizer(plan: Any, model: EvalModel) -> str | None:
    """Where the model's tokenizer is: a checkpoint's own (it may have more tokens), else the model's."""
    if model.adapter and (Path(model.adapter) / "tokenizer_config.json").is_file():
        return model.adapter
    return str(plan.model) if os.path.isdir(plan.model) else None


def _check_endpoint(endpoint: EvalEndpoint) -> None:
    from rayswift.generate.endpoint import EndpointEngine

    url, key = endpoint.args.eval_url, api_key(endpoint.args)
    for number, model in enumerate(endpoint.models):
        try:
            engine = EndpointEngine.connect(str(url), model=model.name, api_key=key)
        except UserError as error:
            raise type(error)(str(error).replace("--base_url", "--eval_url", 1)) from None
        named = model.label if model.name or endpoint.args.model else engine.model
        endpoint.models[number] = replace(model, name=engine.model, label=named)


def api_key(args: EvalArguments) -> str | None:
    """The key that clients send; for an endpoint of others also the environment's ``OPENAI_API_KEY``."""
    outside = os.environ.get("OPENAI_API_KEY") if args.eval_url else None
    return args.api_key[0] if args.api_key else outside or None
