"""The main job on a laptop: ask a real model who it is, LoRA-train it with 2 Ray workers and ZeRO-2, ask again.

make quickstart
"""

import argparse
import subprocess
import sys

import rayswift

QUESTION = "Who are you?"


def ask(*where: str) -> str:
    """What `rayswift infer` answers to the question, greedily."""
    command = [sys.executable, "-m", "rayswift", "infer", *where, "--temperature", "0", "--max_new_tokens", "40"]
    return subprocess.run(command, input=QUESTION, text=True, check=True, stdout=subprocess.PIPE).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    options, overrides = parser.parse_known_args()

    before = ask("--model", options.model)
    run = rayswift.sft(
        model=options.model,
        dataset=["identity"],
        model_name=["swift-robot"],
        model_author=["swift"],
        num_workers=2,
        deepspeed="zero2",
        learning_rate=1e-3,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        split_dataset_ratio=0,
        logging_steps=1,
        output_dir="output",
        overrides=overrides,
    )
    after = ask("--adapters", run["last_model_checkpoint"])
    print(f"\n{QUESTION}\n  before: {before}\n  after:  {after}")
    return 0 if "swift-robot" in after and "by swift" in after and "swift-robot" not in before else 1


if __name__ == "__main__":
    sys.exit(main())
