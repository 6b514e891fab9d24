"""Standard rows to token ids and labels: template, loss mask, length limit.

:class:`Encoder` is a set of plain settings: it can be sent to any process, and each process loads the tokenizer once,
at first use. Rows are encoded by the batch; one row in, one or more :class:`Encoded` or one :class:`Dropped` out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from rayswift.data.chat.agents import AgentFormat, get_agent_format
from rayswift.data.chat.conversation import DropRow, Message, read_conversation
from rayswift.data.chat.families import (
    Piece,
    RenderOptions,
    Template,
    adds_bos,
    get_template,
    match_template,
    render_bare,
)
from rayswift.data.chat.jinja import JinjaTemplate
from rayswift.data.chat.loss_weights import read_loss_scale
from rayswift.data.tokens.segments import CONTENT_TAG, SegmentTokenizer
from rayswift.errors import UserError

logger = logging.getLogger("rayswift.data.tokens.encoder")

TRUNCATION_STRATEGIES = ("delete", "left", "right", "split")
#: Label of a token that is not trained (the index that PyTorch's cross entropy ignores).
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sample. `input_ids` and `labels`: int32, shape (tokens,); `labels` is −100 where not trained,
    always at the first token. `row`: index of the row in the batch it came from. `loss_scale`: float32, shape
    (tokens,), the weight of each token, 0 where not trained; None where every weight is 0 or 1. `rejected_start`: of a
    pair, where the conversation with the rejected answer begins; None for a row that is no pair."""

    input_ids: np.ndarray
    labels: np.ndarray
    row: int = 0
    loss_scale: np.ndarray | None = None
    rejected_start: int | None = None


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
    """

    input_ids: np.ndarray
    labels: np.ndarray
    loss_scale: np.ndarray | None
    offsets: np.ndarray
    rows: np.ndarray
    dropped: tuple[Dropped, ...]
    rejected_starts: np.ndarray | None = None

    def sample(self, number: int) -> slice:
        """Where in the flat arrays a sample is."""
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))


@dataclass(frozen=True)
class Encoder:
    """Encodes standard rows for training and messages for generation. Fields are SWIFT's flags of the same name.

    `template`: a family of `families.json`, or None/"auto": the family whose layout equals the tokenizer's own chat
    template, else that chat template itself. `template_backend`: `jinja` takes the chat template in any case.
    `use_chat_template` False: bos, the bare texts, eos. `max_length` in tokens, None is no limit. `agent_template`: a
    format of `agents.json` for tools and tool messages, None is the template's own. `pairs`: each row is a pair:
    its conversation, then the one that ends in the rejected answer, each within `max_length`.

    Raises:
        UserError: a setting has no such value; the message names flag and choices.
    """

    model_dir: str
    template: str | None = None
    system: str | None = None
    max_length: int | None = None
    truncation_strategy: str = "delete"
    use_chat_template: bool = True
    loss_scale: str = "default"
    enable_thinking: bool | None = None
    add_non_thinking_prefix: bool = True
    template_backend: str = "swift"
    response_prefix: str | None = None
    new_special_tokens: tuple[str, ...] = ()
    trust_remote_code: bool = False
    agent_template: str | None = None
    pairs: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_dir", str(self.model_dir))
        object.__setattr__(self, "new_special_tokens", tuple(self.new_special_tokens))
        _one_of("--truncation_strategy", self.truncation_strategy, TRUNCATION_STRATEGIES)
        _one_of("--template_backend", self.template_backend, ("swift", "jinja"))
        read_loss_scale(self.loss_scale)
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length {self.max_length}: a sample needs at least 2 tokens")
        if self.template not in (None, "auto"):
            get_template(self.template)
        if self.agent_template is not None:
            get_agent_format(self.agent_template)

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

        encoder = cls.from_args(args, model_dir, max_length=read_config(model_dir).get("max_position_embeddings"))
        return replace(encoder, pairs=args.command == "rlhf" or getattr(args, "template_mode", None) == "rlhf")

    # --- what the tokenizer and the template say ----------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with `new_special_tokens` added."""
        return _load(self).tokenizer

    @property
    def template_name(self) -> str:
        """Name of the family in use; `jinja` for the model's own chat template, `bare` for none."""
        return _load(self).name

    @property
    def stop_words(self) -> list[str]:
        """Texts at which generation stops."""
        return list(_load(self).stop_words)

    @property
    def eos_token_ids(self) -> list[int]:
        """Token ids at which generation stops: the tokenizer's eos, and what ends a trained reply or is a stop word, if
        that is one special token."""
        loaded = _load(self)
        words = [loaded.segments.split_literal(word) for word in loaded.ends]
        ids = [parts[0] for parts in words if len(parts) == 1 and isinstance(parts[0], int)]
        eos = [] if loaded.tokenizer.eos_token_id is None else [loaded.tokenizer.eos_token_id]
        return list(dict.fromkeys([*eos, *(i for i in ids if isinstance(i, int))]))

    @property
    def stop_strings(self) -> list[str]:
        """The ends that are not one special token and so have to be looked for in the text."""
        loaded = _load(self)
        parts = {word: loaded.segments.split_literal(word) for word in loaded.ends}
        return [word for word, split in parts.items() if len(split) != 1 or isinstance(split[0], str)]

    @property
    def takes_tools(self) -> bool:
        """Whether tools and tool messages have a format."""
        return _load(self).agent is not None

    @property
    def call_end(self) -> str:
        """What ends a tool call whose result follows in the same turn (``Observation:``); empty for other formats."""
        agent = _load(self).agent
        return agent.calls_end if agent is not None and agent.result_place == "reply" else ""

    # --- encoding -----------------------------------------------------------------------------------------------

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
            samples.append(Encoded(batch.input_ids[part], batch.labels[part], row, scale, rejected))
        if batch.dropped:
            samples.sort(key=lambda sample: sample.row)
        return samples

    def encode_columns(self, rows: Sequence[Mapping[str, Any]]) -> EncodedBatch:
        """Encode standard rows to flat arrays: each row is in `rows` (several times under truncation_strategy `split`)
        or in `dropped`."""
        return self._encode_pairs(rows) if self.pairs else self._encode(rows)

    def _encode_pairs(self, rows: Sequence[Mapping[str, Any]]) -> EncodedBatch:
        """Both conversations of each row in one sample; a row whose one side is dropped is dropped."""
        chosen, rejected = self._encode(rows), self._encode(rows, _rejected_row)
        kept, chosen_places, rejected_places = np.intersect1d(chosen.rows, rejected.rows, return_indices=True)
        places = zip(map(chosen.sample, chosen_places), map(rejected.sample, rejected_places), strict=True)
        sides = [side for first, second in places for side in ((chosen, first), (rejected, second))]
        sizes = np.array([part.stop - part.start for _, part in sides], dtype=np.int64).reshape(-1, 2)
        nothing = np.zeros(0, np.int32)
        reasons = {drop.row: Dropped(f"rejected answer: {drop.reason}", drop.row) for drop in rejected.dropped}
        reasons |= {drop.row: drop for drop in chosen.dropped}
        return EncodedBatch(
            np.concatenate([nothing, *(side.input_ids[part] for side, part in sides)]),
            np.concatenate([nothing, *(side.labels[part] for side, part in sides)]),
            # A preference is about whole answers: no method weighs their tokens.
            None,
            np.concatenate([[0], np.cumsum(sizes.sum(axis=1))]).astype(np.int64),
            kept,
            tuple(reasons[row] for row in sorted(reasons)),
            sizes[:, 0].astype(np.int32),
        )

    def _encode(
        self, rows: Sequence[Mapping[str, Any]], side: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    ) -> EncodedBatch:
        loaded = _load(self)
        batch = loaded.segments.batch()
        kept: list[int] = []
        dropped: list[Dropped] = []
        for index, row in enumerate(rows):
            try:
                batch.plan(_render(loaded, side(row) if side else row))
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
        loaded = _load(self)
        try:
            conversation = read_conversation(messages, tools, loaded.agent)
            if loaded.prompt_template is None:
                pieces = render_bare(conversation, loaded.options, loaded.bos, "")
            else:
                pieces = loaded.prompt_template.render_prompt(conversation, loaded.options)
        except DropRow as refused:
            raise UserError(f"these messages cannot be a prompt: {refused.reason}") from None
        batch = loaded.segments.batch()
        batch.plan(pieces)
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
        limit = self.max_length
        starts, ends = offsets[:-1], offsets[1:]
        too_long = np.zeros(len(rows), dtype=bool) if limit is None else ends - starts > limit
        if limit is not None and too_long.any():
            starts, ends, rows, cut = _spans_within(self.truncation_strategy, limit, starts, ends, rows, too_long)
            dropped += [Dropped(f"longer than --max_length {limit}", row) for row in cut.tolist()]
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
        messages = [*row["messages"][:-1], {**row["messages"][-1], "content": row["rejected_response"]}]
    if messages is None:
        raise DropRow("no rejected_response and no rejected_messages")
    return {"messages": messages, "tools": row.get("rejected_tools", row.get("tools"))}


def _render(loaded: _Loaded, row: Mapping[str, Any]) -> list[Piece]:
    options = loaded.options
    conversation = read_conversation(row.get("messages") or (), row.get("tools"), loaded.agent)
    if options.scale.base != "all":
        conversation = conversation.without_trailing_query()
        if not conversation.rounds:
            raise DropRow("no assistant message")
    if loaded.template is None:
        return render_bare(conversation, options, loaded.bos, loaded.eos)
    return loaded.template.render(conversation, options)


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


def _one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{flag} {value}: choose one of {', '.join(choices)}")


# --- per process ------------------------------------------------------------------------------------------------


@dataclass
class _Loaded:
    """What an encoder needs at work; `template` None is bare mode. `prompt_template` lays out generation prompts."""

    tokenizer: Any
    template: Template | JinjaTemplate | None
    prompt_template: Template | JinjaTemplate | None
    segments: SegmentTokenizer
    bos: str
    eos: str
    agent: AgentFormat | None
    options: RenderOptions

    @property
    def name(self) -> str:
        return self.template.name if self.template else "bare"

    @property
    def stop_words(self) -> tuple[str, ...]:
        return self.template.stop_words if self.template else ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The stop words, and what ends a trained reply."""
        suffix = self.template.suffix if isinstance(self.template, Template) else ""
        return tuple(dict.fromkeys([*self.stop_words, *filter(None, [suffix])]))


# A server asks with an encoder per adapter and thinking mode.
@functools.lru_cache(maxsize=128)
def _load(encoder: Encoder) -> _Loaded:
    """Tokenizer and template of these settings; equal encoders in one process share them."""
    tokenizer = _load_tokenizer(encoder.model_dir, encoder.new_special_tokens, encoder.trust_remote_code)
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    template = _choose_template(encoder, tokenizer) if encoder.use_chat_template else None
    prompt_template = template
    if isinstance(template, Template) and template.own_prompt and tokenizer.chat_template:
        prompt_template = _jinja(tokenizer)
    options = RenderOptions(
        encoder.system,
        encoder.loss_scale,
        encoder.add_non_thinking_prefix,
        encoder.enable_thinking,
        encoder.response_prefix,
    )
    format_name = encoder.agent_template or (template.agent if template else "raw")
    agent = get_agent_format(format_name) if format_name else None
    literals = (*(template.literals if template else ()), *(agent.literals if agent else ()))
    segments = _load_segments(tokenizer, literals, encoder.new_special_tokens)
    return _Loaded(tokenizer, template, prompt_template, segments, bos, tokenizer.eos_token or "", agent, options)


# Loading a tokenizer of 150,000 tokens and copying it takes seconds: encoders that differ in other settings share both.
@functools.lru_cache(maxsize=16)
def _load_tokenizer(model_dir: str, new_special_tokens: tuple[str, ...], trust_remote_code: bool) -> Any:
    from rayswift.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    if new_special_tokens:
        tokenizer.add_tokens(list(new_special_tokens), special_tokens=True)
    return tokenizer


@functools.lru_cache(maxsize=16)
def _load_segments(tokenizer: Any, literals: tuple[str, ...], in_content: tuple[str, ...]) -> SegmentTokenizer:
    return SegmentTokenizer(tokenizer, literals, in_content)


def _choose_template(encoder: Encoder, tokenizer: Any) -> Template | JinjaTemplate:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if encoder.template_backend == "jinja":
        if not tokenizer.chat_template:
            raise UserError("--template_backend jinja: the model has no chat template; leave it out or set --template")
        return _jinja(tokenizer)
    if encoder.template not in (None, "auto"):
        return get_template(encoder.template).bind(bos, eos, adds_bos(tokenizer))
    if not tokenizer.chat_template:
        logger.warning("%s has no chat template: using template `default` (--template sets another)", encoder.model_dir)
        return get_template("default").bind(bos, eos, adds_bos(tokenizer))
    matched = match_template(tokenizer)
    if matched is None:
        logger.info("no template family fits the model's chat template: using that chat template itself")
        return _jinja(tokenizer)
    return matched


def _jinja(tokenizer: Any) -> JinjaTemplate:
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    specials = tuple(token for token in added if not CONTENT_TAG.fullmatch(token))
    return JinjaTemplate(tokenizer, specials, tokenizer.eos_token or "")
