"""The conversation in the terminal: commands, history, stopping, and the same over a pipe."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from rayswift.errors import UserError
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import SamplingParams
from rayswift.inference.chat import Chat, chat

GREEDY = SamplingParams(max_new_tokens=10, temperature=0)


class Terminal:
    """What a user types, line by line (an exception instead of a line is raised), and what the user sees."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines, self.shown, self.prompts = iter(lines), "", []

    def read_line(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    def write(self, text: str) -> None:
        self.shown += text


def run_chat(engine: TransformersEngine, *lines: str | type[BaseException], **options: Any) -> tuple[Chat, Terminal]:
    terminal = Terminal(*lines)
    session = Chat(engine, GREEDY, terminal.read_line, terminal.write, **options)
    session.run()
    return session, terminal


def test_a_follow_up_question_is_understood_from_the_history(engine: TransformersEngine) -> None:
    session, terminal = run_chat(engine, "What is the capital of France?", "", "And of Italy?", "exit", "unread")
    assert "The capital of France is Paris.\n" in terminal.shown
    assert "The capital of Italy is Rome.\n" in terminal.shown
    assert [message["role"] for message in session.rounds] == ["user", "assistant"] * 2
    assert terminal.prompts == ["<<< "] * 4


def test_clear_forgets_and_reset_system_changes_what_the_model_is(engine: TransformersEngine) -> None:
    session, _ = run_chat(engine, "Say hi", "clear")
    assert session.rounds == []
    session, terminal = run_chat(engine, "reset-system", "You are a pirate named Jack.", "What is your name?")
    assert session.rounds[-1]["content"].startswith("Aye")  # without it: "I'm here to help"
    assert terminal.prompts[1] == "<<<[S] "
    session, _ = run_chat(engine, "reset-system", "", "quit")
    assert session.system is None


def test_multi_line_reads_until_the_hash_and_single_line_goes_back(engine: TransformersEngine) -> None:
    session, _ = run_chat(engine, "multi-line", "What is the capital", "of France?#", "single-line", "Thanks", "EXIT")
    queries = [message["content"] for message in session.rounds if message["role"] == "user"]
    assert queries == ["What is the capital\nof France?", "Thanks"]
    assert session.rounds[1]["content"] == "The capital of France is Paris."


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(engine: TransformersEngine) -> None:
    terminal = Terminal("What is the capital of France?", KeyboardInterrupt, "And of Italy?")

    def write(text: str) -> None:
        terminal.write(text)
        if text.strip() == "capital" and terminal.shown.count("capital") == 1:
            raise KeyboardInterrupt

    session = Chat(engine, GREEDY, terminal.read_line, write)
    session.run()
    assert session.rounds[1]["content"] == "The capital"
    assert "(stopped)" in terminal.shown
    assert "(exit or Ctrl-D leaves)" in terminal.shown
    assert len(session.rounds) == 4


def test_a_question_that_does_not_fit_is_refused_and_forgotten(engine: TransformersEngine) -> None:
    session, terminal = run_chat(engine, "word " * 9000, "Say hi")
    assert "the context holds 8192" in terminal.shown
    assert session.rounds[0]["content"] == "Say hi"
    with pytest.raises(UserError, match="the context holds 8192"):
        run_chat(engine, "word " * 9000, interactive=False)


def test_without_streaming_the_answer_comes_whole(engine: TransformersEngine) -> None:
    written: list[str] = []
    lines: Iterator[str] = iter(["What is the capital of France?", "exit"])
    Chat(engine, GREEDY, lambda _: next(lines), written.append, stream=False).run()
    assert "The capital of France is Paris." in written


def test_a_pipe_gets_answers_and_nothing_else(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("What is the capital of France?\nclear\nWhat is the capital of France?")
    )
    chat(engine, GREEDY)
    assert capsys.readouterr().out == "The capital of France is Paris.\n" * 2
