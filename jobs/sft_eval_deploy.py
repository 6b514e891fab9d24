"""Fine-tune, evaluate base and tuned model side by side, export, and roll the deployment over if the score rose.

python jobs/sft_eval_deploy.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset train.jsonl --benchmarks gsm8k
ray job submit --no-wait -- python jobs/sft_eval_deploy.py ... --num_workers 8 -- --eval_limit 500 -- --max_replicas 4

Settings of `rayswift sft`, then -- those of eval, then -- those of deploy. On a cluster the deployment of the same name
(`--app_name`) is replaced behind its gateway, replica by replica; where none runs, one starts.
"""

import argparse
import sys

import rayswift

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--benchmarks", nargs="+", default=["gsm8k"])
words = [*sys.argv[1:], "--", "--"]
first = words.index("--")
second = words.index("--", first + 1)
options, for_sft = parser.parse_known_args(words[:first])
for_eval, for_deploy = words[first + 1 : second], [word for word in words[second + 1 :] if word != "--"]

run = rayswift.sft(model=options.model, output_dir="output", overrides=for_sft)
tuned = run["last_model_checkpoint"]
scores = rayswift.evaluate(
    models={"base": {"model": options.model}, "tuned": {"adapters": [tuned], "merge_lora": True}},
    eval_dataset=options.benchmarks,
    infer_backend="vllm",
    overrides=for_eval,
)
merged = rayswift.export(adapters=[tuned], merge_lora=True, exist_ok=True)
gain = sum(scores["tuned"].values()) - sum(scores["base"].values())
if gain > 0:
    print(f"the score rose by {gain:.4f}: {merged} takes over", flush=True)
    rayswift.deploy(model=merged, infer_backend="vllm", served_model_name="tuned", overrides=for_deploy)
else:
    print(f"the score did not rise ({gain:+.4f}): what is deployed stays; the tuned model is {merged}")
