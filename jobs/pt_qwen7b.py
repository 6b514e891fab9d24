"""Pre-train Qwen2.5-7B on chinese-c4: ZeRO-2, streaming, 10,000 steps on nodes of 8 A100s.

python jobs/pt_qwen7b.py                                  # this machine
ray job submit -- python jobs/pt_qwen7b.py --num_nodes 4  # a cluster; any setting can follow, as for `rayswift pt`
"""

import sys

import rayswift

rayswift.pretrain(
    model="Qwen/Qwen2.5-7B",
    dataset=["swift/chinese-c4"],
    streaming=True,
    train_type="full",
    deepspeed="zero2",
    num_nodes=1,
    max_steps=10_000,
    save_steps=500,
    save_total_limit=3,
    output_dir="output",
    overrides=sys.argv[1:],
)
