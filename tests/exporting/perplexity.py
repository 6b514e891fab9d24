"""Perplexity of model folders on texts, as another program sees them: Transformers, or vLLM's prompt log-probabilities.

    python tests/exporting/perplexity.py {transformers|vllm} TEXTS.json MODEL...

TEXTS.json is ``{"name": "text", ...}``. Prints one line of JSON per model: ``{"model": ..., "name": 12.3, ...}``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

#: Tokens per stretch, and stretches per text: minutes on two cores, and enough that a per cent shows.
LENGTH, STRETCHES = 512, 8


def stretches(tokenizer: Any, text: str) -> list[list[int]]:
    """The text in stretches of LENGTH tokens."""
    ids = tokenizer(text)["input_ids"]
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)][:STRETCHES]


def with_transformers(model_dir: str, texts: dict[str, str]) -> dict[str, float]:
    """In float32, so that the difference between two models is that of their weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = {}
    for name, text in texts.items():
        total = count = 0.0
        for ids in stretches(tokenizer, text):
            tokens = torch.tensor([ids])
            with torch.no_grad():
                logits = model(tokens).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
            count += len(ids) - 1
        found[name] = math.exp(total / count)
    return found


def with_vllm(model_dir: str, texts: dict[str, str]) -> dict[str, Any]:
    """With the engine that `rayswift deploy` starts, on this machine's CPU or GPU."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    engine = LLM(model_dir, enforce_eager=True, max_model_len=LENGTH + 8, max_num_seqs=4, gpu_memory_utilization=0.5)
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found: dict[str, Any] = {}
    for name, text in texts.items():
        prompts = [{"prompt_token_ids": ids} for ids in stretches(tokenizer, text)]
        values = [
            entry.logprob
            for output in engine.generate(prompts, settings, use_tqdm=False)
            for token, entries in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            for entry in [entries[token]]
        ]
        found[name] = math.exp(-sum(values) / len(values))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answer = engine.chat(chat, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]
    # Tokens that were generated one by one must be likely when they are read at once: both kernels see one model.
    written = list(answer.outputs[0].token_ids)
    prompt = {"prompt_token_ids": list(answer.prompt_token_ids) + written}
    read = engine.generate([prompt], settings, use_tqdm=False)[0].prompt_logprobs[-len(written) :]
    likely = sum(entries[token].logprob for token, entries in zip(written, read, strict=True)) / len(written)
    return {**found, "answer": answer.outputs[0].text, "answer_logprob": likely}


if __name__ == "__main__":
    measure = {"transformers": with_transformers, "vllm": with_vllm}[sys.argv[1]]
    with open(sys.argv[2], encoding="utf-8") as file:
        given = json.load(file)
    for folder in sys.argv[3:]:
        print(json.dumps({"model": os.path.basename(folder), **measure(folder, given)}), flush=True)
