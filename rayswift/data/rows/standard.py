"""Raw rows to standard rows: pure functions, one row in, :class:`StandardRow` or :class:`Drop` out.

A standard row is ``{"messages": [{"role", "content", ...}], ...}`` with the columns of
:data:`rayswift.data.rows.columns.KEPT_COLUMNS` beside it. The schemas and their precedence are SWIFT's (messages,
alpaca, query/response, plain text); where SWIFT loses a row or a column in silence, the reason is returned
(:class:`Drop`) or noted in the row (:data:`WARNINGS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from rayswift.data.rows.cells import as_history, as_label, as_objects, as_text, as_tools
from rayswift.data.rows.columns import MEDIA, Layout, new_name, plan_layout
from rayswift.data.rows.media import Unusable, media_file
from rayswift.data.rows.messages import (
    MessageNames,
    ParsedMessages,
    is_message,
    parse_text,
    plain_messages,
    prompt_of,
    read_messages,
    refuse_half_surrogates,
)
from rayswift.data.rows.texts import edit_texts, fill_placeholders

#: Key of a standard row: a list of texts that say which of its columns were not used. Taken out by whoever counts.
WARNINGS = "_warnings"
#: Distinct sets of columns whose reading is remembered; more than this is no table but free-form JSON.
_MAX_LAYOUTS = 1000

StandardRow = dict[str, Any]
#: What a user registers for a dataset: a raw row (columns renamed) to a row of any schema, several rows, or None.
Preprocess = Callable[[dict[str, Any]], dict[str, Any] | list[dict[str, Any]] | None]


@dataclass(frozen=True)
class Drop:
    """A row that cannot be trained on, and why, in words a user can act on.

    ``broken``: what cannot be read, which stops a run whatever ``--strict`` says: the ``line`` alone (a stream reads on
    behind it), or the ``file`` from here on. None for a row that is merely of no use.
    """

    reason: str
    broken: Literal["line", "file"] | None = None


@dataclass(frozen=True)
class RowRules:
    """How the rows of one dataset become standard rows. Plain data: it travels to every reading task.

    Args:
        columns: renames applied before detection (``--columns`` and ``dataset_info.json``), matched
            case-insensitively; ``"_"`` hides a column.
        self_cognition: rows about the model itself, whose ``{{NAME}}`` and ``{{AUTHOR}}`` are filled in.
        model_name: values for ``{{NAME}}``: Chinese rows take the first, others the second; one value serves both.
        model_author: the same for ``{{AUTHOR}}``.
        message_names: keys and roles of messages that are not the usual ones.
        keep_extra: columns that are not part of the prompt stay in the row for reward functions
            (``--remove_unused_columns false``), the answer's column among them.
        strip_input_prefix: text removed from the front of alpaca's ``input`` (alpaca-gpt4-data-zh has ``输入：``).
        remove_text: text removed wherever it stands in a message or a rejected response.
        query_suffix: text put behind the last query, response_prefix: in front of the last response.
        preprocess: called with each row before detection; see :data:`Preprocess`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    self_cognition: bool = False
    model_name: tuple[str, ...] = ()
    model_author: tuple[str, ...] = ()
    message_names: MessageNames = field(default_factory=MessageNames)
    keep_extra: bool = False
    strip_input_prefix: str = ""
    remove_text: str = ""
    query_suffix: str = ""
    response_prefix: str = ""
    preprocess: Preprocess | None = None

    @cached_property
    def _layouts(self) -> dict[tuple[str, ...], Layout]:
        """What the columns mean, found once for each distinct set of them."""
        return {}

    @cached_property
    def _renames(self) -> dict[str, str]:
        return {key.lower(): name for key, name in self.columns.items()}

    @cached_property
    def _after_preprocess(self) -> RowRules:
        """The rules for what ``preprocess`` returns: its columns have their final names."""
        return replace(self, columns={}, preprocess=None)

    def __getstate__(self) -> dict[str, Any]:
        # Without what was remembered: equal rules are equal bytes wherever they are sent.
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def layout_of(self, columns: tuple[str, ...]) -> Layout:
        """What these columns mean (remembered)."""
        layout = self._layouts.get(columns)
        if layout is None:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[columns] = plan_layout(columns, self._renames)
        return layout


_NO_RULES = RowRules()


def standardise_rows(row: Any, rules: RowRules | None = None) -> list[StandardRow | Drop]:
    """One raw row to standard rows: one, unless the dataset's ``preprocess`` makes it several."""
    rules = rules or _NO_RULES
    if rules.preprocess is None or not isinstance(row, Mapping):
        return [standardise_row(row, rules)]
    named = {new_name(key, rules._renames): value for key, value in row.items() if new_name(key, rules._renames) != "_"}
    try:
        made = rules.preprocess(named)
    except Exception as error:  # whatever a user's function raises concerns this row alone
        return [Drop(f"the dataset's preprocess function failed: {type(error).__name__}: {str(error)[:200]}")]
    if made is None:
        return [Drop("the dataset's preprocess function returned None")]
    made = made if isinstance(made, list) else [made]
    try:
        refuse_half_surrogates(made)
    except Unusable as unusable:
        return [Drop(str(unusable))]
    return [standardise_row(item, rules._after_preprocess) for item in made] or [
        Drop("the dataset's preprocess function gave no row")
    ]


def standardise_row(row: Any, rules: RowRules | None = None) -> StandardRow | Drop:
    """One raw row to a standard row, or the reason it is dropped. ``rules.preprocess`` is not called."""
    rules = rules or _NO_RULES
    if isinstance(row, Drop):
        return row
    if not isinstance(row, Mapping):
        return Drop(f"the row is a JSON {type(row).__name__}, not an object with columns")
    try:
        return _standardise(row, rules)
    except Unusable as unusable:
        return Drop(str(unusable))


def _standardise(row: Mapping[str, Any], rules: RowRules) -> StandardRow:
    layout = rules.layout_of(tuple(row))
    if layout.messages and row[layout.messages[0]] is None and all(row[key] is None for key in layout.messages):
        # A table gives every row every column: null is a column that this row does not have.
        layout = rules.layout_of(tuple(key for key in row if row[key] is not None))
    standard = (_from_messages if layout.messages else _from_columns)(row, layout, rules)
    for key, target in layout.kept:
        if row[key] is not None:
            standard[target] = _kept_value(target, row[key], standard, rules)
    for target in layout.media:
        value = _choose(row, target, layout, standard, rules)
        if value is None or value == []:
            continue
        if target in standard:
            raise Unusable(f"{target} are both in a column and inside the messages")
        standard[target] = [media_file(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if "rejected_response" in layout.sources:
        _add_rejected(standard, _choose(row, "rejected_response", layout, standard, rules), rules)
    if rules.keep_extra:
        standard.update({key: row[key] for key in layout.extra if key not in standard})
    if rules.remove_text or rules.query_suffix or rules.response_prefix:
        edit_texts(standard, rules.remove_text, rules.query_suffix, rules.response_prefix)
    if rules.self_cognition:
        tag = row[layout.tag] if layout.tag else None
        fill_placeholders(standard["messages"], tag, rules.model_name, rules.model_author)
    missing: tuple[str, ...] = getattr(row, "missing", ())
    for target in ("system", "response") if missing else ():
        if not set(layout.sources.get(target, ())).isdisjoint(missing):
            standard.setdefault(WARNINGS, []).append(f"an empty cell is a missing {target}, not an empty text")
    return standard


def _choose(row: Mapping[str, Any], target: str, layout: Layout, standard: StandardRow, rules: RowRules) -> Any:
    """The value of a target: the one column that fills it; of several, the one that is certain (and a warning)."""
    keys = layout.sources.get(target, ())
    if len(keys) < 2:
        return row[keys[0]] if keys else None
    filled = [key for key in keys if row[key] is not None and row[key] != ""]
    if len(filled) < 2:
        return next((row[key] for key in (*filled, *keys) if row[key] is not None), None)
    listed = ", ".join(sorted(filled))
    if filled[0] in layout.certain:
        if not rules.keep_extra:
            warning = f"columns {listed} could all be the {target}: used {filled[0]} (--columns chooses another)"
            standard.setdefault(WARNINGS, []).append(warning)
        return row[filled[0]]
    if target == "response" and rules.keep_extra:
        return None  # as SWIFT: a prompt whose other columns go to the reward functions
    raise Unusable(f"several columns ({listed}) could be the {target}; choose with --columns")


def _from_messages(row: Mapping[str, Any], layout: Layout, rules: RowRules) -> StandardRow:
    standard: StandardRow = {}
    value = _choose(row, "messages", layout, standard, rules)
    messages = plain_messages(value, rules.message_names)
    if messages is not None:
        standard["messages"] = messages
    else:
        parsed = read_messages(value, rules.message_names)
        messages = parsed.messages
        _add_parsed(standard, "", parsed)
    if "system" in layout.sources and messages[0]["role"] != "system":
        system = as_text(_choose(row, "system", layout, standard, rules), "system")
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
    if layout.chosen is not None and row[layout.chosen] is not None:
        reply = _read_reply(row[layout.chosen], "chosen", rules)
        if messages[-1]["role"] != "assistant":
            _add_reply(standard, reply)
        elif messages[-1]["content"] != reply.messages[-1]["content"]:
            raise Unusable("messages already end with another answer than chosen; hide one of them with --columns")
    return standard


def _from_columns(row: Mapping[str, Any], layout: Layout, rules: RowRules) -> StandardRow:
    """query/response, alpaca and plain text."""
    standard: StandardRow = {"messages": []}
    messages = standard["messages"]
    if "system" in layout.sources:
        system = as_text(_choose(row, "system", layout, standard, rules), "system")
        if system is not None:
            messages.append({"role": "system", "content": system})
    if "history" in layout.sources:
        messages += as_history(row[layout.sources["history"][0]])
    if layout.alpaca:
        instruction, extra = (row[key] for key in layout.sources["query"])
        if rules.strip_input_prefix and isinstance(extra, str):
            extra = extra.removeprefix(rules.strip_input_prefix)
        if type(instruction) is not str or type(extra) is not str:
            instruction, extra = as_text(instruction, "instruction"), as_text(extra, "input")
        if not instruction and not extra:
            raise Unusable("both instruction and input are empty")
        query: Any = f"{instruction}\n{extra}" if instruction and extra else instruction or extra
    else:
        query = _choose(row, "query", layout, standard, rules)
    before = len(messages)
    if type(query) is str:
        messages.append({"role": "user", "content": query})
    elif isinstance(query, (list, tuple)) and query and is_message(query[0], rules.message_names):
        _add_parsed(standard, "", read_messages(query, rules.message_names))  # TRL's conversational prompts
    elif query is not None:
        messages.append({"role": "user", "content": as_text(query, "query")})
    response = _choose(row, "response", layout, standard, rules)
    if type(response) is str:
        messages.append({"role": "assistant", "content": response})
    elif response is not None:
        _add_reply(standard, _read_reply(response, "response", rules))
    if len(messages) == before:
        listed = ", ".join(sorted(map(str, row)))
        raise Unusable(f"no column holds text (columns: {listed[:500]}); name it with --columns")
    return standard


def _read_reply(response: Any, what: str, rules: RowRules) -> ParsedMessages:
    """A response that is no plain text: a message, messages, several texts (SWIFT takes the first) or a number."""
    if is_message(response, rules.message_names):
        return read_messages([response], rules.message_names)
    if isinstance(response, (list, tuple)):
        if not response or response[0] is None:
            raise Unusable(f"the {what} is a list without a first text")
        if is_message(response[0], rules.message_names):
            return read_messages(response, rules.message_names)
        response = response[0]
        if isinstance(response, list):
            return read_messages(response, rules.message_names)
    return ParsedMessages([{"role": "assistant", "content": as_text(response, what)}])


def _add_reply(standard: StandardRow, reply: ParsedMessages) -> None:
    """End the messages with a reply; a whole conversation (TRL's ``chosen``) replaces the prompt that it repeats."""
    if reply.messages[0]["role"] in ("system", "user"):
        standard["messages"].clear()
    _add_parsed(standard, "", reply)


def _add_parsed(standard: StandardRow, side: str, parsed: ParsedMessages) -> None:
    """Put what a conversation held into the row; ``side`` is a prefix such as ``rejected_``."""
    known = standard.setdefault(f"{side}messages", parsed.messages)
    if known is not parsed.messages:
        known += parsed.messages
    for column, files in parsed.media.items():
        standard.setdefault(f"{side}{column}", []).extend(files)
    if parsed.warnings:
        standard.setdefault(WARNINGS, []).extend(parsed.warnings)


def _add_rejected(standard: StandardRow, value: Any, rules: RowRules) -> None:
    """A reply as ``rejected_response``, messages as ``rejected_messages``; null is no rejected response.

    Either stands for everything behind the last user message.
    """
    if value is None:
        return
    if isinstance(value, (list, tuple)) and len(value) > 1 and not is_message(value[0], rules.message_names):
        standard.setdefault(WARNINGS, []).append(f"of {len(value)} rejected answers the first is taken")
    messages = standard["messages"]
    prompt = prompt_of(messages)
    parsed = _read_reply(value, "rejected response", rules)
    first = parsed.messages[0]
    if (
        len(parsed.messages) == 1
        and first.keys() == {"role", "content"}
        and first["role"] == "assistant"
        and not parsed.media
    ):
        standard["rejected_response"] = first["content"]
        answer = messages[len(prompt) :]
        same = {message["role"] for message in answer} == {"assistant"} and first["content"] == "".join(
            message["content"] for message in answer
        )
    else:
        if first["role"] not in ("system", "user"):
            parsed.messages[:0] = [dict(message) for message in prompt]
        _add_parsed(standard, "rejected_", parsed)
        same = parsed.messages == messages
    if same:
        raise Unusable("the rejected response is the same as the answer")


def _kept_value(target: str, value: Any, standard: StandardRow, rules: RowRules) -> Any:
    """A kept column in its standard form; most are carried as they are."""
    if target == "rejected_messages":
        parsed = read_messages(value, rules.message_names)
        _add_parsed(standard, "rejected_", parsed)
        if parsed.messages == standard["messages"]:
            raise Unusable("rejected_messages are the same as messages")
        return parsed.messages
    if target in ("positive_messages", "negative_messages"):
        return _conversations(target, value, standard, rules)
    if target.endswith(MEDIA):
        listed = value if isinstance(value, (list, tuple)) else [value]
        return [media_file(item) for item in listed]
    if target.endswith("objects"):
        return as_objects(value)
    if target.endswith("tools"):
        return as_tools(value)
    if target == "label":
        return as_label(value)
    if target == "chat_template_kwargs":
        value = parse_text(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise Unusable("chat_template_kwargs is not a JSON object")
    return value


def _conversations(target: str, value: Any, standard: StandardRow, rules: RowRules) -> list[Any]:
    """``positive_messages`` and ``negative_messages``: a list of conversations (one alone may stand without a list)."""
    value = parse_text(value) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise Unusable(f"{target} is not a list of conversations")
    if value and is_message(value[0], rules.message_names):
        value = [value]
    all_parsed = [read_messages(item, rules.message_names) for item in value]
    side = target.removesuffix("messages")
    for column in MEDIA:
        if any(column in parsed.media for parsed in all_parsed):
            standard[f"{side}{column}"] = [parsed.media.get(column, []) for parsed in all_parsed]
    return [parsed.messages for parsed in all_parsed]
