"""Standard rows to token ids and labels: template, loss mask, length limit.

:class:`Encoder` is a set of plain settings: it can be sent to any process, and each process loads the tokenizer once,
at first use. Rows are encoded by the batch; one row in, one or more :class:`Encoded` or one :class:`Dropped` out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.conversation import DropRow, Message, read_conversation
from rayswift.data.jinja_template import JinjaTemplate
from rayswift.data.segments import CONTENT_TAG, SegmentTokenizer, Span
from rayswift.data.templates import (
    LOSS_SCALES,
    Piece,
    RenderOptions,
    Template,
    adds_bos,
    get_template,
    match_template,
    render_bare,
)
from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("rayswift.data.encoding")

TRUNCATION_STRATEGIES = ("delete", "left", "right", "split")
#: Label of a token that is not trained (the index that PyTorch's cross entropy ignores).
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sample. `input_ids` and `labels`: int32, shape (tokens,); `labels` is −100 where not trained,
    always at the first token. `row`: index of the row in the batch it came from."""

    input_ids: np.ndarray
    labels: np.ndarray
    row: int = 0


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that gives no sample, and why. `row`: its index in the batch."""

    reason: str
    row: int = 0


@dataclass(frozen=True)
class Encoder:
    """Encodes standard rows for training and messages for generation. Fields are SWIFT's flags of the same name.

    `template`: a family of `templates.json`, or None/"auto": the family whose layout equals the tokenizer's own chat
    template, else that chat template itself. `template_backend`: `jinja` takes the chat template in any case.
    `use_chat_template` False: bos, the bare texts, eos. `max_length` in tokens, None is no limit.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_dir", str(self.model_dir))
        object.__setattr__(self, "new_special_tokens", tuple(self.new_special_tokens))
        _one_of("--truncation_strategy", self.truncation_strategy, TRUNCATION_STRATEGIES)
        _one_of("--template_backend", self.template_backend, ("swift", "jinja"))
        # ignore_empty_think (SWIFT) is always on for templates that may think.
        _one_of("--loss_scale", self.loss_scale.removesuffix("+ignore_empty_think"), LOSS_SCALES)
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length {self.max_length}: a sample needs at least 2 tokens")
        if self.template not in (None, "auto"):
            get_template(self.template)

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
        """Token ids at which generation stops: the tokenizer's eos and the stop words that are one special token."""
        loaded = _load(self)
        words = [loaded.segments.split_literal(word) for word in loaded.stop_words]
        ids = [parts[0] for parts in words if len(parts) == 1 and isinstance(parts[0], int)]
        eos = [] if loaded.tokenizer.eos_token_id is None else [loaded.tokenizer.eos_token_id]
        return list(dict.fromkeys([*eos, *(i for i in ids if isinstance(i, int))]))

    # --- encoding -----------------------------------------------------------------------------------------------

    def encode_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded | Dropped]:
        """Encode standard rows.

        Returns:
            In row order, with `row` set: for each row one :class:`Encoded` (several under truncation_strategy
            `split`) or one :class:`Dropped`. No row is left out.
        """
        loaded = _load(self)
        options = self._options
        batch = loaded.segments.batch()
        plans: list[list[Span] | DropRow] = []
        for row in rows:
            try:
                plans.append(batch.plan(self._render(loaded, row, options)))
            except DropRow as refused:
                plans.append(refused)
        runs = batch.encode_runs()
        samples: list[Encoded | Dropped] = []
        for index, plan in enumerate(plans):
            if isinstance(plan, DropRow):
                samples.append(Dropped(plan.reason, index))
            else:
                samples += self._limit(*_ids_and_labels(plan, runs), index)
        return samples

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
            if loaded.template is None:
                pieces = render_bare(conversation, self._options, loaded.bos, "")
            else:
                pieces = loaded.template.render_prompt(conversation, self._options)
        except DropRow as refused:
            raise UserError(f"these messages cannot be a prompt: {refused.reason}") from None
        batch = loaded.segments.batch()
        plan = batch.plan(pieces)
        return _ids_and_labels(plan, batch.encode_runs())[0]

    def describe(self, encoded: Encoded) -> list[str]:
        """The sample as SWIFT logs its first one: `[INPUT_IDS]`, `[INPUT]`, `[LABELS_IDS]`, `[LABELS]`."""
        ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=False)
        shown, start = "", 0
        for end in range(1, len(labels) + 1):
            if end == len(labels) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
                shown += f"[-100 * {end - start}]" if labels[start] == IGNORED else decode(labels[start:end])
                start = end
        return [f"[INPUT_IDS] {ids}", f"[INPUT] {decode(ids)}", f"[LABELS_IDS] {labels}", f"[LABELS] {shown}"]

    @property
    def _options(self) -> RenderOptions:
        loss_scale = self.loss_scale.removesuffix("+ignore_empty_think")
        return RenderOptions(
            self.system, loss_scale, self.add_non_thinking_prefix, self.enable_thinking, self.response_prefix
        )

    def _render(self, loaded: _Loaded, row: Mapping[str, Any], options: RenderOptions) -> list[Piece]:
        conversation = read_conversation(row.get("messages") or (), row.get("tools"), loaded.agent)
        if options.loss_scale != "all":
            conversation = conversation.without_trailing_query()
            if not any(round_.reply is not None for round_ in conversation.rounds):
                raise DropRow("no assistant message")
        if loaded.template is None:
            return render_bare(conversation, options, loaded.bos, loaded.eos)
        return loaded.template.render(conversation, options)

    def _limit(self, ids: list[int], labels: list[int], row: int) -> list[Encoded | Dropped]:
        """Apply `--max_length`; samples without a trained token are not samples."""
        import numpy as np

        limit = self.max_length
        if limit is None or len(ids) <= limit:
            spans = [slice(0, len(ids))]
        elif self.truncation_strategy == "delete":
            return [Dropped(f"longer than --max_length {limit}", row)]
        elif self.truncation_strategy == "right":
            spans = [slice(0, limit)]
        elif self.truncation_strategy == "left":
            spans = [slice(len(ids) - limit, len(ids))]
        else:
            spans = [slice(start, start + limit) for start in range(0, len(ids), limit)]
        samples: list[Encoded | Dropped] = []
        for span in spans:
            label_array = np.array(labels[span], dtype=np.int32)
            label_array[:1] = IGNORED
            if (label_array != IGNORED).any():
                samples.append(Encoded(np.array(ids[span], dtype=np.int32), label_array, row))
        if samples:
            return samples
        cut = limit is not None and len(ids) > limit
        return [Dropped("no trained token is left within --max_length" if cut else "no trained token", row)]


def _ids_and_labels(plan: list[Span], runs: list[list[int]]) -> tuple[list[int], list[int]]:
    """Put a row together. This is the place where weights between 0 and 1 would become a `loss_scale` column."""
    ids: list[int] = []
    labels: list[int] = []
    for ref, weight in plan:
        if ref >= 0:
            ids.append(ref)
            labels.append(ref if weight else IGNORED)
        else:
            run = runs[-1 - ref]
            ids += run
            labels += run if weight else [IGNORED] * len(run)
    return ids, labels


def _one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{flag} {value}: choose one of {', '.join(choices)}")


# --- per process ------------------------------------------------------------------------------------------------


@dataclass
class _Loaded:
    """What an encoder needs at work; `template` None is bare mode."""

    tokenizer: Any
    template: Template | JinjaTemplate | None
    segments: SegmentTokenizer
    bos: str
    eos: str

    @property
    def name(self) -> str:
        return self.template.name if self.template else "bare"

    @property
    def agent(self) -> str | None:
        return self.template.agent if self.template else "raw"

    @property
    def stop_words(self) -> tuple[str, ...]:
        return self.template.stop_words if self.template else ()


@functools.lru_cache(maxsize=16)
def _load(encoder: Encoder) -> _Loaded:
    """Tokenizer and template of these settings; equal encoders in one process share them."""
    tokenizer = _load_tokenizer(encoder.model_dir, encoder.new_special_tokens, encoder.trust_remote_code)
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    template = _choose_template(encoder, tokenizer) if encoder.use_chat_template else None
    segments = _load_segments(tokenizer, template.literals if template else (), encoder.new_special_tokens)
    return _Loaded(tokenizer, template, segments, bos, tokenizer.eos_token or "")


# Loading a tokenizer of 150,000 tokens and copying it takes seconds: encoders that differ in other settings share both.
@functools.lru_cache(maxsize=4)
def _load_tokenizer(model_dir: str, new_special_tokens: tuple[str, ...], trust_remote_code: bool) -> Any:
    from rayswift.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    if new_special_tokens:
        tokenizer.add_tokens(list(new_special_tokens), special_tokens=True)
    return tokenizer


@functools.lru_cache(maxsize=4)
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
