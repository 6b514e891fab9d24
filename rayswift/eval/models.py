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
class Contender:
    """One model to evaluate.

    ``label`` names it in tables and folders; ``model`` is what the endpoint is asked for (None: its first model).
    ``weights``: the folder or id that its line in ``eval_result.jsonl`` goes to. ``tokenizer``: folder with its
    tokenizer, where that is on this machine.
    """

    label: str
    model: str | None
    weights: str
    adapter: str | None = None
    tokenizer: str | None = None

    @property
    def folder(self) -> str:
        """Name of its folder in a run."""
        return folder_name(self.label)


@dataclass
class Serving:
    """One endpoint and who is asked there. ``args``: its deployment's, or with ``--eval_url`` the endpoint's."""

    args: EvalArguments
    contenders: list[Contender]

    @property
    def is_own(self) -> bool:
        """Whether this command starts it."""
        return not self.args.eval_url


def plan_servings(args: EvalArguments) -> list[Serving]:
    """What is served for ``args``, in order.

    Raises:
        UserError: two contenders of one name, or several adapters without names.
    """
    servings = list(_servings(args))
    labels = [contender.label for serving in servings for contender in serving.contenders]
    if twice := next((label for number, label in enumerate(labels) if label in labels[:number]), None):
        raise UserError(f"--adapters: two of them are called {twice}; write NAME=DIR")
    return servings


def _servings(args: EvalArguments) -> list[Serving]:
    if args.models:
        return [serving for name, flags in args.models.items() for serving in _named(args, name, flags)]
    if args.eval_url:
        asked = args.served_model_name or args.model
        label = os.path.basename((asked or "model").rstrip("/")) or "model"
        tokenizer = args.model if args.model and os.path.isdir(args.model) else None
        # A folder is no name of a served model: it only lends its tokenizer.
        name = args.served_model_name or (None if tokenizer else args.model)
        return [Serving(args, [Contender(label, name, args.model or label, tokenizer=tokenizer)])]
    if not args.adapters:
        return [Serving(args, [Contender(args.served_model_name or args.model_suffix, None, args.model or "")])]
    return _with_adapters(args)


def _named(args: EvalArguments, name: str, flags: dict[str, Any]) -> list[Serving]:
    """The serving of one entry of ``--models``: its flags over the command's own."""
    from rayswift.arguments import make_arguments

    kept = {key: getattr(args, key) for key in args.given if key not in ("models", "model", "adapters")}
    if args.eval_url:
        flags = {"served_model_name": name, **flags}
    try:
        one: Any = make_arguments("eval", **{**kept, **flags})
    except UserError as error:
        raise UserError("\n".join(f"--models {name}: {line}" for line in str(error).split("\n"))) from None
    servings = _servings(one)
    if len(servings) == 1 and len(servings[0].contenders) == 1:
        servings[0].contenders[0] = replace(servings[0].contenders[0], label=name)
    return servings


def _with_adapters(args: EvalArguments) -> list[Serving]:
    named = {}
    for text in args.adapters:
        name, _, path = text.rpartition("=")
        name = name or os.path.basename(path.rstrip("/"))
        if name in named:
            raise UserError(f"--adapters {text}: the name {name} is taken; write NAME={path}")
        named[name] = path
    tuned = [Contender(name, name, path, adapter=path) for name, path in named.items()]
    if args.merge_lora:  # merged weights are models of their own
        own = [replaced(args, adapters=[one.weights]) for one in tuned]
        merged = [Serving(each, [replace(one, model=None)]) for each, one in zip(own, tuned, strict=True)]
        return [*([_base_alone(args)] if args.eval_base else []), *merged]
    if not args.eval_base and len(tuned) == 1 and "=" not in args.adapters[0]:
        return [Serving(args, [replace(tuned[0], model=None)])]
    together = replaced(args, adapters=[f"{name}={path}" for name, path in named.items()])
    base = [Contender(_base_model(args), None, _base_model(args, whole=True))] if args.eval_base else []
    return [Serving(together, [*base, *tuned])]


def _base_alone(args: EvalArguments) -> Serving:
    model = _base_model(args, whole=True)
    alone = replaced(args, adapters=[], merge_lora=False, model=model)
    return Serving(alone, [Contender(_base_model(args), None, model)])


def _base_model(args: EvalArguments, *, whole: bool = False) -> str:
    """The model that the adapters belong to: ``--model``, else what the first adapter's ``args.json`` says."""
    from rayswift.generate.model_spec import with_adapters

    model = args.model or with_adapters(copy.copy(args))[0].model or ""
    return model if whole else os.path.basename(model.rstrip("/")) or "model"


def replaced(args: EvalArguments, **changes: Any) -> EvalArguments:
    """A copy of the arguments with other values."""
    other = copy.copy(args)
    for name, value in changes.items():
        setattr(other, name, value)
    other.given = args.given | set(changes)
    return other


def check_servings(servings: list[Serving]) -> None:
    """Refuse, before anything starts, what cannot be served or reached.

    Raises:
        UserError: a model, adapter or engine that is not there, an endpoint that does not answer.
    """
    from rayswift.generate.model_spec import plan_models

    for serving in servings:
        if serving.is_own:
            plan = plan_models(copy.copy(serving.args))[0]
            serving.contenders = [replace(c, tokenizer=_tokenizer(plan, c)) for c in serving.contenders]
        else:
            _check_endpoint(serving)


def _tokenizer(plan: Any, contender: Contender) -> str | None:
    """Where the contender's tokenizer is: a checkpoint's own (it may have more tokens), else the model's."""
    if contender.adapter and (Path(contender.adapter) / "tokenizer_config.json").is_file():
        return contender.adapter
    return str(plan.model) if os.path.isdir(plan.model) else None


def _check_endpoint(serving: Serving) -> None:
    from rayswift.generate.endpoint import EndpointEngine

    url, key = serving.args.eval_url, api_key(serving.args)
    for number, contender in enumerate(serving.contenders):
        try:
            engine = EndpointEngine.connect(str(url), model=contender.model, api_key=key)
        except UserError as error:
            raise type(error)(str(error).replace("--base_url", "--eval_url", 1)) from None
        named = contender.label if contender.model or serving.args.model else engine.model
        serving.contenders[number] = replace(contender, model=engine.model, label=named)


def api_key(args: EvalArguments) -> str | None:
    """The key that clients send; for an endpoint of others also the environment's ``OPENAI_API_KEY``."""
    outside = os.environ.get("OPENAI_API_KEY") if args.eval_url else None
    return args.api_key[0] if args.api_key else outside or None
