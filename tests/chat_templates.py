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

GLM4 = """\
[gMASK]<sop>
{%- if tools -%}
<|system|>
# 可用工具
{%- for tool in tools %}
    {%- set function = tool.function if tool.get("function") else tool %}

## {{ function.name }}

{{ function | tojson(indent=4, ensure_ascii=False) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
{%- endfor %}
{%- endif -%}

{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content }}
    {%- endif %}
{%- endfor %}

{%- for message in messages if message.role != 'system' %}
    {%- set role = message['role'] %}
    {%- set content = message['content'] %}
    {%- set meta = message.get("metadata", "") %}

    {%- if role == 'user' %}
<|user|>
{{ content }}
    {%- elif role == 'assistant' and not meta %}
<|assistant|>
{{ content }}
    {%- elif role == 'assistant' and meta %}
<|assistant|>{{ meta }}
{{ content }}
    {%- elif role == 'observation' %}
<|observation|>
{{ content }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

CHATGLM4 = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n"
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
    "{% set tools = item['tools'] %}{% for tool in tools %}{% if tool['type'] == 'function' %}\n\n"
    "## {{ tool['function']['name'] }}\n\n{{ tool['function'] | tojson(indent=4) }}\n"
    "在调用上述函数时，请使用 Json 格式表示调用的参数。{% endif %}{% endfor %}{% endif %}"
    "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

DEEPSEEK_V3_1 = """\
{%- if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, system='', is_last_user=false) %}
{%- for m in messages if m.role == 'system' %}{%- set ns.system = ns.system + m.content %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- set ns.is_tool = false %}{%- set ns.is_first = false %}{%- set ns.is_last_user = true %}
{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- if ns.is_last_user %}{{- '<｜Assistant｜></think>' }}{%- endif %}
{%- set ns.is_last_user = false %}{%- set ns.is_first = false %}{%- set ns.is_tool = false %}
{%- for tool in m.tool_calls %}
{%- if not ns.is_first %}{{- (m.content or '') + '<｜tool▁calls▁begin｜>' }}{%- set ns.is_first = true %}{%- endif %}
{{- '<｜tool▁call▁begin｜>' + tool.function.name + '<｜tool▁sep｜>' + tool.function.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- elif m.role == 'assistant' %}
{%- if ns.is_last_user %}{{- '<｜Assistant｜>' }}
{%- if m.prefix is defined and m.prefix and thinking %}{{- '<think>' }}{%- else %}{{- '</think>' }}{%- endif %}
{%- endif %}
{%- set ns.is_last_user = false %}
{%- set content = m.content %}
{%- if not ns.is_tool and '</think>' in content %}{%- set content = content.split('</think>', 1)[1] %}{%- endif %}
{%- set ns.is_tool = false %}
{{- content + '<｜end▁of▁sentence｜>' }}
{%- elif m.role == 'tool' %}
{%- set ns.is_last_user = false %}{%- set ns.is_tool = true %}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.is_last_user and not ns.is_tool %}
{{- '<｜Assistant｜>' }}{%- if not thinking %}{{- '</think>' }}{%- else %}{{- '<think>' }}{%- endif %}
{%- endif %}"""

DEEPSEEK_V2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + "
    "'\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% elif "
    "message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

#: With the system text, which :data:`LLAMA2` leaves out.
LLAMA2_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + "
    "eos_token }}{% endif %}{% endfor %}"
)

PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
    "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
    "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' "
    "+ message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

MISTRAL_2501 = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Mistral Small 3, a Large Language Model (LLM) created by Mistral AI, a \
French startup headquartered in Paris.\\nYour knowledge base was last updated on 2023-10-01. The current date is " \
+ today + \
".\\n\\nWhen you're not sure about some information, you say that you don't have the information and don't make up \
anything.\\nIf the user's question is not clear, ambiguous, or does not provide enough context for you to accurately \
answer the question, you do not try to answer it right away and you rather ask the user to clarify their request (e.g. \
\\"What are some good restaurants around me?\\" => \\"Where are you?\\" or \\"When is the next flight to Tokyo\\" => \
\\"Where do you travel from?\\")" %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}{%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
{%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}
{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}
{%- else %}{{- raise_exception('Only user, system and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""

_CODER_FORMAT = (
    "</tools>\\n\\nIf you choose to call a function ONLY reply in the following format with NO "
    "suffix:\\n"
    "\\n<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>\\nvalue_1\\n</parameter>\\n"
    "<parameter=example_parameter_2>\\nThis "
    "is the value for the second parameter\\nthat can span\\nmultiple "
    "lines\\n</parameter>\\n</function>\\n</tool_call>\\n\\n<IMPORTANT>\\nReminder:\\n- Function calls MUST follow "
    "the specified format: an inner <function=...></function> block must be nested within <tool_call></tool_call> "
    "XML tags\\n- Required parameters MUST be specified\\n- You may provide optional reasoning for your function "
    "call in natural language BEFORE the function call, but NOT after\\n- If there is no function call available, "
    "answer the question like normal with your current knowledge and do not tell the user about function "
    "calls\\n</IMPORTANT>"
)
QWEN3_CODER = (
    """\
{%- macro extra(fields, handled) %}
{%- for key in fields if key not in handled %}
{%- if fields[key] is mapping or (fields[key] is sequence and fields[key] is not string) %}
{{- '\\n<' ~ key ~ '>' ~ (fields[key] | tojson | safe) ~ '</' ~ key ~ '>' }}
{%- else %}{{- '\\n<' ~ key ~ '>' ~ (fields[key] | string) ~ '</' ~ key ~ '>' }}{%- endif %}
{%- endfor %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}
{%- set turns = messages %}
{%- if tools %}
{%- set system = 'You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks.' %}
{%- endif %}
{%- endif %}
{%- if system is defined %}{{- '<|im_start|>system\\n' + system }}{%- endif %}
{%- if tools %}
{{- '\\n\\n# Tools\\n\\nYou have access to the following functions:\\n\\n<tools>' }}
{%- for tool in tools %}
{%- set tool = tool.function %}
{{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' }}
{%- if tool.description is defined %}
{{- '\\n<description>' ~ (tool.description | trim) ~ '</description>' }}
{%- endif %}
{{- '\\n<parameters>' }}
{%- for name, fields in tool.parameters.properties | items %}
{{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' }}
{%- if fields.type is defined %}{{- '\\n<type>' ~ (fields.type | string) ~ '</type>' }}{%- endif %}
{%- if fields.description is defined %}
{{- '\\n<description>' ~ (fields.description | trim) ~ '</description>' }}
{%- endif %}
{{- extra(fields, ['name', 'type', 'description']) ~ '\\n</parameter>' }}
{%- endfor %}
{{- extra(tool.parameters, ['type', 'properties']) ~ '\\n</parameters>' }}
{{- extra(tool, ['type', 'name', 'description', 'parameters']) ~ '\\n</function>' }}
{%- endfor %}
{{- '\\n"""
    + _CODER_FORMAT
    + """' }}
{%- endif %}
{%- if system is defined %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in turns %}
{%- if m.role == 'assistant' and m.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- if m.content is string and m.content | trim %}{{- '\\n' + m.content | trim + '\\n' }}{%- endif %}
{%- for call in m.tool_calls %}
{{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\\n' }}
{{- value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string }}
{{- '\\n</parameter>\\n' }}
{%- endfor %}
{{- '</function>\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user\\n' }}{%- endif %}
{{- '<tool_response>\\n' + m.content + '\\n</tool_response>\\n' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

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
