"""Rejection sampling: let a model answer GSM8K's questions eight times each, and fine-tune it on what it got right.

python jobs/rft_gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct       # settings of `rayswift sample`, then -- those of sft
ray job submit -- python jobs/rft_gsm8k.py --max_replicas 8 -- --num_train_epochs 1 --num_workers 8     # on a cluster
"""

import argparse
import sys

import rayswift

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
words = [*sys.argv[1:], "--"]
options, for_sample = parser.parse_known_args(words[: words.index("--")])
for_sft = words[words.index("--") + 1 : -1]

answers = rayswift.sample(
    model=options.model,
    dataset=["modelscope/gsm8k"],
    sampler_engine="vllm",
    num_return_sequences=8,
    max_new_tokens=512,
    orm_model="gsm8k",
    n_best_to_keep=4,
    easy_query_threshold=0.9,
    output_file="gsm8k.jsonl",
    overrides=for_sample,
)
rayswift.sft(
    model=options.model,
    dataset=[answers["output_file"]],
    train_type="lora",
    learning_rate=1e-4,
    num_train_epochs=2,
    output_dir="output",
    overrides=for_sft,
)
