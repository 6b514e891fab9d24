"""Rewards: how good an answer is, by rule. Used where answers are chosen (`rayswift sample`) or trained on.

In: a conversation that ends with the answer, and the dataset's own answer. Out: one number for each.

- ``registry``: the names of ``--orm_model`` and ``--prm_model``, SWIFT's and those of ``--external_plugins``, and how a
  reward is called.
- ``outcome``: the rewards that come with RaySwift. ``maths``: finding and comparing answers to maths questions.

A plugin file registers its own, as for SWIFT (whose plugins need the import changed, nothing else):

    from rayswift.rewards import ORM, orms

    class Short(ORM):
        def __call__(self, completions, **kwargs) -> list[float]:
            return [1.0 if len(text) < 200 else 0.0 for text in completions]

    orms["short"] = Short
"""

from rayswift.rewards import outcome
from rayswift.rewards.registry import ORM, PRM, InferRequest, Reward, RewardFunction, make_reward, orms, prms

__all__ = ["ORM", "PRM", "InferRequest", "Reward", "RewardFunction", "make_reward", "orms", "prms"]

orms.update(outcome.NAMES)
