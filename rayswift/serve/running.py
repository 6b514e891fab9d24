"""A deployment for the time of another command (`app`, `infer`, `eval`): started, used, stopped."""

from __future__ import annotations

import copy
import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI endpoint: ``base_url`` ends in ``/v1``, ``model`` is the name to ask for."""

    base_url: str
    api_key: str | None
    model: str


@contextmanager
def running_deployment(args: Any) -> Iterator[Endpoint]:
    """Serve what ``args`` (the arguments of a command that has a model) describe, on a free port of 127.0.0.1.

    Without ``--app_name`` under a name of its own, so that what is deployed on the same cluster stays as it is; the
    same command again gets the same name, and so takes over what a killed one left running.

    Raises:
        UserError: as `deploy`.
    """
    from rayswift.generate.model_spec import plan_models
    from rayswift.serve.deploy import deployment
    from rayswift.serve.ports import free_port

    settings = copy.copy(serving_settings(args))
    if "app_name" not in settings.given:
        said = repr((socket.gethostname(), os.getcwd(), sys.argv, args.model, args.adapters))
        settings.app_name = f"rayswift-{args.command}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    plans = plan_models(settings)
    settings.port = free_port(settings.host, settings.port) or settings.port
    with deployment(settings, plans):
        key = settings.api_key[0] if settings.api_key else None
        yield Endpoint(f"http://{settings.host}:{settings.port}/v1", key, plans[0].name)


def serving_settings(args: Any) -> Any:
    """``args`` as the arguments of ``rayswift deploy``: what both commands have is taken over."""
    from rayswift.arguments import DeployArguments, make_arguments
    from rayswift.arguments.fields import specs_of

    if isinstance(args, DeployArguments):
        return args
    known = specs_of(DeployArguments)
    return make_arguments("deploy", **{name: getattr(args, name) for name in args.given if name in known})
