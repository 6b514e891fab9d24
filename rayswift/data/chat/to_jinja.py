"""A family as a chat template in Jinja: what a tokenizer carries, for programs that do not know families."""

from __future__ import annotations

import json

from rayswift.data.chat.families import RenderOptions, Template

_SCRIPT = """\
{%%- if tools %%}{{ raise_exception('this chat template has no format for tools') }}{%% endif -%%}
{%%- if messages and messages[0]['role'] == 'system' -%%}
{%%- set system = messages[0]['content'] -%%}{%%- set turns = messages[1:] -%%}
{%%- else -%%}
{%%- set system = %(default)s -%%}{%%- set turns = messages -%%}
{%%- endif -%%}
%(start)s
{%%- for message in turns -%%}
{%%- set text = message['content'] -%%}
{%%- if message['role'] == 'user' -%%}
%(query)s
{%%- elif message['role'] == 'assistant' -%%}
%(thoughts)s{{- %(opens)s + text + (%(suffix)s if loop.last else %(separator)s) -}}
{%%- else -%%}{{ raise_exception('this chat template has no place for a message of ' + message['role']) }}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{- %(generate)s -}}{%%- endif -%%}
"""
_NO_SYSTEM = "{{ raise_exception('this chat template has no place for a system message') }}"


def to_jinja(template: Template, options: RenderOptions) -> str | None:
    """A chat template that lays conversations without tools out as ``template``, bound to a tokenizer, does with these
    options; None where that has no place where a reply starts."""
    opens = template.reply_start or ""
    prompts = [prompt for prompt in (template.prompt, template.next_prompt) if prompt is not None]
    if not all(prompt.endswith(opens) and "{{QUERY}}" in prompt for prompt in prompts):
        return None
    asks = [prompt.removesuffix(opens).partition("{{QUERY}}") for prompt in prompts]
    query = [f"{{{{- {_text(before)} + text + {_text(after)} -}}}}" for before, _, after in asks]
    prefix = template.prefix.replace("{{ENVIRONMENT}}", "")
    if template.system_prefix is None:
        start = f"{{%- if system -%}}{_NO_SYSTEM}{{%- endif -%}}{{{{- {_text(prefix)} -}}}}"
    else:
        before, _, after = template.system_prefix.replace("{{ENVIRONMENT}}", "").partition("{{SYSTEM}}")
        start = f"{{{{- ({_text(before)} + system + {_text(after)}) if system else {_text(prefix)} -}}}}"
    system = template.default_system if options.system is None else options.system
    return _SCRIPT % {
        "default": _text(system or ""),
        "start": start,
        "query": query[0] if len(query) == 1 else
        "{%- if loop.index0 and turns[loop.index0 - 1]['role'] == 'assistant' -%}"
        + query[1] + "{%- else -%}" + query[0] + "{%- endif -%}",
        # Thoughts of earlier replies are no part of a prompt.
        "thoughts": "{%- if not loop.last and '</think>' in text -%}{%- set text = text.split('</think>')[-1]"
        ".lstrip() -%}{%- endif -%}\n" if template.thinking else "",
        "opens": _text(opens + template.reply_prefix),
        "suffix": _text(template.suffix),
        "separator": _text(template.chat_sep),
        "generate": _text(opens + template.opening(options)),
    }  # fmt: skip


def _text(value: str) -> str:
    """A string of Jinja."""
    return json.dumps(value, ensure_ascii=False)
