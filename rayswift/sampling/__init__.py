"""``rayswift sample``: many answers to each prompt, scored, the best kept as rows for ``sft`` and ``rlhf``.

In: a dataset of prompts, an engine, rewards. Out: one file of rows. It goes through here from top to bottom:
``prompts`` (rows, earlier answers) → ``engines`` (who answers) → ``rayswift.journal`` (what is there already) →
``scoring`` (rewards, by rule, by a judge or by a reward model) → ``choice`` (the best and the worst) → ``output``.
"""

from rayswift.sampling.run import sample

__all__ = ["sample"]
