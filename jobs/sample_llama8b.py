"""Sample four answers per prompt from Llama-3.1-8B-Instruct with vLLM on 1 to 8 replicas, as many as there are GPUs.

python jobs/sample_llama8b.py --dataset prompts.jsonl
ray job submit -- python jobs/sample_llama8b.py --storage_path /mnt/shared    # a job that ended early goes on
"""

import sys

import rayswift

rayswift.sample(
    model="LLM-Research/Meta-Llama-3.1-8B-Instruct",
    dataset=["AI-ModelScope/alpaca-gpt4-data-en#1000"],
    sampler_engine="vllm",
    num_return_sequences=4,
    temperature=0.7,
    max_new_tokens=1024,
    vllm_max_model_len=8192,
    min_replicas=1,
    max_replicas=8,
    output_dir="sample_output",
    overrides=sys.argv[1:],
)
