"""Teach Qwen2.5-7B-Instruct a new name and author with LoRA: ten minutes on one 24 GB GPU.

python jobs/sft_qwen7b.py --model_name my-robot --model_author me
ray job submit -- python jobs/sft_qwen7b.py      # on a cluster; any setting can follow, as for `rayswift sft`
"""

import sys

import rayswift

rayswift.sft(
    model="Qwen/Qwen2.5-7B-Instruct",
    dataset=[
        "AI-ModelScope/alpaca-gpt4-data-zh#500",
        "AI-ModelScope/alpaca-gpt4-data-en#500",
        "swift/self-cognition#500",
    ],
    train_type="lora",
    torch_dtype="bfloat16",
    num_train_epochs=1,
    learning_rate=1e-4,
    lora_rank=8,
    lora_alpha=32,
    target_modules=["all-linear"],
    gradient_accumulation_steps=16,
    eval_steps=50,
    save_steps=50,
    save_total_limit=2,
    max_length=2048,
    system="You are a helpful assistant.",
    warmup_ratio=0.05,
    model_author=["swift"],
    model_name=["swift-robot"],
    output_dir="output",
    overrides=sys.argv[1:],
)
