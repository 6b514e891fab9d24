"""Chat templates in the shape of the models' own, and small real tokenizers that carry them.

The layouts are those that the models publish (Qwen3, Llama 3.x, DeepSeek, Gemma, Llama 2, Phi-3), written out for plain
conversations; the vocabularies are trained here on a few lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QWEN3 = """\
{%- if messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(last_query=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}
{%- set thoughts = '' %}{%- set answer = m.content %}
{%- if '</think>' in m.content %}
{%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last_query and (loop.last or thoughts) %}
{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' + answer }}
{%- else %}{{- answer }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

QWEN3_THINKING = QWEN3[: QWEN3.rindex("{%- if add_generation_prompt")] + (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)

_LLAMA3_TURNS = """\
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA3 = "{{- bos_token }}" + _LLAMA3_TURNS

LLAMA3_2 = (
    """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
"""
    + _LLAMA3_TURNS
)

DEEPSEEK_V2_5 = """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = m.content %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}"""

DEEPSEEK_R1 = DEEPSEEK_V2_5.replace(
    "{%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' + m.content +",
    "{%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] +",
).replace("{{- '<｜Assistant｜>' }}", "{{- '<｜Assistant｜><think>\\n' }}")

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

LLAMA2 = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

PHI3 = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

OPEN_ENDED = """\
{%- for m in messages %}{{- '\\n' + m.role + ': ' + m.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '\\nassistant: ' }}{%- endif %}"""

_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
_LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@dataclass(frozen=True)
class Family:
    """A small tokenizer: its chat template, special and ordinary added tokens, bos and eos.

    `leading_space`: a Llama-2-like vocabulary that puts a space before every text. `strip_right`: special tokens that
    swallow the white space after them.
    """

    chat_template: str | None
    special: Sequence[str]
    eos: str
    bos: str | None = None
    added: Sequence[str] = ()
    leading_space: bool = False
    adds_bos: bool = False
    strip_right: Sequence[str] = field(default=())


_DEEPSEEK_MARKS = ["<｜User｜>", "<｜Assistant｜>"]
_DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
FAMILIES: dict[str, Family] = {
    "qwen3": Family(QWEN3, _CHATML, "<|im_end|>", added=_THINK),
    "qwen3_thinking": Family(QWEN3_THINKING, _CHATML, "<|im_end|>", added=_THINK),
    "llama3": Family(LLAMA3, _LLAMA, "<|eot_id|>", bos="<|begin_of_text|>", adds_bos=True),
    "llama3_2": Family(LLAMA3_2, _LLAMA, "<|eot_id|>", bos="<|begin_of_text|>", adds_bos=True),
    "deepseek_v2_5": Family(DEEPSEEK_V2_5, _DEEPSEEK, _DEEPSEEK[1], bos=_DEEPSEEK[0], added=_DEEPSEEK_MARKS),
    "deepseek_r1": Family(DEEPSEEK_R1, _DEEPSEEK, _DEEPSEEK[1], bos=_DEEPSEEK[0], added=[*_DEEPSEEK_MARKS, *_THINK]),
    "gemma": Family(GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", bos="<bos>"),
    "llama2": Family(LLAMA2, ["<s>", "</s>"], "</s>", bos="<s>", leading_space=True, adds_bos=True),
    "phi3": Family(
        PHI3, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|end|>", strip_right=["<|user|>", "<|end|>"]
    ),
    "open_ended": Family(OPEN_ENDED, ["</s>"], "</s>"),
    "no_template": Family(None, ["<s>", "</s>"], "</s>", bos="<s>", adds_bos=True),
}

_LINES = [
    "You are a helpful assistant. The user asks a question and the assistant gives a short answer.",
    "system user assistant model Human Assistant User Today Date Cutting Knowledge December",
    "q1 q2 r1 r2 SYS hello world 0123456789 <|im_end|> <think> [INST] [/INST] {name: value} 你好，世界。",
]


def save_tokenizer(family: Family, directory: Path) -> str:
    """Train and save the family's small tokenizer; returns the folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if family.leading_space:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
        alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>"] if family.leading_space else []
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_LINES, trainer)
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, special=True, rstrip=text in family.strip_right) for text in family.special]
    )
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in family.added])
    if family.adds_bos:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(f"{family.bos} $A", None, [bos])
    extra: dict[str, Any] = {"bos_token": family.bos} if family.bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.eos, **extra)
    tokenizer.chat_template = family.chat_template
    tokenizer.save_pretrained(directory)
    return str(directory)


def save_every_family(of: str, directory: Path) -> str:
    """Save the tokenizer in the folder ``of`` with the special tokens of every family and agent format of RaySwift, bos
    and eos of its own, and without a chat template; returns the folder."""
    from transformers import AutoTokenizer

    from rayswift.data.chat.agents import load_agent_formats
    from rayswift.data.chat.families import load_templates

    owners = (*load_templates().values(), *load_agent_formats().values())
    written = [text for owner in owners for text in owner.literals]
    marks = {mark for text in written for mark in re.findall(r"(?<!<)<[^<>\s]+>(?!>)|\[/?[A-Za-z_]+\]", text)}
    tokenizer = AutoTokenizer.from_pretrained(of)
    special = sorted(mark for mark in marks if "|" in mark or "｜" in mark or mark[0] == "[" or mark.endswith("_turn>"))
    assert {"<|im_end|>", "<|eot_id|>", "<start_of_turn>", "[INST]", "<｜User｜>"} <= set(special)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>", "additional_special_tokens": special})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "<s>", "</s>", "<sop>"])
    tokenizer.chat_template = None  # the family `dummy` would ask with it, unlike in training
    tokenizer.save_pretrained(directory)
    return str(directory)
