"""What the columns of a row mean: SWIFT's tables of names, applied once to each distinct set of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: SWIFT's table of source columns for each target, matched case-insensitively. ``chosen`` and ``rejected`` are not in
#: it, but most preference datasets have them.
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations"),
    "system": ("system", "system_prompt"),
    "query": ("query", "prompt", "input", "instruction", "question", "problem"),
    "response": (
        "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text",
        "completion", "content", "chosen",
    ),
    "rejected_response": ("rejected_response", "rejected"),
    "history": ("history",),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "audios": ("audios", "audio"),
}  # fmt: skip
_TARGET_OF = {alias: target for target, aliases in COLUMN_ALIASES.items() for alias in aliases}
#: Columns of files that ``<image>`` and its like stand for: lists of ``{"bytes", "path"}``, whatever was written.
MEDIA = ("images", "videos", "audios")
#: Columns that travel beside ``messages`` (SWIFT 2.4, "Kept columns").
KEPT_COLUMNS = (
    "rejected_messages", "positive_messages", "negative_messages", "label", "channel", "margin", "tools", "objects",
    *(f"{side}_{name}" for side in ("rejected", "positive", "negative") for name in (*MEDIA, "tools", "objects")),
    "chat_template_kwargs", "teacher_prompt", "teacher_images", "ref_audios", "audio_codes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What a set of columns means. ``sources``: target → columns that could be it, first choice first."""

    #: Columns that could be the messages; empty for the schemas that spell a conversation in columns.
    messages: tuple[str, ...]
    alpaca: bool
    sources: dict[str, tuple[str, ...]]
    media: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    extra: tuple[str, ...]
    #: Columns that stand for their target by name or by the user's choice, not by SWIFT's list of guesses.
    certain: frozenset[str]
    tag: str | None
    #: The column that ends ``messages`` with the preferred reply (``chosen`` beside ``rejected``).
    chosen: str | None


def new_name(key: str, renames: Mapping[str, str]) -> str:
    """A column's name after the renames, whose keys are in lower case."""
    return renames.get(key.lower(), key) if renames else key


def plan_layout(columns: tuple[str, ...], renames: Mapping[str, str]) -> Layout:
    """Find out once what a set of columns means: the schema, and which columns could be what."""
    names = {key: new_name(key, renames) for key in columns if isinstance(key, str)}
    names = {key: name for key, name in names.items() if name != "_"}
    lowered = {name.lower(): key for key, name in names.items()}
    preference = {"chosen", "rejected"} <= set(lowered)
    sources: dict[str, list[str]] = {}
    certain = set()
    for key, name in names.items():
        target = _TARGET_OF.get(name.lower())
        if target is None or (name.lower() in ("chosen", "rejected") and not preference):
            continue
        sources.setdefault(target, []).append(key)
        if name.lower() == target:
            certain.add(key)
    for target, keys in sources.items():
        # First what the user renamed, then what has the target's name, then SWIFT's guesses.
        keys.sort(key=lambda key: (names[key].lower() != target, names[key] == key))
    alpaca = "messages" not in sources and {"instruction", "input"} <= set(lowered)
    if alpaca:
        sources["query"] = [lowered["instruction"], lowered["input"]]
        # SWIFT: output is the answer of this schema, whatever else is there.
        if "output" in lowered:
            sources["response"].sort(key=lambda key: key != lowered["output"])
            certain.add(lowered["output"])
    used = ("messages",) if "messages" in sources else ("query", "history")
    spent = {key for target in (*used, "system", *MEDIA) for key in sources.get(target, ())}
    return Layout(
        tuple(sources.get("messages", ())),
        alpaca,
        {target: tuple(keys) for target, keys in sources.items()},
        tuple(target for target in MEDIA if target in sources),
        tuple((key, name) for key, name in names.items() if name in KEPT_COLUMNS),
        tuple(key for key in names if key not in spent),
        frozenset(certain),
        lowered.get("tag"),
        lowered["chosen"] if preference else None,
    )
