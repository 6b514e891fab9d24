"""Serve Qwen2.5-7B-Instruct with vLLM on 1 to 4 replicas of one GPU each, scaled by load, with LoRA adapters by name.

python jobs/deploy_qwen7b.py --api_key KEY
ray job submit --no-wait -- python jobs/deploy_qwen7b.py --host 0.0.0.0     # on a cluster

Ray shows a job's command line to everyone on the cluster: with a key, `rayswift submit deploy ... --api_key KEY`.
"""

import sys

import rayswift

rayswift.deploy(
    model="Qwen/Qwen2.5-7B-Instruct",
    infer_backend="vllm",
    served_model_name="qwen",
    vllm_max_model_len=8192,
    vllm_enable_prefix_caching=True,
    min_replicas=1,
    max_replicas=4,
    overrides=sys.argv[1:],
)
