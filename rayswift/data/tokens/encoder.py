"""Standard rows to token ids and labels: template, loss mask, length limit.

:class:`Encoder` is a set of plain settings: it can be sent to any process, and each process loads the tokenizer once,
at first use. Rows are encoded by the batch; one row in, one or more :class:`Encoded` or one :class:`Dropped` out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from rayswift.data.chat.conversation import DropRow, Message
from rayswift.data.rows.columns import MEDIA
from rayswift.data.rows.messages import prompt_of
from rayswift.data.tokens.task_rows import TextSettings, cut, encode_laid_out, lay_out, task_texts
from rayswift.data.tokens.template_choice import load_template, one_of
from rayswift.errors import UserError

TRUNCATION_STRATEGIES = ("delete", "left", "right", "split")
#: Label of a token that is not trained (the index that PyTorch's cross entropy ignores).
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sample. `input_ids` and `labels`: int32, shape (tokens,); `labels` is −100 where not trained,
    always at the first token. `row`: index of the row in the batch it came from. `loss_scale`: float32, shape
    (tokens,), the weight of each token, 0 where not trained; None where every weight is 0 or 1. `rejected_start`: of a
    pair, where the conversation with the rejected answer begins; None for a row that is no pair. `text_ends` and
    `targets`: of a task that tells numbers, where each text ends (int32) and what is to be told (float32)."""

    input_ids: np.ndarray
    labels: np.ndarray
    row: int = 0
    loss_scale: np.ndarray | None = None
    rejected_start: int | None = None
    text_ends: np.ndarray | None = None
    targets: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that gives no sample, and why. `row`: its index in the batch."""

    reason: str
    row: int = 0


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The samples of a batch, one after the other in flat arrays.

    `input_ids`, `labels` (int32, −100 where not trained) and `loss_scale` (float32; None where every weight is 0 or 1):
    shape (tokens,). `offsets`: int64, shape (samples + 1,); sample i is `input_ids[offsets[i] : offsets[i + 1]]`.
    `rows`: int64, shape (samples,), the row each sample came from, ascending. `dropped`: the other rows, ascending.
    `rejected_starts`: int32, shape (samples,), where in each pair the rejected conversation begins; None without pairs.
    `text_ends`, `targets`: of each sample, as in :class:`Encoded`; None where text is trained.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    loss_scale: np.ndarray | None
    offsets: np.ndarray
    rows: np.ndarray
    dropped: tuple[Dropped, ...]
    rejected_starts: np.ndarray | None = None
    text_ends: list[np.ndarray] | None = None
    targets: list[np.ndarray] | None = None

    def sample(self, number: int) -> slice:
        """Where in the flat arrays a sample is."""
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))


@dataclass(frozen=True)
class Encoder(TextSettings):
    """Encodes standard rows for training and messages for generation. Fields are SWIFT's flags of the same name.

    `max_length` in tokens, None is no limit. `preference`: each row is a pair: its conversation, then the one that
    ends in the rejected answer, each within `max_length`, which cuts both at the same place. Another `task_type` than
    `causal_lm`: each row is some texts (:mod:`rayswift.data.tokens.task_rows`), each within `max_length`.

    Raises:
        UserError: a setting has no such value; the message names flag and choices.
    """

    preference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("--truncation_strategy", self.truncation_strategy, TRUNCATION_STRATEGIES)
        if self.preference and self.truncation_strategy == "split":
            raise UserError("--truncation_strategy split: a pair cannot be split; use delete, left or right")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length {self.max_length}: a sample needs at least 2 tokens")

    @classmethod
    def from_args(cls, args: Any, model_dir: str, *, max_length: int | None = None) -> Encoder:
        """The encoder that a command's template flags describe.

        Args:
            args: the command's arguments.
            model_dir: the model's local folder.
            max_length: the limit where ``--max_length`` is not given.
        """
        given = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
        return cls(**{**given, "model_dir": model_dir, "max_length": args.max_length or max_length})

    @classmethod
    def for_training(cls, args: Any, model_dir: str) -> Encoder:
        """As :meth:`from_args`; without ``--max_length`` the model's configuration says what fits (SWIFT's default)."""
        from rayswift.modeling.loading import read_config
        from rayswift.modeling.positions import longest

        encoder = cls.from_args(args, model_dir, max_length=longest(read_config(model_dir), args.positions))
        encoder = replace(encoder, preference=args.command == "rlhf" or getattr(args, "template_mode", None) == "rlhf")
        if encoder.task_type == "generative_reranker" and encoder.enable_thinking is None:
            encoder = replace(encoder, enable_thinking=False)  # the judge answers at once
        return encoder

    def settings(self) -> dict[str, Any]:
        """The settings by name, as hashes and files hold them: there `preference` is `pairs`, its name before."""
        values = asdict(self)
        if self.template_date is None:  # as caches of earlier versions have it
            del values["template_date"]
        values["pairs"] = values.pop("preference")
        if self.task_type == "causal_lm":  # whose caches know of no other task
            for name in ("task_type", "num_labels", "problem_type"):
                del values[name]
        return values

    def encode_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded | Dropped]:
        """Encode standard rows.

        Returns:
            In row order, with `row` set: for each row one :class:`Encoded` (several under truncation_strategy
            `split`) or one :class:`Dropped`. No row is left out.
        """
        batch = self.encode_columns(rows)
        samples: list[Encoded | Dropped] = list(batch.dropped)
        for number, row in enumerate(batch.rows.tolist()):
            part = batch.sample(number)
            scale = None if batch.loss_scale is None else batch.loss_scale[part]
            if scale is not None and _is_binary(scale):
                scale = None
            rejected = None if batch.rejected_starts is None else int(batch.rejected_starts[number])
            ends, targets = (None if column is None else column[number] for column in (batch.text_ends, batch.targets))
            samples.append(Encoded(batch.input_ids[part], batch.labels[part], row, scale, rejected, ends, targets))
        if batch.dropped:
            samples.sort(key=lambda sample: sample.row)
        return samples

    def encode_columns(self, rows: Sequence[Mapping[str, Any]]) -> EncodedBatch:
        """Encode standard rows to flat arrays: each row is in `rows` (several times under truncation_strategy `split`)
        or in `dropped`."""
        if self.task_type != "causal_lm":
            return self._encode_texts(rows)
        return self._encode_pairs(rows) if self.preference else self._encode(rows)

    def _encode_texts(self, rows: Sequence[Mapping[str, Any]]) -> EncodedBatch:
        """The texts of each row one after the other; a row one of whose texts is dropped is dropped."""
        reasons: dict[int, str] = {}
        laid_out: dict[int, tuple[list[Any], list[float]]] = {}
        for number, row in enumerate(rows):
            try:
                texts, wanted = task_texts(self, row)
                laid_out[number] = lay_out(self, texts), wanted
            except DropRow as refused:
                reasons[number] = refused.reason
        found = iter(encode_laid_out(self, [text for texts, _ in laid_out.values() for text in texts]))
        kept: dict[int, list[np.ndarray]] = {}
        for number, (texts, _) in laid_out.items():
            whole = [next(found) for _ in texts]
            try:
                kept[number] = [cut(self, ids) for ids in whole]
            except DropRow as refused:
                reasons[number] = refused.reason
        ends = [np.cumsum([len(ids) for ids in texts]).astype(np.int32) for texts in kept.values()]
        input_ids = np.concatenate([np.zeros(0, np.int32), *(ids for texts in kept.values() for ids in texts)])
        return EncodedBatch(
            input_ids,
            np.full(len(input_ids), IGNORED, np.int32),
            None,
            np.cumsum([0, *(one[-1] for one in ends)]).astype(np.int64),
            np.array(list(kept), np.int64),
            tuple(Dropped(reasons[number], number) for number in sorted(reasons)),
            text_ends=ends,
            targets=[np.array(laid_out[number][1], np.float32) for number in kept],
        )

    def _encode_pairs(self, rows: Sequence[Mapping[str, Any]]) -> EncodedBatch:
        """Both conversations of each row in one sample; a row whose one side is dropped is dropped."""
        chosen, rejected = self._encode(rows), self._encode(rows, _rejected_row)
        reasons = {drop.row: f"rejected answer: {drop.reason}" for drop in rejected.dropped}
        reasons |= {drop.row: drop.reason for drop in chosen.dropped}
        kept: list[int] = []
        sides: list[tuple[EncodedBatch, slice]] = []
        for row, *places in zip(*np.intersect1d(chosen.rows, rejected.rows, return_indices=True), strict=True):
            pair = [(chosen, chosen.sample(places[0])), (rejected, rejected.sample(places[1]))]
            if reason := self._cut_pair(pair):
                reasons[int(row)] = reason
            else:
                kept.append(int(row))
                sides += pair
        sizes = np.array([part.stop - part.start for _, part in sides], dtype=np.int64).reshape(-1, 2)
        nothing = np.zeros(0, np.int32)
        return EncodedBatch(
            np.concatenate([nothing, *(side.input_ids[part] for side, part in sides)]),
            np.concatenate([nothing, *(side.labels[part] for side, part in sides)]),
            # A preference is about whole answers: no method weighs their tokens.
            None,
            np.concatenate([[0], np.cumsum(sizes.sum(axis=1))]).astype(np.int64),
            np.array(kept, dtype=np.int64),
            tuple(Dropped(reasons[row], row) for row in sorted(reasons)),
            sizes[:, 0].astype(np.int32),
        )

    def _cut_pair(self, pair: list[tuple[EncodedBatch, slice]]) -> str:
        """Cut a pair's sides to `max_length`, where needed; why that cannot be, or "".

        At the left both sides lose what the longer one has too much, of what they share: they keep the same prompt.
        """
        sizes = [part.stop - part.start for _, part in pair]
        cut = max(sizes) - self.max_length if self.max_length is not None else 0
        if cut <= 0:
            return ""
        assert self.max_length is not None
        if self.truncation_strategy == "delete":
            side = "" if sizes[0] > self.max_length else "rejected answer: "
            return f"{side}longer than --max_length {self.max_length}"
        if self.truncation_strategy == "left":
            first, second = (batch.input_ids[part][: min(sizes)] for batch, part in pair)
            if cut >= np.append(first == second, False).argmin():
                return f"longer than --max_length {self.max_length}, even without the prompt that both answers share"
        for number, (batch, part) in enumerate(pair):
            start = part.start + (cut if self.truncation_strategy == "left" else 0)
            pair[number] = batch, slice(start, min(part.stop, start + self.max_length))
            batch.labels[start] = IGNORED
            if (batch.labels[pair[number][1]] == IGNORED).all():
                return "no trained token is left within --max_length"
        return ""

    def _encode(
        self, rows: Sequence[Mapping[str, Any]], side: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    ) -> EncodedBatch:
        loaded = load_template(self)
        batch = loaded.segments.batch()
        kept: list[int] = []
        dropped: list[Dropped] = []
        for index, row in enumerate(rows):
            try:
                samples = loaded.render(side(row) if side else row)
                # A pair is about the answers that differ, which come last.
                for spans in samples[-1:] if self.preference else samples:
                    batch.plan(spans)
                    kept.append(index)
            except DropRow as refused:
                dropped.append(Dropped(refused.reason, index))
        ids, weights, offsets = batch.assemble()
        return self._limit(ids, weights, offsets, np.array(kept, dtype=np.int64), dropped)

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Token ids of a conversation for generation, up to where the reply starts.

        The ids are those of training (earlier rounds without their thoughts, for templates that think). A
        conversation that ends with an assistant message is continued at its end.

        Raises:
            UserError: the messages cannot be a conversation of this template.
        """
        loaded = load_template(self)
        try:
            spans = loaded.render_prompt(messages, tools)
        except DropRow as refused:
            raise UserError(f"these messages cannot be a prompt: {refused.reason}") from None
        batch = loaded.segments.batch()
        batch.plan(spans)
        ids: list[int] = batch.assemble()[0].tolist()
        return ids

    def describe(self, encoded: Encoded) -> list[str]:
        """The sample as SWIFT logs its first one: `[INPUT_IDS]`, `[INPUT]`, `[LABELS_IDS]`, `[LABELS]`; of a pair both
        sides, `[CHOSEN_INPUT_IDS]` and so on."""
        if encoded.rejected_start is not None:
            cut = encoded.rejected_start
            sides = {"CHOSEN": slice(cut), "REJECTED": slice(cut, None)}
            return [f"[{side}_{line[1:]}" for side, part in sides.items()
                    for line in self.describe(Encoded(encoded.input_ids[part], encoded.labels[part]))]  # fmt: skip
        ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=False)
        if encoded.text_ends is not None and encoded.targets is not None:
            texts = [text.tolist() for text in np.split(encoded.input_ids, encoded.text_ends[:-1])]
            lines = [line for text in texts for line in (f"[INPUT_IDS] {text}", f"[INPUT] {decode(text)}")]
            return [*lines, f"[LABELS] {encoded.targets.tolist()}"]
        shown, start = "", 0
        for end in range(1, len(labels) + 1):
            if end == len(labels) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
                shown += f"[-100 * {end - start}]" if labels[start] == IGNORED else decode(labels[start:end])
                start = end
        return [f"[INPUT_IDS] {ids}", f"[INPUT] {decode(ids)}", f"[LABELS_IDS] {labels}", f"[LABELS] {shown}"]

    def _limit(
        self, ids: np.ndarray, weights: np.ndarray, offsets: np.ndarray, rows: np.ndarray, dropped: list[Dropped]
    ) -> EncodedBatch:
        """Apply `--max_length`; samples without a trained token are not samples."""
        limit = None if self.preference else self.max_length  # the sides of a pair are cut together
        starts, ends = offsets[:-1], offsets[1:]
        too_long = np.zeros(len(rows), dtype=bool) if limit is None else ends - starts > limit
        if limit is not None and too_long.any():
            starts, ends, rows, cut = _spans_within(self.truncation_strategy, limit, starts, ends, rows, too_long)
            # A row that gives several samples is in the result as long as one of them fits.
            gone = sorted(set(cut.tolist()) - set(rows.tolist()))
            dropped += [Dropped(f"longer than --max_length {limit}", row) for row in gone]
        weights[starts[starts < ends]] = 0.0
        trained = np.concatenate([[0], np.cumsum(weights > 0)])
        useful = trained[ends] > trained[starts]
        if not useful.all():
            long_rows, left = set(np.flatnonzero(too_long).tolist()), set(rows[useful].tolist())
            for row in dict.fromkeys(rows[~useful].tolist()):
                if row not in left:
                    cut_off = row in long_rows
                    dropped.append(Dropped("no trained token is left within --max_length" if cut_off else
                                           "no trained token", row))  # fmt: skip
            starts, ends, rows = starts[useful], ends[useful], rows[useful]
        sizes = ends - starts
        sample_ends = np.cumsum(sizes)
        if len(ids) != sizes.sum():
            token = np.arange(sizes.sum()) + np.repeat(starts - (sample_ends - sizes), sizes)
            ids, weights = ids[token], weights[token]
        labels = np.where(weights > 0, ids, np.int32(IGNORED))
        scale = None if _is_binary(weights) else weights
        new_offsets = np.concatenate([[0], sample_ends]).astype(np.int64)
        return EncodedBatch(ids, labels, scale, new_offsets, rows, tuple(sorted(dropped, key=lambda drop: drop.row)))


def _rejected_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row as a conversation that ends in the rejected answer. Raises DropRow if it has none."""
    messages = row.get("rejected_messages")
    if messages is None and row.get("rejected_response") is not None:
        messages = [*prompt_of(row["messages"]), {"role": "assistant", "content": row["rejected_response"]}]
    if messages is None:
        raise DropRow("no rejected_response and no rejected_messages")
    own = {key: row.get(f"rejected_{key}", row.get(key)) for key in ("tools", *MEDIA)}
    return {"messages": messages, "chat_template_kwargs": row.get("chat_template_kwargs"), **own}


def _spans_within(
    strategy: str, limit: int, starts: np.ndarray, ends: np.ndarray, rows: np.ndarray, too_long: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Samples of at most `limit` tokens: their starts, ends and rows, and the rows that are deleted."""
    none = rows[:0]
    if strategy == "delete":
        return starts[~too_long], ends[~too_long], rows[~too_long], rows[too_long]
    if strategy == "right":
        return starts, np.minimum(ends, starts + limit), rows, none
    if strategy == "left":
        return np.maximum(starts, ends - limit), ends, rows, none
    chunks = np.maximum(-(-(ends - starts) // limit), 1)
    number = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    first = np.repeat(starts, chunks) + number * limit
    return first, np.minimum(first + limit, np.repeat(ends, chunks)), np.repeat(rows, chunks), none


def _is_binary(weights: np.ndarray) -> bool:
    return bool(((weights == 0) | (weights == 1)).all())
