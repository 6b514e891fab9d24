"""The train flow: arguments → Ray Data → ``TorchTrainer`` → run directory.

In: a :class:`~rayswift.arguments.PretrainArguments` or :class:`~rayswift.arguments.SftArguments`.
Out: a run directory with whole checkpoints (``checkpoints.py``), ``logging.jsonl`` and plots (``progress.py``).
``driver.py`` reads top to bottom; ``worker.py`` is what runs on every worker.
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
