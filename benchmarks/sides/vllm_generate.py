"""Bare vLLM: one ``LLM.generate`` over all prompts of a file of rows, several answers each.

The prompts are the token ids that RaySwift sends. ``tokens_per_s`` is about the call of ``generate`` alone.

    python sides/vllm_generate.py --model DIR --rows FILE --answers N --max_tokens N --out FILE
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rayswift_sample import ENGINE

from rayswift.data.rows.standard import standardise_row
from rayswift.data.tokens.encoder import Encoder


def prompts(encoder: Encoder, rows: Path) -> list[list[int]]:
    """The token ids of each row's question."""
    standard = [standardise_row(json.loads(line)) for line in rows.read_text(encoding="utf-8").splitlines()]
    return [encoder.encode_prompt(row["messages"][:-1]) for row in standard]  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--rows", "--out"):
        parser.add_argument(name, required=True)
    for name in ("--answers", "--max_tokens"):
        parser.add_argument(name, required=True, type=int)
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    encoder = Encoder(options.model)
    ids = prompts(encoder, Path(options.rows))
    begin = time.perf_counter()
    engine = LLM(
        options.model, dtype=ENGINE["torch_dtype"], enforce_eager=ENGINE["vllm_enforce_eager"],
        max_model_len=ENGINE["vllm_max_model_len"], max_num_seqs=256, seed=42, max_num_batched_tokens=4096,
        # With it, vLLM for CPUs dies on answers that have a seed.
        enable_chunked_prefill=False,
    )  # fmt: skip
    settings = SamplingParams(
        n=options.answers, temperature=1.0, top_p=1.0, max_tokens=options.max_tokens, seed=42,
        stop=encoder.stop_strings, stop_token_ids=encoder.eos_token_ids, skip_special_tokens=False,
    )  # fmt: skip
    start = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in ids], settings)
    end = time.perf_counter()
    answers = [answer for output in outputs for answer in output.outputs]
    tokens = sum(len(answer.token_ids) for answer in answers)
    result = {"seconds": end - begin, "tokens_per_s": tokens / (end - start), "tokens": tokens,
              "texts": [answer.text for answer in answers],
              "prompt_tokens": sum(map(len, ids)) * options.answers}  # fmt: skip
    Path(options.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
