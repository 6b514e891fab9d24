"""A conversation in the terminal, with SWIFT's commands; also over a pipe (``echo question | rayswift infer``)."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

from rayswift.console import say
from rayswift.errors import Terminated, UserError
from rayswift.generate.types import Answer, Engine, SamplingParams

logger = logging.getLogger("rayswift.inference.chat")

HELP = """\
exit or quit (or Ctrl-D) leaves, clear forgets the conversation, reset-system sets another system prompt,
multi-line reads until a line that ends with #, single-line goes back; Ctrl-C stops an answer."""
RULE = "-" * 50
END_OF_MULTI_LINE = "#"
HISTORY_FILE = os.path.join("~", ".cache", "rayswift", "chat_history")
HISTORY_LENGTH = 1000


@dataclass
class Chat:
    """State of one conversation. ``write`` shows text, ``read_line`` gets a line for a prompt (EOFError at the end)."""

    engine: Engine
    params: SamplingParams
    read_line: Callable[[str], str]
    write: Callable[[str], Any]
    stream: bool = True
    interactive: bool = True
    system: str | None = None
    multi_line: bool = False
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """Read, answer, repeat, until ``exit`` or the end of the input."""
        while True:
            try:
                query = self.read_query()
            except EOFError:
                if self.interactive:
                    self.write("\n")
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                self.write("\n(exit or Ctrl-D leaves)\n")
                continue
            if query.strip().lower() in ("exit", "quit"):
                return
            if query.strip() and not self.obey(query.strip().lower()):
                self.answer(query)

    def read_query(self) -> str:
        """One query: a line, or in multi-line mode the lines up to one that ends with ``#``."""
        if not self.multi_line:
            return self.read_line("<<< ")
        lines: list[str] = []
        while not (lines and lines[-1].endswith(END_OF_MULTI_LINE)):
            try:
                lines.append(self.read_line("... " if lines else "<<<[M] "))
            except EOFError:
                if not lines:
                    raise
                return "\n".join(lines)
            if len(lines) == 1 and lines[0].strip().lower() in ("exit", "quit", "single-line", "clear", "reset-system"):
                return lines[0]
        return "\n".join(lines)[: -len(END_OF_MULTI_LINE)]

    def obey(self, command: str) -> bool:
        """Carry out a command; False when it is none."""
        if command == "clear":
            self.rounds.clear()
        elif command == "reset-system":
            try:
                self.system = self.read_line("<<<[S] ") or None
            except Terminated:
                raise
            except (EOFError, KeyboardInterrupt):
                self.say("the system prompt stays as it was")
                return True
            self.rounds.clear()
        elif command in ("multi-line", "single-line"):
            self.multi_line = command == "multi-line"
        else:
            return False
        self.say({
            "clear": "the conversation is forgotten",
            "reset-system": "new system prompt; the conversation is forgotten",
            "multi-line": "end a query with #",
            "single-line": "one line is one query",
        }[command])  # fmt: skip
        return True

    def say(self, remark: str) -> None:
        """A remark of the program itself; a pipe gets answers only."""
        if self.interactive:
            self.write(f"({remark})\n")

    def answer(self, query: str) -> None:
        """Ask the model and show what it says; what came before a Ctrl-C stays in the conversation."""
        asked = {"role": "user", "content": query}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text, stopped = "", False
        try:
            with contextlib.closing(self.pieces([*system, *self.rounds, asked])) as pieces:
                for piece in pieces:
                    text += piece
                    self.write(piece)
        except Terminated:
            raise
        except KeyboardInterrupt:
            stopped = True
        except UserError as error:
            if not self.interactive:
                raise
            self.write(f"({error}; clear starts anew)\n")
            return
        self.write("\n")
        if stopped:
            self.say("stopped")
        if self.interactive:
            self.write(RULE + "\n")
        if text or not stopped:
            last = self.engine.last_stream  # has more than was shown where thoughts came apart
            self.rounds += [asked, (last if last.thoughts else Answer(text)).message]

    def pieces(self, messages: list[dict[str, Any]]) -> Any:
        """The answer in pieces, or whole with ``--stream false``."""
        if self.stream:
            yield from self.engine.stream(messages, self.params)
            return
        self.engine.last_stream = answer = self.engine.generate([messages], self.params)[0]
        if answer.error is not None:
            raise UserError(answer.error)
        yield answer.shown


def chat(engine: Engine, params: SamplingParams, *, stream: bool = True) -> None:
    """Hold a conversation on standard input and output until the user leaves."""
    interactive = sys.stdin.isatty()

    read_line = input if interactive else lambda prompt: read_from(sys.stdin)
    if interactive:
        say(f"{HELP}\n{RULE}")
    with line_history(interactive):
        Chat(engine, params, read_line, partial(say, end=""), stream=stream, interactive=interactive).run()


def read_from(stream: TextIO) -> str:
    """The next line of ``stream`` without its end; EOFError after the last."""
    line = stream.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@contextlib.contextmanager
def line_history(enabled: bool) -> Any:
    """Arrow keys recall earlier queries, those of earlier sessions too, where Python has readline."""
    try:
        import readline
    except ImportError:
        enabled = False
    if not enabled:
        yield
        return
    path = os.path.expanduser(HISTORY_FILE)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LENGTH)
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            readline.write_history_file(path)
