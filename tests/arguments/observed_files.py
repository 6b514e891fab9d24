"""What flags name: models, an adapter, rows, a plugin."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from observed_serving import TOOLS

from rayswift.arguments import make_arguments

PLUGIN = """
from pathlib import Path

from rayswift.data.names import register_dataset


def other(row):
    return {"query": "one", "response": "other", "rejected_response": "two"}


for name in ("asked.jsonl", "rich.jsonl"):
    register_dataset(dataset_path=str(Path(__file__).with_name(name)), preprocess=other)
"""
CODE = """
from transformers import LlamaForCausalLM


class Own(LlamaForCausalLM):
    pass
"""


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_training_rows(folder: Path, called: list[Any]) -> None:
    """Rows of several turns and of many lengths, with tools, a further column and marks; bad ones."""

    def pair(*turns: str, **more: Any) -> dict[str, Any]:
        roles = ("user", "assistant") * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        return {"messages": messages, "rejected_response": "other", "note": "other", **more}

    rich = [pair("one new", "two three", "three", "two one " * 4 * number) for number in range(1, 12)]
    answer = {"role": "assistant", "content": "two"}
    tools = pair(messages=[*called, answer], tools=json.dumps(TOOLS))
    write_rows(folder / "rich.jsonl", [*rich, *[tools] * 3])
    write_rows(folder / "bad.jsonl", [pair("one", "two"), {"messages": 5}, pair("two", "one")])
    write_rows(folder / "trained_identity.jsonl", [
        pair("one", answer) for answer in ("{{NAME}}", "{{AUTHOR}}", "{{NAME}} two", "{{AUTHOR}} two")
    ])  # fmt: skip


def write_files(folder: Path) -> None:
    """Two models, an adapter, rows, a plugin."""
    from peft import LoraConfig, get_peft_model
    from tiny_models import llama, qwen3_mixture, word_tokenizer

    from rayswift.data.chat.agents import load_agent_formats
    from rayswift.data.chat.families import load_templates

    tokenizer = word_tokenizer(160)
    written = [
        text for owner in (*load_templates().values(), *load_agent_formats().values()) for text in owner.literals
    ]
    tokenizer.add_tokens(sorted({mark for text in written for mark in re.findall(r"<[^<>\s]+>|\w+", text)}))
    tokenizer.add_tokens(["user", "one", "two", "three", "trained", "other"])
    tokenizer.chat_template = (
        "{% if tools %}{{ tools }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.eos_token = "<|im_end|>"
    coded = llama(vocab_size=len(tokenizer), max_position_embeddings=2048)
    coded.config.auto_map = {"AutoModelForCausalLM": "own.Own"}
    for name, model in (("coded", coded), ("mixture", qwen3_mixture(vocab_size=len(tokenizer)))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    coded.model.layers[0].self_attn.q_proj.weight.data[:, 0] += 0.5  # as if an adapter was merged
    del coded.config.auto_map
    coded.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    (folder / "coded" / "own.py").write_text(CODE)
    for seed, name in enumerate(("model", "other")):
        model = llama(seed, vocab_size=len(tokenizer), max_position_embeddings=2048)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    made = make_arguments("sft", model=str(folder / "model"), dataset=["d"], system="trained", model_author=["trained"])
    made.save(folder / "model" / "args.json")
    made.max_model_len = 1024
    made.save(folder / "adapter" / "args.json")
    for number, name in enumerate(("rows", "others")):
        rows = [
            {"messages": [{"role": "user", "content": f"one new w{10 * number + row}"},
                          {"role": "assistant", "content": "two three"}]}
            for row in range(6)
        ]  # fmt: skip
        pairs = [{**row, "rejected_response": "other"} for row in rows]
        pairs_name = "pairs.jsonl" if name == "rows" else "others_pairs.jsonl"
        write_rows(folder / pairs_name, pairs + pairs)
        write_rows(folder / f"{name}.jsonl", rows)
    write_rows(folder / "labels.jsonl", [{**row, "label": number % 2} for number, row in enumerate(rows)])
    called = [
        {"role": "user", "content": "one"}, {"role": "tool_call", "content": '{"name": "look", "arguments": {}}'},
        {"role": "tool_response", "content": "three"},
    ]  # fmt: skip
    write_training_rows(folder, called)
    for name in ("root", "data", "hub_rows"):
        (folder / name).mkdir()
    write_rows(folder / "hub_rows" / "train.jsonl", rows[:2])
    write_rows(folder / "asked.jsonl", [
        {**rows[0], "note": "a"}, {"messages": called, "tools": json.dumps(TOOLS), "note": "b"}, {"messages": 5},
    ])  # fmt: skip
    about = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "{{NAME}} of {{AUTHOR}}"}]
    write_rows(folder / "identity.jsonl", [{"messages": about}])
    write_rows(folder / "data" / "a.jsonl", rows[:1])  # as if it had been sampled before
    write_rows(folder / "sampled.jsonl", [{**rows[0], "id": "x"}])
    for name in ("a.py", "key.pem"):
        (folder / name).write_text("x = 1\n")
    (folder / "plugin.py").write_text(PLUGIN)
