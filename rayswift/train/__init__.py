"""The train flow: arguments → Ray Data → ``TorchTrainer`` → run directory.

In: :class:`~rayswift.arguments.PretrainArguments`, :class:`~rayswift.arguments.SftArguments` or
:class:`~rayswift.arguments.RlhfArguments`.
Out: a run directory with whole checkpoints (``checkpoints/``), ``logging.jsonl`` and plots (``progress.py``).
``driver.py`` reads top to bottom; ``config.py`` is what travels to the workers; ``worker.py`` is what runs on each.
"""

from __future__ import annotations

from typing import Any


def pretrain(args: Any) -> dict[str, Any]:
    """``rayswift pt``: continued pre-training. Returns the run's outcome (see :func:`rayswift.train.driver.train`)."""
    from rayswift.train.driver import train

    return train(args)


def sft(args: Any) -> dict[str, Any]:
    """``rayswift sft``: supervised fine-tuning. Returns the run's outcome."""
    from rayswift.train.driver import train

    return train(args)


def rlhf(args: Any) -> dict[str, Any]:
    """``rayswift rlhf``: preference training. Returns the run's outcome.

    Raises:
        UserError: a method that is not built yet.
    """
    from rayswift.errors import UserError

    if args.rlhf_type != "dpo":
        raise UserError(f"--rlhf_type {args.rlhf_type}: not built yet; your arguments are fine. Built so far: dpo")
    from rayswift.train.driver import train

    return train(args)
