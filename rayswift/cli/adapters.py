"""``rayswift adapters list|load|unload``: the adapters of a running ``rayswift deploy``."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from rayswift.arguments.help import Parser
from rayswift.console import say
from rayswift.errors import UserError

_DEFAULT_URL = "http://127.0.0.1:8000/v1"


def adapters(argv: Sequence[str]) -> int:
    """Run ``rayswift adapters WORD ...``; returns the exit status."""
    options = adapters_parser().parse_args(list(argv) or ["--help"])
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    if options.word == "list":
        for card in _call(options.base_url, "/adapters", key)["data"]:
            say(f"{card['id']}  (of {card['model']})")
        return 0
    body = {"lora_name": options.name, "model": options.model}
    if options.word == "load":
        body |= {"lora_path": options.path, "load_inplace": options.load_inplace or None}
    done = _call(
        options.base_url, f"/{options.word}_lora_adapter", key, {k: v for k, v in body.items() if v is not None}
    )
    say(f"{options.word}ed {done['id']}")
    return 0


def adapters_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rayswift adapters", description="Adapters of a running rayswift deploy.", allow_abbrev=False)
    words = parser.add_subparsers(dest="word", required=True, metavar="list|load|unload")
    texts = {
        "list": "what can be asked for",
        "load": "load an adapter from below --adapter_root",
        "unload": "unload one",
    }
    for word, text in texts.items():
        one = words.add_parser(word, help=text, description=text, allow_abbrev=False)
        if word != "list":
            one.add_argument("name", help="name of the adapter for clients")
        if word == "load":
            one.add_argument("path", nargs="?", help="its folder below --adapter_root (default: what the name means)")
            one.add_argument("--load_inplace", action="store_true", help="replace what has the name")
        one.add_argument("--base_url", default=_DEFAULT_URL, metavar="URL", help=f"the endpoint ({_DEFAULT_URL})")
        one.add_argument("--api_key", metavar="KEY", help="its key (default: OPENAI_API_KEY)")
        one.add_argument("--model", metavar="NAME", help="the model, where the endpoint has several")
    return parser


def _call(base_url: str, path: str, key: str | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to the endpoint. Raises UserError with what the server says."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(base_url.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        try:
            message = str(json.load(error)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"status {error.code}"
        raise UserError(message) from None
    except (urllib.error.URLError, ValueError, OSError) as error:
        raise UserError(f"--base_url {base_url}: no rayswift deploy answers there ({error})") from None
