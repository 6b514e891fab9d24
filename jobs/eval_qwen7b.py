"""Score Qwen2.5-7B-Instruct on GSM8K, ARC and IFEval; the engine starts with the job and ends with it.

python jobs/eval_qwen7b.py --eval_limit 100
ray job submit -- python jobs/eval_qwen7b.py --max_replicas 8    # a cluster; any setting of eval can follow
"""

import sys

import rayswift

rayswift.evaluate(
    model="Qwen/Qwen2.5-7B-Instruct",
    eval_dataset=["gsm8k", "arc", "ifeval"],
    infer_backend="vllm",
    vllm_max_model_len=8192,
    max_new_tokens=2048,
    eval_output_dir="eval_output",
    overrides=sys.argv[1:],
)
