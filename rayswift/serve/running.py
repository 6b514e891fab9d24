"""A deployment for the time of another command (`app`, `infer`, `eval`): started, used, stopped."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayswift.generate.model_spec import ModelSpec, serving_settings
from rayswift.generate.types import Endpoint
from rayswift.serve.deploy import deployment
from rayswift.serve.ports import free_port


@contextmanager
def running_deployment(args: Any, specs: list[ModelSpec]) -> Iterator[Endpoint]:
    """Serve ``specs`` on a free port of 127.0.0.1, with what the command's ``args`` say about the server.

    TLS is not for this server: a certificate names the host that people know, and this command asks by number. It stays
    on 127.0.0.1 then.

    Without ``--app_name`` under a name of its own, so that what is deployed on the same cluster stays as it is; the
    same command again gets the same name, and so takes over what a killed one left running.

    Raises:
        UserError: as `deploy`.
    """
    settings = serving_settings(args)
    if "app_name" not in settings.given:
        said = repr((socket.gethostname(), os.getcwd(), sys.argv, args.model, args.adapters))
        settings.app_name = f"rayswift-{args.command}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    if "num_gateways" not in settings.given:
        settings.num_gateways = 1  # for this command alone
    if settings.ssl_certfile:
        settings.host, settings.ssl_certfile, settings.ssl_keyfile = "127.0.0.1", None, None
    settings.port = free_port(settings.host, settings.port) or settings.port
    with deployment(settings, specs):
        key = settings.api_key[0] if settings.api_key else None
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        yield Endpoint(f"http://{host}:{settings.port}/v1", key, specs[0].name)
