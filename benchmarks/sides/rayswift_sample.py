"""``rayswift sample`` with vLLM over a file of rows; writes what it generated and how fast.

``tokens_per_s`` runs from the moment the engine is ready to the last answer, ``seconds`` from Ray's start to the file.

    python sides/rayswift_sample.py --model DIR --rows FILE --answers N --max_tokens N --folder DIR --out FILE
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import rayswift

#: The engine of all sides.
ENGINE = {"torch_dtype": "float32", "vllm_enforce_eager": True, "vllm_max_model_len": 1024, "use_gpu": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--rows", "--folder", "--out"):
        parser.add_argument(name, required=True)
    for name in ("--answers", "--max_tokens"):
        parser.add_argument(name, required=True, type=int)
    options = parser.parse_args()
    start = time.perf_counter()
    found = rayswift.sample(
        model=options.model,
        dataset=[options.rows],
        sampler_engine="vllm",
        num_return_sequences=options.answers,
        max_new_tokens=options.max_tokens,
        output_dir=options.folder,
        **ENGINE,
    )
    seconds = time.perf_counter() - start
    rows = Path(found["output_file"]).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["messages"][-1]["content"] for line in rows]
    result = {"seconds": seconds, "tokens_per_s": found["tokens/s"], "texts": texts,
              "prompt_tokens": found["num_prompt_tokens"], "tokens": found["num_generated_tokens"]}  # fmt: skip
    Path(options.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
