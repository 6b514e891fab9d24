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
    return {"query": "one", "response": "other"}


register_dataset(dataset_path=str(Path(__file__).with_name("asked.jsonl")), preprocess=other)
"""


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files(folder: Path) -> None:
    """Two models, an adapter, rows, a plugin."""
    from peft import LoraConfig, get_peft_model
    from tiny_models import llama, word_tokenizer

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
    for seed, name in enumerate(("model", "other")):
        model = llama(seed, vocab_size=len(tokenizer), max_position_embeddings=2048)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    made = make_arguments("sft", model=str(folder / "model"), dataset=["d"], system="trained", model_author=["trained"])
    for name in ("model", "adapter"):
        made.save(folder / name / "args.json")
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
    for name in ("root", "data", "hub_rows"):
        (folder / name).mkdir()
    write_rows(folder / "hub_rows" / "train.jsonl", rows[:2])
    called = [
        {"role": "user", "content": "one"}, {"role": "tool_call", "content": '{"name": "look", "arguments": {}}'},
        {"role": "tool_response", "content": "three"},
    ]  # fmt: skip
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
