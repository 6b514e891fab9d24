"""Quantise Qwen2.5-7B-Instruct to 4 bits with AWQ, calibrated on conversations: a third of the memory to serve.

python jobs/export_awq.py --output_dir Qwen2.5-7B-Instruct-awq
ray job submit -- python jobs/export_awq.py --adapters /mnt/shared/runs/v0/checkpoint-500 --output_dir /mnt/shared/awq
"""

import sys

import rayswift

rayswift.export(
    model="Qwen/Qwen2.5-7B-Instruct",
    quant_method="awq",
    quant_bits=4,
    dataset=["AI-ModelScope/alpaca-gpt4-data-zh#128", "AI-ModelScope/alpaca-gpt4-data-en#128"],
    max_length=2048,
    output_dir="output/Qwen2.5-7B-Instruct-awq",
    overrides=sys.argv[1:],
)
