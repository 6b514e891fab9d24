"""Keeps tokens and keys out of everything that is printed, logged, saved or shown to other users of the machine.

A secret is known by the name of what it is set as (`is_secret`), by how it looks (`redact_text`), and by its value:
what `remember` saw, and the secrets in this process's environment, are masked wherever they stand.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shlex
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REDACTED = "***"

# Flags whose value is a secret. The pattern also catches flags that only Transformers or a plugin knows.
SECRET_FLAGS = (
    "api_key", "hub_token", "judge_api_key", "push_to_hub_token", "swanlab_secret", "swanlab_token", "wandb_api_key",
)  # fmt: skip
_SECRET_NAME = re.compile(
    r"(?:^|[_.])(?:token|key|secret|password|passwd|passphrase|authorization|cookie|credentials?)$|"
    r"api_?keys?$|(?:access|secret|private)key$|(?:access|auth)token$"
)
# Settings of SWIFT and of tokenizers that only look like secrets.
_HARMLESS = re.compile(
    r"(?:teacher_tag|reft_layer|vera_projection_prng)_key|"
    r"(?:eos|bos|pad|unk|sep|cls|mask|image|video|audio|stop|special|next|start|end|boi|eoi|decoder_start)_token"
)
# Settings that are prompts: what looks like a secret in their words is an example, and models were trained with it.
_PROMPTS = ("system", "response_prefix", "stop_words", "new_special_tokens")
# What the hubs and API services hand out, wherever it stands; and the password part of an address.
_SECRET_TEXT = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|ms-[0-9a-f]{8}-[0-9a-f-]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[a-z]_[A-Za-z0-9]{20,}|"
    r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
_ADDRESS_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_HEADER = re.compile(
    r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token)\s+)?|\bbearer\s+(?=\S*[\d._~+/=-]))[\w.~+/=-]{6,}",
    re.IGNORECASE,
)
_QUERY = re.compile(r"([?&;#]([\w.%-]+)=)[^&;#\s\"'<>]+")
_SETTING = re.compile(r"((?<![\w?&;#.%/-])-{0,2}([A-Za-z][\w-]*)=)(\"[^\"]*\"|'[^']*'|[^\s,;&)\"']+)")
_IN_JSON = re.compile(
    r"""((?<!\\)(["'])([\w.-]+)\2\s*:\s*)("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|-?\d[\d.]*|\[[^\]]{0,2000}\])"""
)
_IN_JSON_TEXT = re.compile(r"""((?<!\\)(\\{1,7}["'])([\w.-]+)\2\s*:\s*)\2[^"'\\]*\2""")

#: A shorter text is no secret by its value alone: it would be found in words that have nothing to do with it.
_SHORTEST = 8
_LARGEST_LOG = 64 * 2**20
_spellings: list[str] = []  # of known secrets, the longest first: one may begin as another does


@functools.cache
def is_secret(name: str) -> bool:
    """Whether a flag, keyword, header or environment variable of this name (snake_case or camelCase) holds a secret."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.lstrip("-")).replace("-", "_").lower()
    return not _HARMLESS.fullmatch(name) and _SECRET_NAME.search(name) is not None


# --- known by value -----------------------------------------------------------------------------------------------


def remember(settings: Mapping[str, Any]) -> None:
    """Know the secrets among ``settings`` and in the environment, nested ones too: from now on `redact_text` and this
    process's logs mask them wherever they stand, as they are or as JSON or an address writes them."""
    before = len(_spellings)
    for secret in {value for value in _values([settings, os.environ]) if len(value) >= _SHORTEST}:
        quoted = urllib.parse.quote(secret, safe="")
        written = {secret, json.dumps(secret)[1:-1], quoted, urllib.parse.quote_plus(secret)}
        _spellings.extend(written.difference(_spellings))
    _spellings.sort(key=len, reverse=True)
    if _spellings and not before:
        logging.setLogRecordFactory(_masking(logging.getLogRecordFactory()))


def _values(value: Any, secret: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _values(item, is_secret(str(name)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _values(item, secret)
    elif secret and isinstance(value, str) and value != REDACTED:
        yield value
    elif isinstance(value, str):
        yield from (urllib.parse.unquote(text) for text in _hidden_in(value))


def _hidden_in(text: str) -> Iterator[str]:
    """The passwords and tokens in an address."""
    for found in _ADDRESS_PASSWORD.finditer(text):
        yield found[0].partition(":")[2]
    for found in _QUERY.finditer(text):
        if _in_query(found[2]):
            yield found[0].partition("=")[2]


def _masking(make: Any) -> Any:
    """A factory of log records whose messages are masked, whichever library logs and whoever handles it."""

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made: logging.LogRecord = make(*args, **kwargs)
        try:
            message = made.getMessage()
        except (TypeError, ValueError):  # wrong arguments: logging's own to report
            return made
        if (masked := mask_known(message)) != message:
            made.msg, made.args = masked, ()
        if made.exc_info and made.exc_info[0]:
            trace = logging.Formatter().formatException(made.exc_info)
            if (masked := mask_known(trace)) != trace:
                made.exc_text = masked
        return made

    return record


def mask_known(text: str) -> str:
    """``text`` without the secrets whose values are known."""
    for spelling in _spellings:
        text = text.replace(spelling, REDACTED)
    return text


def mask_files(folder: str | os.PathLike[str]) -> None:
    """Mask known secrets in the files of a folder that another program wrote: its settings and logs."""
    for parent, _, names in os.walk(folder) if _spellings else ():
        for path in (os.path.join(parent, name) for name in names):
            if os.path.islink(path) or os.path.getsize(path) > _LARGEST_LOG or not os.access(path, os.R_OK | os.W_OK):
                continue
            with open(path, "r+", encoding="utf-8", errors="surrogateescape", newline="") as file:
                text = file.read()
                if (masked := mask_known(text)) != text:
                    file.seek(0)
                    file.write(masked)
                    file.truncate()


# --- by name and look ---------------------------------------------------------------------------------------------


def _in_query(name: str) -> bool:
    return is_secret(name) or name.lower().endswith(("sig", "signature"))


def redact_text(text: str) -> str:
    """Mask secrets inside free text: known ones, what looks like a token, passwords and tokens in addresses, headers,
    and what JSON or ``name=value`` says is one."""
    text = _ADDRESS_PASSWORD.sub(REDACTED, _SECRET_TEXT.sub(REDACTED, mask_known(text)))
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    text = _QUERY.sub(lambda found: found[1] + REDACTED if _in_query(found[2]) else found[0], text)
    text = _SETTING.sub(lambda found: found[1] + REDACTED if is_secret(found[2]) else found[0], text)
    text = _IN_JSON.sub(lambda found: f'{found[1]}"{REDACTED}"' if is_secret(found[3]) else found[0], text)
    return _IN_JSON_TEXT.sub(
        lambda found: f"{found[1]}{found[2]}{REDACTED}{found[2]}" if is_secret(found[3]) else found[0], text
    )


def redact(value: Any, name: str = "") -> Any:
    """A copy of ``value`` (scalars, lists, dicts) with secrets masked; ``name`` is the setting it belongs to."""
    if value is None or isinstance(value, bool):
        return value
    if name and is_secret(name):
        return REDACTED if value else value
    if isinstance(value, str):
        return mask_known(value) if name in _PROMPTS else redact_text(value)
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    return value


# --- command lines ------------------------------------------------------------------------------------------------


def _is_secret_flag(token: str) -> bool:
    name = token.lstrip("-").replace("-", "_")
    # A shortened flag (--hub_tok) is as good as the flag itself, so its value is masked too.
    return is_secret(name) or (len(name) > 3 and any(flag.startswith(name) for flag in SECRET_FLAGS))


def redact_command(line: str) -> str:
    """A command line as one text with its secrets masked; one that no shell could read as any other text."""
    try:
        return shlex.join(redact_argv(shlex.split(line)))
    except ValueError:
        return redact_text(line)


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


def hide_from_process_lists() -> None:
    """Overwrite the secrets in this process's command line as ``ps``, and Ray's list of drivers, show it.

    Linux keeps it in the process's own memory, where /proc says; nothing is done elsewhere.
    """
    try:
        with open("/proc/self/cmdline", "rb") as cmdline, open("/proc/self/stat", "rb") as stat:
            words, position = cmdline.read().split(b"\0"), int(stat.read().rpartition(b")")[2].split()[45])
    except (OSError, ValueError, IndexError):
        return
    for word, shown in zip(words, redact_argv([os.fsdecode(word) for word in words]), strict=True):
        if os.fsencode(shown) != word:
            import ctypes

            ctypes.memmove(position, os.fsencode(shown).ljust(len(word))[: len(word)], len(word))
        position += len(word) + 1
