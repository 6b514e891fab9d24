"""How good answers are against their references: SWIFT's ``--metric acc`` and ``--metric rouge``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

from rayswift.errors import UserError
from rayswift.generate.types import JsonRow

_ROUGE_PACKAGES = ("jieba", "nltk", "rouge")


def check_metric(metric: str | None) -> None:
    """UserError when the packages of a metric are missing, before any answer is generated."""
    missing = [name for name in _ROUGE_PACKAGES if importlib.util.find_spec(name) is None]
    if metric == "rouge" and missing:
        raise UserError(f"--metric rouge needs {', '.join(missing)}: pip install 'rayswift[metrics]'")


def score(results: Sequence[JsonRow], metric: str) -> dict[str, float | None]:
    """The scores of the rows that have a reference; a row without an answer counts as a wrong one."""
    pairs = [(row["response"], row["labels"]) for row in results if row["labels"] is not None]
    return {"acc": exact_match(pairs)} if metric == "acc" else rouge(pairs)


def exact_match(pairs: Sequence[tuple[Any, Any]]) -> float | None:
    """Share of the responses that equal their reference, outer white space aside."""
    equal = [str(response).strip() == str(reference).strip() for response, reference in pairs]
    return round(sum(equal) / len(equal), 6) if equal else None


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float | None]:
    """ROUGE F-scores and BLEU-4 in percent over the words that jieba finds (Chinese and English), averaged over rows.

    As in SWIFT, except that an empty response counts as 0 instead of being left out.
    """
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge import Rouge

    jieba.setLogLevel(logging.WARNING)
    names = ("rouge-1", "rouge-2", "rouge-l")
    totals = dict.fromkeys((*names, "bleu-4"), 0.0)
    count = 0
    for response, reference in pairs:
        said, wanted = ([word for word in jieba.cut(text) if word.strip()] for text in (response, reference))
        if not wanted:
            continue
        count += 1
        if not said:
            continue
        found = Rouge().get_scores(" ".join(said), " ".join(wanted))[0]
        for name in names:
            totals[name] += found[name]["f"]
        totals["bleu-4"] += sentence_bleu([wanted], said, smoothing_function=SmoothingFunction().method3)
    return {name: round(100 * total / count, 6) if count else None for name, total in totals.items()}
