"""Align Qwen2.5-0.5B-Instruct with DPO on pairs of a chosen and a rejected answer: LoRA, one 24 GB GPU.

python jobs/dpo_qwen05b.py --dataset pairs.jsonl
ray job submit -- python jobs/dpo_qwen05b.py --num_workers 8    # a cluster; any setting of rlhf can follow
"""

import sys

import rayswift

rayswift.rlhf(
    rlhf_type="dpo",
    model="Qwen/Qwen2.5-0.5B-Instruct",
    dataset=["hjh0119/shareAI-Llama3-DPO-zh-en-emoji"],
    train_type="lora",
    beta=0.1,
    learning_rate=5e-5,
    num_train_epochs=1,
    gradient_accumulation_steps=16,
    max_length=2048,
    save_total_limit=2,
    output_dir="output",
    overrides=sys.argv[1:],
)
