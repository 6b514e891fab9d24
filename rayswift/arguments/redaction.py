"""Keeps tokens and keys out of everything that is printed or saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

REDACTED = "***"

# Flags whose value is a secret. The pattern also catches flags that only Transformers or a plugin knows.
SECRET_FLAGS = ("api_key", "hub_token", "push_to_hub_token", "swanlab_secret", "swanlab_token", "wandb_api_key")
_SECRET_NAME = re.compile(r"(?:^|_)(?:token|key|secret|password|passwd)$", re.IGNORECASE)
# SWIFT settings that only look like secrets.
_HARMLESS = frozenset({"teacher_tag_key", "reft_layer_key", "vera_projection_prng_key"})
# What the hubs and API services hand out, wherever it stands; and the password part of an address.
_SECRET_TEXT = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|ms-[0-9a-f]{8}-[0-9a-f-]{20,}|sk-[A-Za-z0-9_-]{16,})")
_ADDRESS_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_JSON_SECRET = re.compile(r"""(["'][\w-]*(?:token|key|secret|password)["']\s*:\s*)("[^"]*"|'[^']*')""", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a flag, keyword or environment variable of this name holds a secret."""
    name = name.lstrip("-").replace("-", "_")
    return name.lower() not in _HARMLESS and _SECRET_NAME.search(name) is not None


def redact_text(text: str) -> str:
    """Mask what looks like a token, or the password in an address, inside free text."""
    text = _ADDRESS_PASSWORD.sub(REDACTED, _SECRET_TEXT.sub(REDACTED, text))
    return _JSON_SECRET.sub(rf'\g<1>"{REDACTED}"', text)


def redact(value: Any, name: str = "") -> Any:
    """A copy of ``value`` (scalars, lists, dicts) with secrets masked; ``name`` is the setting it belongs to."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if name and is_secret(name):
        return REDACTED if value else value
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value


def _is_secret_flag(token: str) -> bool:
    name = token.lstrip("-").replace("-", "_")
    # A shortened flag (--hub_tok) is as good as the flag itself, so its value is masked too.
    return is_secret(name) or (len(name) > 3 and any(flag.startswith(name) for flag in SECRET_FLAGS))


def redact_argv(argv: Sequence[str]) -> list[str]:
    """The command line with every secret's value masked, safe to print, log and save."""
    redacted: list[str] = []
    mask_next = False
    for token in argv:
        if mask_next and not token.startswith("--"):
            redacted.append(REDACTED)
            continue  # every further word too: a secret with a stray space is still a secret
        mask_next = False
        name, equals, _ = token.partition("=")
        if equals and _is_secret_flag(name) and re.fullmatch(r"-{0,2}[\w-]+", name):
            redacted.append(f"{name}={REDACTED}")
        else:
            redacted.append(redact_text(token))
            mask_next = token.startswith("--") and _is_secret_flag(token)
    return redacted
