"""``--to_ollama``: a Modelfile with the template, stop words, system text and sampling settings of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayswift.data.chat.families import adds_bos, load_templates
from rayswift.data.tokens.encoder import Encoder

#: Stand-ins for the parts of a conversation; plain words, so that no tokenizer or template changes them.
_SYSTEM, _QUERY, _REPLY, _NEXT = "systemtexthere", "firstquestionhere", "firstanswerhere", "secondquestionhere"
#: generation_config.json -> Ollama's name.
_PARAMETERS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}  # fmt: skip


def modelfile(encoder: Encoder, weights: str, context: int | None) -> str:
    """The text of a Modelfile.

    Args:
        encoder: the model's tokenizer and template (``--template``, ``--system``).
        weights: what stands after FROM: a GGUF file, or a folder of safetensors.
        context: the longest sequence (``--max_length``); None leaves Ollama's.
    """
    system, template = _template(encoder)
    lines = [f"FROM {weights}", f'TEMPLATE """{template}"""']
    text = encoder.system if encoder.system is not None else system
    if text:
        lines.append(f'SYSTEM """{text}"""')
    stops = [*encoder.stop_words, encoder.tokenizer.eos_token or ""]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops) if stop]
    path = Path(encoder.model_dir) / "generation_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        config = {}
    lines += [f"PARAMETER {own} {config[name]}" for name, own in _PARAMETERS.items() if config.get(name) is not None]
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def _template(encoder: Encoder) -> tuple[str, str]:
    """The template's own system text, and the layout of one round in Ollama's language.

    The layout is found by rendering conversations of stand-ins and cutting between them, so that Ollama's prompts are
    those of training whatever the template is.
    """
    query, reply = {"role": "user", "content": _QUERY}, {"role": "assistant", "content": _REPLY}
    plain = _render(encoder, [query])
    head, _, tail = plain.partition(_QUERY)
    goes_on = _render(encoder, [query, reply, {"role": "user", "content": _NEXT}])
    between = goes_on.partition(_REPLY)[2].partition(_NEXT)[0]
    end = _end_of_reply(encoder, between)
    opening = between.removeprefix(end)
    default, before = _system_parts(encoder, query, head, opening)
    return default, f"{before}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}{end}"


def _system_parts(encoder: Encoder, query: dict[str, str], head: str, opening: str) -> tuple[str, str]:
    """The default system text that stands in ``head``, and what a round has before its query."""
    from rayswift.errors import UserError

    try:
        rendered = _render(encoder, [{"role": "system", "content": _SYSTEM}, query])
    except UserError:  # the template has no place for a system text
        return "", head
    before, _, rest = rendered.partition(_SYSTEM)
    after = rest.partition(_QUERY)[0]
    default = ""
    if head.startswith(before) and head.endswith(after) and len(head) > len(before) + len(after):
        default, head = head[len(before) : len(head) - len(after)], opening
    if after.endswith(opening) and head.endswith(opening):
        start = head.removesuffix(opening)
        otherwise = f"{{{{ else }}}}{start}" if start else ""
        closing = after.removesuffix(opening)
        return default, f"{{{{ if .System }}}}{before}{{{{ .System }}}}{closing}{otherwise}{{{{ end }}}}{opening}"
    return default, f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{head}{{{{ end }}}}"


def _end_of_reply(encoder: Encoder, between: str) -> str:
    """The part of what stands between a reply and the next query that belongs to the reply."""
    family = load_templates().get(encoder.template_name)
    tokenizer = encoder.tokenizer
    if family is not None:
        chat_sep = family.chat_sep.replace("{{EOS}}", tokenizer.eos_token or "")
        return chat_sep if between.startswith(chat_sep) else ""
    for stop in encoder.stop_words:
        if between.startswith(stop):
            spaces = len(between) - len(stop) - len(between[len(stop) :].lstrip())
            return between[: len(stop) + spaces]
    return ""


def _render(encoder: Encoder, messages: list[dict[str, Any]]) -> str:
    """The prompt's text; without the bos token that Ollama adds by itself."""
    text: str = encoder.tokenizer.decode(encoder.encode_prompt(messages), skip_special_tokens=False)
    return text.removeprefix(encoder.tokenizer.bos_token) if adds_bos(encoder.tokenizer) else text
