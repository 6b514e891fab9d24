"""Two ranks that train a tiny model with RaySwift's trainer and store, killed again and again at random points; run by
``test_chaos.py``. Forked from a process that has imported everything, so that a start takes no seconds.

    python kills.py FOLDER KILLS

Prints one line of JSON: where ranks were killed, and from which steps they went on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "train")]

import torch  # noqa: E402
from test_ending import Queue  # noqa: E402
from test_saving_behind import WithPlaces  # noqa: E402
from test_trainer import row  # noqa: E402
from tiny_models import llama, word_tokenizer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from rayswift.arguments import make_arguments  # noqa: E402
from rayswift.train.checkpoints.store import CheckpointStore  # noqa: E402
from rayswift.train.collate import Collator  # noqa: E402
from rayswift.train.hf_arguments import hf_training_arguments  # noqa: E402
from rayswift.train.loader import Rank  # noqa: E402
from rayswift.train.schedule import StepSchedule  # noqa: E402
from rayswift.train.stopping import Wish  # noqa: E402
from rayswift.train.trainers.sft import SftTrainer  # noqa: E402

RANKS = 2
#: Where a rank is killed: behind a step; rank 0 also while it writes that step's checkpoint: when the note that it does
#: is there, behind its first file, before its manifest, and when it is whole.
POINTS = ("step", "note", "files", "manifest", "whole")
Kill = tuple[int, int, str]  # rank, step, point


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # forked threads of OpenMP are none
    steps, chance, done = 2 * kills + 4, random.Random(0), []
    attempt(folder / "undisturbed", steps, None)
    for number in range(kills):
        point = chance.choice(POINTS)
        rank = chance.randrange(RANKS) if point == "step" else 0
        # A checkpoint every other step.
        step = 2 * number + 2 + (chance.randrange(2) if point == "step" else 0)
        attempt(folder / "killed", steps, (rank, step, point), chance.uniform(0, 0.1))
        done.append((rank, step, point))
    attempt(folder / "killed", steps, None)
    print(json.dumps({"kills": done, "starts": (folder / "killed.starts").read_text().split(), "steps": steps}))


def attempt(folder: Path, steps: int, kill: Kill | None, delay: float = 0.0) -> None:
    """Train from the newest whole checkpoint, to the end or until a rank is killed; the other goes ``delay`` seconds
    later, as Ray Train ends a group."""
    folder.mkdir(parents=True, exist_ok=True)
    (meeting := folder.with_suffix(".meeting")).unlink(missing_ok=True)
    ranks = []
    for rank in range(RANKS):
        if (child := os.fork()) == 0:
            status = 1
            try:
                worker(rank, folder, steps, kill, str(meeting))
                status = 0
            finally:
                os._exit(status)
        ranks.append(child)
    first, status = os.wait()
    if kill is not None:
        time.sleep(delay)
    others = [child for child in ranks if child != first]
    for child in others:
        if kill is not None:
            os.kill(child, signal.SIGKILL)
        _, other = os.waitpid(child, 0)
        if kill is None and (status or other):
            sys.exit(f"an attempt that nobody killed ended with {status} and {other}")


def worker(rank: int, folder: Path, steps: int, kill: Kill | None, meeting: str) -> None:
    """What :func:`rayswift.train.worker.train_loop` does of it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    args = make_arguments("sft", model="m/m", dataset=["d"], train_type="full", learning_rate=0.01, save_steps=2,
                          logging_steps=1, gradient_checkpointing=False, save_total_limit=2)  # fmt: skip
    plan = StepSchedule(RANKS, 1, steps, steps)
    config: Any = SimpleNamespace(
        args=args, run_uri=str(folder), events=Queue(), data=SimpleNamespace(fingerprint="d"), schedule=plan,
        model_fingerprint="m", resume=None, resume_step=0,
    )  # fmt: skip
    store = CheckpointStore(config, Rank(rank, RANKS), rank, RANKS)
    resume, start, _ = store.resume_from()
    if rank == 0:
        with folder.with_suffix(".starts").open("a") as file:
            file.write(f"{start}\n")
    model = llama(attention_dropout=0.1)  # whose random numbers must come back
    torch.manual_seed(rank)
    collate = Collator(0)
    trainer = SftTrainer(
        model=model,
        args=hf_training_arguments(args, plan, RANKS, str(folder), "float32", False, False),
        processing_class=word_tokenizer(),
        loader=WithPlaces(collate([row(RANKS * step + rank)]) for step in range(start, steps)),
        schedule=plan,
        val_rows=None,
        rank=Rank(rank, RANKS),
        push=lambda event: None,
        kept=store.kept_steps(),
        save=store.save,
        settle=store.settle,
        wish=lambda: Wish.NOTHING,
        collate=collate,
    )
    if kill is not None and kill[0] == rank:
        plan_death(trainer, store, *kill[1:])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_final()


def plan_death(trainer: Any, store: Any, step: int, point: str) -> None:
    """Have this process killed at that point of that step."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Death(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                die()

    def around(owner: Any, name: str, before: bool, of_this: Callable[..., bool]) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            if before and of_this(*args):
                die()
            found = inner(*args, **options)
            if of_this(*args):
                die()
            return found

        setattr(owner, name, call)

    if point == "step":
        trainer.add_callback(Death())
    elif point == "note":
        around(store, "_begin", False, lambda name: name == f"checkpoint-{step}")
    elif point == "files":
        around(trainer, "_save", False, lambda folder, *_: folder.endswith(f"checkpoint-{step}"))
    else:
        around(store, "_finish", point == "manifest", lambda name, *_: name == f"checkpoint-{step}")


if __name__ == "__main__":
    main()
