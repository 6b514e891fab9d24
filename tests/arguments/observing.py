"""Whether a flag changes anything that can be seen: one value against another, everything else alike."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rayswift.arguments import Arguments, make_arguments
from rayswift.arguments.commands import flags_of
from rayswift.arguments.effects import why_never, why_no_effect
from rayswift.arguments.fields import Spec
from rayswift.errors import UserError

#: The folder that an observer works in, another each time.
_WORKED_IN = re.compile(re.escape(os.path.join(tempfile.gettempdir(), "tmp")) + r"\w{8}(?!\w)")
Settings = dict[str, Any]
#: What a command makes of its arguments, as something that can be compared.
Observer = Callable[[Arguments], Any]


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Look:
    """One command with some settings: the arguments, what each observer sees of them, what the user is told."""

    def __init__(self, command: str, settings: Settings, observers: Sequence[Observer]) -> None:
        self.told, self.seen, self.observers = "", {}, observers
        self.args: Arguments | None = self._watched(lambda: make_arguments(command, **settings))

    def _watched(self, work: Callable[[], Any]) -> Any:
        handler, root = _Lines(), logging.getLogger("rayswift")
        root.addHandler(handler)
        try:
            return work()
        except Exception as error:  # it is seen, too: a refusal names its flag
            handler.lines.append(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        finally:
            root.removeHandler(handler)
            self.told = "\n".join([self.told, *handler.lines])

    def view(self, number: int) -> str:
        if number not in self.seen:
            seen = self._watched(lambda: self.observers[number](self.args))  # type: ignore[arg-type]
            self.seen[number] = _WORKED_IN.sub("", json.dumps(seen, sort_keys=True, default=str))
        return self.seen[number]

    def views(self) -> Iterator[str]:
        return map(self.view, range(len(self.observers)))


def other_value(spec: Spec, now: Any) -> Any:
    """A value of the flag that is another than this."""
    if spec.choices:
        other = next(choice for choice in spec.choices if choice != now and [choice] != now)
        return [other] if spec.is_list else other
    if spec.item_kind == "bool":
        return not now
    if spec.item_kind in ("int", "float", "int | float"):
        low, high = spec.ge if spec.ge is not None else spec.gt, spec.le if spec.le is not None else spec.lt
        number = (now[0] if isinstance(now, list) and now else now) or low or 0
        other = number + 1 if spec.item_kind == "int" else number / 2 + 0.125
        other = other if high is None or other <= high else number - 1
        return [other] if spec.is_list else other
    other = {"a": 1} if spec.item_kind.startswith("dict") else "other"
    return [other] if spec.is_list else other


def first_difference(one: str, other: str) -> str:
    """Where two texts part."""
    place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    return f"{one[max(0, place - 60) : place + 60]!r}, {other[max(0, place - 60) : place + 60]!r}"


def without_effect(
    command: str,
    runs: Mapping[str, Settings],
    observers: Sequence[Observer],
    values: Mapping[str, Any],
    beside: Mapping[str, Settings],
    proven: set[str],
    names: Sequence[str] = (),
) -> Iterator[str]:
    """The flags that are said to have an effect in a run and change nothing there, nor say so; ``proven`` gets those
    that change something.

    ``values``: what a flag is given, where any other value will not do. ``beside``: what else a flag needs.
    """
    known: dict[str, Look] = {}
    for label, run in runs.items():  # of the settings alone
        once, again = (Look(command, run, observers) for _ in range(2))
        for view, other in zip(once.views(), again.views(), strict=True):
            if view == "null":
                yield f"the settings alone ({label}): nothing can be seen: {once.told}"
            if view != other:
                yield f"the settings alone ({label}): {first_difference(view, other)}"
    for name, spec in flags_of(command).items():
        if why_never(spec, command) or len(spec.choices) == 1 or (names and name not in names):
            continue
        for label, run in runs.items():
            needed = beside.get(name, {})
            settings = run | (needed if needed.keys() <= flags_of(command).keys() else {})
            if (key := repr(settings)) not in known:
                known[key] = Look(command, settings, observers)
            base = known[key]
            if base.args is None:  # what the flag needs is refused here
                assert name in beside, (label, settings, base.told)
                continue
            if set(base.views()) == {"null"}:
                continue
            now = getattr(base.args, name, base.args.training_args.get(name, spec.default))
            if run.get(name) == values.get(name, run):  # that is the run
                continue
            settings = settings | {name: values.get(name, other_value(spec, now))}
            if name == "load_from_cache_file":  # there is something to reuse
                list(Look(command, settings, observers).views())
            varied = Look(command, settings, observers)
            if varied.args is not None and not why_no_effect(spec, varied.args):
                pairs = zip(varied.views(), base.views(), strict=True)
                changed = next(({*pair} for pair in pairs if pair[0] != pair[1]), set())
                if changed:
                    proven |= set() if "null" in changed else {name}
                elif spec.flag not in varied.told:
                    yield f"{spec.flag} ({label})"
            elif varied.args is None and spec.flag not in varied.told:
                yield f"{spec.flag} ({label}): refused in other words: {varied.told}"
