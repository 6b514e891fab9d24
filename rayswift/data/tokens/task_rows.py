"""Rows of the tasks that tell numbers (``--task_type seq_cls``, ``embedding``, the rerankers): several texts a row, and
what is to be told of them.

Texts are laid out as in SWIFT: by the model's template up to where a reply starts, or with the reply that they end in;
with ``use_chat_template`` False as the tokenizer itself does it (as sentence-transformers does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayswift.data.chat.conversation import DropRow, Message
from rayswift.data.tokens.template_choice import LoadedTemplate, TemplateSettings, load_template, refuse_media

#: One text: a row as the template takes it.
TextRow = dict[str, Any]
#: The layout of Qwen3-Reranker: a document is judged by the answer to a question.
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class TextSettings(TemplateSettings):
    """What decides how texts become token ids, and what is told of them. Fields are SWIFT's flags of the same name.

    `max_length` in tokens, None is no limit.
    """

    max_length: int | None = None
    truncation_strategy: str = "delete"
    task_type: str = "causal_lm"
    num_labels: int | None = None
    problem_type: str | None = None

    @property
    def problem(self) -> str:
        """What the label of a `seq_cls` row is."""
        return self.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")


def task_texts(settings: TextSettings, row: Mapping[str, Any]) -> tuple[list[TextRow], list[float]]:
    """The texts of a row, and what is to be told: ``seq_cls`` its label (the numbers of several classes, or values);
    ``embedding`` anchor, positive, negatives, and how alike the first two are; rerankers each document, 1 for those
    that fit the query.

    Raises:
        DropRow: the row is none of this task.
    """
    refuse_media(row)
    if settings.task_type == "seq_cls":
        return [dict(row)], _label(settings, row.get("label"))
    positive, negative = (_conversations(row, f"{side}_messages") for side in ("positive", "negative"))
    messages = list(row["messages"])
    if settings.task_type == "embedding":
        if not positive and messages and messages[-1]["role"] == "assistant":  # query and response
            positive, messages = [[{"role": "user", "content": messages[-1]["content"]}]], messages[:-1]
        if not positive or not messages:
            raise DropRow("no positive_messages")
        like = row.get("label")
        if like is not None and not _is_number(like):
            raise DropRow(f"label {_short(like)}: how alike two texts are is a number")
        vectors = [messages, positive[0], *negative]
        return [{**row, "messages": text} for text in vectors], [1.0 if like is None else float(like)]
    if not positive:
        raise DropRow("no positive_messages")
    documents = [[*messages, *document] for document in (*positive, *negative)]
    ranked = [{**row, "messages": document} for document in documents]
    return ranked, [1.0] * len(positive) + [0.0] * len(negative)


def _conversations(row: Mapping[str, Any], name: str) -> list[list[Message]]:
    return [list(one) for one in row.get(name) or ()]


def _label(settings: TextSettings, label: Any) -> list[float]:
    if label is None:
        raise DropRow("no label")
    values = list(label) if isinstance(label, (list, tuple)) else [label]
    problem, count = settings.problem, settings.num_labels or 0
    if problem == "regression":
        if len(values) != count or not all(map(_is_number, values)):
            raise DropRow(f"label {_short(label)}: expected {count} number{'s' if count > 1 else ''} (--num_labels)")
        return [float(value) for value in values]
    if problem == "single_label_classification" and len(values) != 1:
        raise DropRow(f"label {_short(label)}: one class a row; several need --problem_type multi_label_classification")
    for value in values:
        if not _is_number(value) or value != int(value) or not 0 <= value < count:
            raise DropRow(f"label {_short(label)}: a class is a whole number from 0 to {count - 1} (--num_labels)")
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _short(label: Any) -> str:
    return repr(label)[:60]


def text_ids(settings: TextSettings, rows: Sequence[TextRow]) -> list[np.ndarray]:
    """The token ids of texts, uncut. Raises DropRow for one that cannot be laid out."""
    return encode_laid_out(settings, lay_out(settings, rows))


def lay_out(settings: TextSettings, rows: Sequence[TextRow]) -> list[Any]:
    """Texts as :func:`encode_laid_out` takes them. Raises DropRow for one that cannot be laid out."""
    if settings.task_type == "generative_reranker":
        rows = [judged(settings, row) for row in rows]
    if not settings.use_chat_template:
        return [_plain(settings, row) for row in rows]
    loaded = load_template(settings)
    return [_spans(loaded, row) for row in rows]


def encode_laid_out(settings: TextSettings, texts: Sequence[Any]) -> list[np.ndarray]:
    """The token ids of texts that were laid out, in one batch."""
    if not settings.use_chat_template:
        return [np.array(settings.tokenizer(*pair)["input_ids"], np.int32) for pair in texts]
    batch = load_template(settings).segments.batch()
    for spans in texts:
        batch.plan(spans)
    ids, _, offsets = batch.assemble()
    return np.split(ids, offsets[1:-1]) if len(texts) else []


def _spans(loaded: LoadedTemplate, row: TextRow) -> Any:
    messages = row["messages"]
    if messages and messages[-1]["role"] == "assistant":
        return loaded.render(row)[-1]
    return loaded.render_prompt(messages, row.get("tools"))


def _plain(settings: TextSettings, row: TextRow) -> list[str]:
    """The messages before a reply as one text, and the reply, if there is one, as a second."""
    messages = list(row["messages"])
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else settings.system
    replies = [messages.pop()["content"]] if len(messages) > 1 and messages[-1]["role"] == "assistant" else []
    texts = ["".join(message["content"] for message in messages), *replies]
    texts[0] = f"{system} {texts[0]}" if system else texts[0]
    if not any(texts):
        raise DropRow("the text is empty")
    return texts


def judged(settings: TextSettings, row: TextRow) -> TextRow:
    """Query and document as Qwen3-Reranker is asked about them; a system text is the instruction."""
    messages = list(row["messages"])
    instruction = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else INSTRUCTION
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DropRow("a document is judged behind a query: messages of user and assistant")
    query = "".join(message["content"] for message in messages[:-1])
    question = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {messages[-1]['content']}"
    system = [{"role": "system", "content": JUDGE if settings.system is None else settings.system}]
    return {**row, "messages": [*system, {"role": "user", "content": question}]}


def cut(settings: TextSettings, ids: np.ndarray) -> np.ndarray:
    """A text within ``--max_length``. Raises DropRow for one that is too long under truncation_strategy `delete`."""
    limit = settings.max_length
    if not len(ids):
        raise DropRow("the text is empty")
    if limit is None or len(ids) <= limit:
        return ids
    if settings.truncation_strategy == "delete":
        raise DropRow(f"longer than --max_length {limit}")
    return ids[:limit] if settings.truncation_strategy == "right" else ids[-limit:]
