"""How the next token of an answer is chosen: penalties, temperature, cuts, a seed of its own, log probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayswift.generate.constraints import Constraint

#: Below this temperature sampling would only divide by almost nothing (vLLM's bound).
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampling:
    """OpenAI's sampling parameters and the usual further ones. ``top_k`` 0 is no limit; ``logprobs``: how many
    alternatives to note with each token, None for no log probabilities; ``index``: which of ``n`` choices this is.

    ``stop_ids`` end the answer, before ``min_tokens`` they are not chosen. ``allowed_ids``: the only tokens that may
    come, None for all; ``banned``: token sequences that must not. ``constraint`` is of this one answer. ``keep_stop``:
    the text ends with what stopped it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    index: int = 0
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    allowed_ids: tuple[int, ...] | None = None
    banned: tuple[tuple[int, ...], ...] = ()
    constraint: Constraint | None = None
    keep_stop: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def adjusts(self) -> bool:
        """Whether scores change before temperature and cuts."""
        changes = self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(changes) or self.limits

    @property
    def limits(self) -> bool:
        """Whether some tokens must not come."""
        return bool(self.allowed_ids is not None or self.banned or self.constraint or self.min_tokens)


class Choice(NamedTuple):
    """A token. ``logprobs``: (token, log probability) of itself and then of the likeliest ones, where asked for."""

    token: int
    logprobs: list[tuple[int, float]] = []  # noqa: RUF012


#: Row of the scores, its sampling, its prompt and what it has generated.
Asked = tuple[int, Sampling, list[int], list[int]]


def choose_tokens(asked: Sequence[Asked], scores: Any) -> list[Choice]:
    """The next token of each row of ``scores`` (float32, shape (rows, vocabulary)) that is asked for.

    Log probabilities are those of the model, before penalties and temperature.
    """
    best = scores.argmax(dim=-1).tolist()  # one wait for the device, for all rows that only want this
    choices = []
    for index, sampling, prompt, generated in asked:
        row = scores[index]
        token = best[index]
        if sampling.adjusts or not sampling.greedy:
            token = _choose(sampling, prompt, generated, row)
        choices.append(Choice(token, _logprobs(row, token, sampling.logprobs)))
    return choices


def _choose(sampling: Sampling, prompt: list[int], generated: list[int], scores: Any) -> int:
    import torch

    scores = _adjusted(sampling, prompt, generated, scores)
    if sampling.limits:
        scores = _limited(sampling, generated, scores)
    if sampling.greedy:
        return int(scores.argmax())
    scores = _cut(sampling, scores)
    generator = None
    if sampling.seed is not None:
        # A seed for every token: an answer that goes on in another process draws what it would have drawn here.
        seed = hash((sampling.seed, sampling.index, len(generated)))  # of integers: the same in every process
        generator = torch.Generator(device=scores.device).manual_seed(seed & (2**63 - 1))
    return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator))


def _adjusted(sampling: Sampling, prompt: list[int], generated: list[int], scores: Any) -> Any:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor([prompt + generated], device=scores.device)
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores[None])[0]
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = torch.bincount(torch.tensor(generated, device=scores.device), minlength=len(scores))
        scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    if sampling.logit_bias:
        scores = scores.clone()
        places = torch.tensor(list(sampling.logit_bias), device=scores.device)
        scores[places] += torch.tensor(list(sampling.logit_bias.values()), device=scores.device)
    return scores


def _limited(sampling: Sampling, generated: list[int], scores: Any) -> Any:
    """Scores with those of the tokens that must not come now at −inf."""
    import torch

    if sampling.constraint is not None:
        scores = sampling.constraint.allow(generated, scores)
    if sampling.allowed_ids is not None:
        places = torch.tensor(sampling.allowed_ids, device=scores.device)
        scores = torch.full_like(scores, -torch.inf).scatter(0, places, scores[places])
    never = [word[-1] for word in sampling.banned if generated[len(generated) - len(word) + 1 :] == list(word[:-1])]
    if len(generated) < sampling.min_tokens:
        never += sampling.stop_ids
    if never:
        scores = scores.index_fill(0, torch.tensor(never, device=scores.device), -torch.inf)
    return scores


def _cut(sampling: Sampling, scores: Any) -> Any:
    """Scores at this temperature, without the tokens that must not be drawn."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = (scores / sampling.temperature)[None]
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p > 0.0:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)  # type: ignore[arg-type]
    return scores[0]


def _logprobs(scores: Any, token: int, top: int | None) -> list[tuple[int, float]]:
    if top is None:
        return []
    logprobs = scores.log_softmax(dim=-1)
    likeliest = logprobs.topk(min(top, len(scores)))
    return [
        (token, float(logprobs[token])),
        *zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True),
    ]
