"""Measures templates derived from models' own chat templates: what is trained against what generation would write.

For every template and conversation: every assistant turn is trained exactly once, behind the generation prompt that
the chat template itself writes for the messages before it, exactly as the chat template goes on from there, to the
token that ends the turn; the ids are those of the chat template's text tokenised as a whole; and the prompt for
generation is the chat template's with ``add_generation_prompt``. Run as a program it prints clean / all:

    python tests/data_path/template_gate.py FOLDER_OF_JINJA_FILES...
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any


def _tool(name: str, description: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string", "description": "Its name"}}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [_tool("get_weather", "Weather of a city", "city"), _tool("get_time", "Time of a zone", "zone")]


def _call(name: str, **arguments: str) -> dict[str, str]:
    return {"role": "tool_call", "content": json.dumps({"name": name, "arguments": arguments})}


def _chat(*contents: str | dict[str, str]) -> list[dict[str, str]]:
    roles = {"S": "system", "U": "user", "A": "assistant", "R": "tool_response"}
    return [{"role": roles[c[0]], "content": c[3:]} if isinstance(c, str) else c for c in contents]


_WEATHER, _TIME = _call("get_weather", city="Ulm"), _call("get_time", zone="CET")
_THINK = "A: <think>\n{}\n</think>\n\n{}"
#: name → (messages, whether with tools)
SCENARIOS: dict[str, tuple[list[dict[str, str]], bool]] = {
    "one": (_chat("U: First question?", "A: First answer."), False),
    "system": (_chat("S: Be brief now.", "U: First question?", "A: First answer."), False),
    "many": (_chat("U: First question?", "A: First answer.", "U: Second question?", "A: Second answer.",
                   "U: Third question?", "A: Third answer!"), False),
    "system many": (_chat("S: Be brief now.", "U: First question?", "A: First answer.", "U: Second question?",
                          "A: Second answer."), False),
    "tools unused": (_chat("U: First question?", "A: First answer."), True),
    "call": (_chat("U: First question?", _WEATHER, "R: 11 degrees", "A: It is cold."), True),
    "call last": (_chat("S: Be brief now.", "U: First question?", _WEATHER), True),
    "calls": (_chat("U: First question?", _WEATHER, _TIME, "R: 11 degrees", "R: noon sharp", "A: It is cold.",
                    "U: Second question?", "A: Second answer."), True),
    "text and call": (_chat("U: First question?", "A: Let me look.", _WEATHER, "R: 11 degrees", "A: It is cold.",
                            "U: Second question?", _TIME, "R: noon sharp", "A: It is noon."), True),
    "thoughts": (_chat("U: First question?", _THINK.format("A deep thought", "First answer.")), False),
    "thoughts many": (_chat("S: Be brief now.", "U: First question?", _THINK.format("A deep thought", "First answer."),
                            "U: Second question?", _THINK.format("Another thought", "Second answer.")), False),
    "thoughts sometimes": (_chat("U: First question?", _THINK.format("A deep thought", "First answer."),
                                 "U: Second question?", "A: Second answer."), False),
    "thoughts and call": (_chat("U: First question?", _THINK.format("A deep thought", ""), _WEATHER, "R: 11 degrees",
                                _THINK.format("Another thought", "It is cold.")), True),
}  # fmt: skip
_DAY = datetime(2024, 7, 26)


# --- tokenizers -------------------------------------------------------------------------------------------------

_SPECIAL = re.compile(
    r"<[|｜][^<>{}' \"]{1,40}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]{3,}\]|\]~!b\[|\]~b\]|\[e~\[|</?(?:start|end)_of_"
    r"\w+>|</?(?:assistant|user|system)>|<(?:beginning|end)_of_sentence>|</?seed:\w+>|<sop>|<sep>|</?s>|</?think:\w+>|</?SPECIAL_\d+>"
)
_MARK = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>",
         "<end_of_utterance>", "[e~[", "</assistant>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|role_end|>",
         "<|end_of_msg|>", "<seed:eos>", "<end_of_sentence>", "<SPECIAL_12>", "<sep>")  # fmt: skip


@functools.cache
def _vocabulary() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [message["content"] for messages, _ in SCENARIOS.values() for message in messages]
    backend.train_from_iterator([json.dumps(TOOLS), ".\n\n .\n ?\n !\n >\n >\n\n \n\n \n\n\n", *texts] * 4, trainer)
    return str(backend.to_str())


def save_tokenizer(template: str, directory: Path, *, rendered: bool = True) -> str:
    """A small tokenizer with this chat template and the special tokens written in it; returns the folder."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    source, backend = template, Tokenizer.from_str(_vocabulary())
    if rendered:  # marks that the template puts together
        plain = Oracle(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
        plain.tokenizer.chat_template = template
        form = ("text", "text", "dict", "long", "", {})
        shown = [plain.render(*SCENARIOS[name][:1], TOOLS, form, True) or "" for name in ("many", "calls")]
        template = template + "".join(shown)
    special = list(dict.fromkeys(["<s>", "</s>", *(found[0] for found in _SPECIAL.finditer(template))]))
    marks = sorted({found[0] for found in _MARK.finditer(template)} | {"<think>", "</think>"} - set(special))
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in marks])
    composed = next((end for end in special if "eos" in end), "</s>")
    eos = next((end for end in _ENDS if end in special), composed)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = source
    tokenizer.save_pretrained(directory)
    return str(directory)


# --- what is right ----------------------------------------------------------------------------------------------


class Oracle:
    """What the chat template itself makes of a conversation, in every form that templates take."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def render(self, messages: list[dict[str, Any]], tools: Any, form: tuple[Any, ...], prompt: bool) -> str | None:
        """The text, or None where the template refuses."""
        try:
            return str(self.tokenizer.apply_chat_template(
                openai_messages(messages, form), tools=tools, tokenize=False, add_generation_prompt=prompt,
                date_string=_DAY.strftime("%d %b %Y"), strftime_now=_DAY.strftime, **form[-1]))  # fmt: skip
        except Exception:  # a program of any author
            return None

    def forms(self, messages: list[dict[str, Any]], tools: Any) -> list[tuple[Any, ...]]:
        """The forms in which the template shows the whole conversation."""
        thinks = any("<think>" in message["content"] for message in messages)
        calls = any(message["role"] == "tool_call" for message in messages)
        forms = itertools.product(
            ("text", "parts"), ("field", "block", "text", "calls") if thinks else ("text",),
            ("dict", "text") if calls else ("dict",),
            ("long", "short") if calls else ("long",), ("", None) if calls else ("",),
            ({}, {"enable_thinking": False, "thinking": False}, {"enable_thinking": True, "thinking": True},
             {"reasoning_effort": "high"}),
        )  # fmt: skip
        return [form for form in forms if self._shown(messages, tools, form)]

    def _shown(self, messages: list[dict[str, Any]], tools: Any, form: tuple[Any, ...]) -> bool:
        """Whether each assistant turn is shown when it is the last, and the others in the last prompt or text."""
        turns = turns_of(messages)
        for i, turn in enumerate(turns):
            if turn[0]["role"] in ("assistant", "tool_call"):
                text = self.render(flat(turns[: i + 1]), tools, form, False)
                prompt = self.render(flat(turns[:i]), tools, form, True)
                if text is None or prompt is None or not _all_in(turn, text):
                    return False
                if re.search(r"""'type': 'text|{'city'|\\"city|: "\{""", text[text.rfind("First question?") :]):
                    return False
        if tools and not all(TOOLS[1]["function"]["description"] in shown for shown in (text, prompt)):
            return False
        others = [message for message in messages[:-1] if message["role"] not in ("assistant", "tool_call")]
        return _all_in(others, text) or _all_in(others, prompt)


def flat(turns: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The messages of turns."""
    return [message for turn in turns for message in turn]


def _all_in(messages: list[dict[str, Any]], text: str) -> bool:
    return all(part in text for message in messages for part in _parts(message) if part not in _thoughts(message))


def _thoughts(message: dict[str, Any]) -> list[str]:
    return re.findall(r"<think>\s*(.*?)\s*</think>", message["content"], re.DOTALL)


def _parts(message: dict[str, Any]) -> list[str]:
    """The texts of a message that have to be in what is trained, or shown."""
    if message["role"] == "tool_call":
        call = json.loads(message["content"])
        return [call["name"], *call["arguments"], *call["arguments"].values()]
    answer = re.sub(r"\s*<think>.*?</think>\s*", "", message["content"], flags=re.DOTALL)
    return [text for text in (*_thoughts(message), answer) if text]


def openai_messages(messages: list[dict[str, Any]], form: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The messages as chat templates take them, in one of the forms."""
    content_form, thought_form, argument_form, id_form, empty, _ = form

    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if content_form == "parts" else text

    written: list[dict[str, Any]] = []
    ids: list[tuple[str, str]] = []
    number = 0
    for turn in turns_of(messages):
        role = turn[0]["role"]
        if role in ("assistant", "tool_call"):
            text = "".join(message["content"] for message in turn if message["role"] == "assistant")
            message: dict[str, Any] = {"role": "assistant", "content": content(text)}
            thought = _thoughts({"content": text})
            answer = "".join(part for part in _parts({"role": "assistant", "content": text}) if part not in thought)
            calls = [json.loads(message["content"]) for message in turn if message["role"] == "tool_call"]
            if thought and (thought_form == "field" or (thought_form == "calls" and calls)):
                message |= {key: thought[0] for key in ("reasoning_content", "reasoning", "thinking", "thought")}
                message["content"] = content(answer)
            elif thought and thought_form == "block":
                blocks = [{"type": "thinking", "thinking": thought[0]}, {"type": "text", "text": answer}]
                message["content"] = blocks if answer else blocks[:1]
            ids = []
            for call in calls:
                ids.append(
                    (call["name"], f"functions.{call['name']}:{number}" if id_form == "long" else f"call{number:05d}")
                )
                number += 1
            if calls:
                message["tool_calls"] = [
                    {"id": call_id, "type": "function", "function": {"name": call["name"], "arguments":
                        call["arguments"] if argument_form == "dict" else json.dumps(call["arguments"])}}
                    for call, (_, call_id) in zip(calls, ids, strict=True)
                ]  # fmt: skip
                message["content"] = message["content"] if text else empty
        elif role == "tool_response":
            name, call_id = ids.pop(0)
            message = {"role": "tool", "name": name, "tool_call_id": call_id, "content": content(turn[0]["content"])}
        else:
            message = {"role": role, "content": content(turn[0]["content"])}
        written.append(message)
    return written


def turns_of(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages, those of one assistant turn together."""
    turns: list[list[dict[str, Any]]] = []
    for message in messages:
        joined = turns and message["role"] == "tool_call" and turns[-1][0]["role"] in ("assistant", "tool_call")
        if joined:
            turns[-1].append(message)
        else:
            turns.append([message])
    return turns


# --- the check --------------------------------------------------------------------------------------------------


def faults(encoder: Any, oracle: Oracle, scenario: str) -> Iterator[str]:
    """What is wrong with the encodings of one conversation; nothing where they are right, or refused with reason."""
    from rayswift.data.tokens.encoder import Encoded

    messages, with_tools = SCENARIOS[scenario]
    tools = TOOLS if with_tools else None
    forms = oracle.forms(messages, tools)
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    samples = encoder.encode_batch([row])
    if not isinstance(samples[0], Encoded):
        unended = "does not end a tool call" in samples[0].reason and not ends_calls(oracle)
        if forms and not unended and scenario_can_be_trained(oracle, messages, tools, forms):
            yield f"dropped: {samples[0].reason}"
        return
    if not forms:
        if not opens_thoughts(oracle, messages):
            yield "encoded, though the template does not show it"
        return
    turns = turns_of(messages)
    places = [i for i, turn in enumerate(turns) if turn[0]["role"] in ("assistant", "tool_call")]
    trained: Counter[int] = Counter()
    for sample in samples:
        ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
        text = encoder.tokenizer.decode(ids)
        runs = list(_runs(labels))
        # A token that would reach from the prompt into the answer is cut, as generation cuts it.
        cuts = [0, *(start for start, _ in runs), len(ids)]
        pieces = [encoder.tokenizer.decode(ids[start:end]) for start, end in itertools.pairwise(cuts)]
        cut = [i for piece in pieces for i in encoder.tokenizer(piece, add_special_tokens=False)["input_ids"]]
        if ids not in (cut, encoder.tokenizer(text, add_special_tokens=False)["input_ids"]):
            yield "ids are not those of the text"
        for start, end in runs:
            before, run = encoder.tokenizer.decode(ids[:start]), encoder.tokenizer.decode(ids[start:end])
            place = next((i for i in places if _is_turn(oracle, turns, i, tools, forms, before, run)), None)
            if place is None:
                yield f"wrong span: {before[-60:]!r} ▮ {run!r}"
            else:
                trained[place] += 1
        rendered = [oracle.render(flat(turns[: i + 1]), tools, form, False) or "" for form in forms for i in places]
        last_run = encoder.tokenizer.decode(ids[: runs[-1][1]]) if runs else text
        own_text = any(text.rstrip() == own.rstrip() or last_run.startswith(own.rstrip()) for own in rendered if own)
        if not (own_text or any(_generated(oracle, turns, i, tools, form, text) for form in forms for i in places)):
            yield f"text is not the template's: {text[-100:]!r}"
    if set(places) != set(trained) or max(trained.values()) > 1:
        yield f"turns {dict(trained)} trained of {places}"
    for end in [i for i, turn in enumerate(turns) if turn[0]["role"] in ("assistant", "tool_call")]:
        asked = flat(turns[:end])
        prompt = encoder.tokenizer.decode(encoder.encode_prompt(asked, tools))
        if prompt not in [oracle.render(asked, tools, form, True) for form in forms]:
            yield f"prompt: {prompt[-80:]!r}"


def _generated(oracle: Oracle, turns: Any, i: int, tools: Any, form: tuple[Any, ...], text: str) -> bool:
    prompt = oracle.render(flat(turns[:i]), tools, form, True)
    return prompt is not None and text.startswith(prompt)


def _runs(labels: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for trained, group in itertools.groupby(labels, lambda label: label != -100):
        end = start + len(list(group))
        if trained:
            yield start, end
        start = end


_OPENS = (
    r"<(?:\w+:)?think(?::\w+)?>|<\|channel>thought\n|\[THINK\]|<\|START_THINKING\|>|<seed:think>|"
    r"<\|open\|>think<\|sep\|>"
)
_CLOSES = (
    r"</(?:\w+:)?think(?::\w+)?>|<channel\|>|\[/THINK\]|<\|END_THINKING\|>|</seed:think>|"
    r"<\|close\|>think<\|sep\|>(?:<\|open\|>response<\|sep\|>)?"
)
_EMPTY = re.compile(rf"\s*(?:{_OPENS})?\s*(?:{_CLOSES})\s*")
_OPENED = re.compile(rf"(?:{_OPENS}|Here are my reasoning steps:)\s*$")


def _is_turn(oracle: Oracle, turns: Any, i: int, tools: Any, forms: list[Any], before: str, run: str) -> bool:
    """Whether `run` behind `before` is what generation would write as turn `i`."""
    parts = [part for message in turns[i] for part in _parts(message)]
    if any(part not in run for part in parts) or _EMPTY.match(run):
        return False
    for form in forms:
        full = oracle.render(flat(turns[: i + 1]), tools, form, False)
        prompt = oracle.render(flat(turns[:i]), tools, form, True)
        if full is None or prompt is None:
            continue
        ends = _ends(oracle, turns[i], tools, form)
        wholes = [full, *(text + end for end in ends for text in (full, full.rstrip()))]
        own = next((whole[len(before) :] for whole in wholes if whole.startswith(before + run)), None)
        in_prompt = before == prompt or (before.startswith(prompt) and _EMPTY.fullmatch(before[len(prompt) :]))
        if own is None and in_prompt:
            # The prompt has an empty thought that the full rendering has not, or opens one that it does not show.
            opened = "".join(message["content"] for message in turns[i])
            answer = re.sub(r"^\s*<think>\s*", "", opened) if _OPENED.search(prompt) else opened
            tail = full[full.rindex(parts[-1]) + len(parts[-1]) :] if parts[-1] in full else ""
            own = next((text[len(run) :] for text in (*wholes, answer + tail)
                        if text.rstrip().endswith(run) or text.startswith(run)), None)  # fmt: skip
        elif own is not None:
            # No thought where the prompt opens one: the span starts where the prompt's head ends, or behind a mark.
            head = _OPENED.sub("", prompt)
            in_prompt = (
                in_prompt or before == head or (before.startswith(head) and _EMPTY.fullmatch(before[len(head) :]))
            )
        if own is not None and in_prompt and _ended(oracle, run, form):
            return True
    return False


def _ended(oracle: Oracle, run: str, form: Any) -> bool:
    """Whether a turn ends with a special token, or as the template ends its turns where it has none for that."""
    if any(found.end() == len(run) for found in _SPECIAL.finditer(run)):
        return True
    longer = oracle.render([{"role": "user", "content": "zq"}, {"role": "assistant", "content": "zr"},
                            {"role": "user", "content": "zs"}], None, form, False) or ""  # fmt: skip
    between = longer.rpartition("zr")[2].rpartition("zs")[0]
    return not _SPECIAL.search(between) and run.endswith(re.match(r"\s*", between)[0])


def _ends(oracle: Oracle, turn: Any, tools: Any, form: Any) -> list[str]:
    """The tokens that may end a turn which the template itself leaves open: those that it writes before the next."""
    question, answer = {"role": "user", "content": "zq"}, {"role": "assistant", "content": "zr"}
    asked = [question, *([turn[-1], {"role": "tool_response", "content": "zs"}] if turn[-1]["role"] == "tool_call"
             else [answer, {"role": "user", "content": "zs"}])]  # fmt: skip
    longer = oracle.render(asked, tools, form, False) or ""
    behind = longer.rpartition("zs")[0].rpartition("zr")[2]
    found = [*_SPECIAL.finditer(behind)][-3:]
    return [oracle.tokenizer.eos_token, *(special[0] for special in found), *(behind[: one.end()] for one in found),
            *(re.search(r"\s*$", behind[: one.start()])[0] + one[0] for one in found)]  # fmt: skip


def scenario_can_be_trained(oracle: Oracle, messages: Any, tools: Any, forms: Any) -> bool:
    """Whether the template writes every turn when it is the last, thoughts too."""
    turns = turns_of(messages)
    for i, turn in enumerate(turns):
        if turn[0]["role"] in ("assistant", "tool_call"):
            texts = [oracle.render(flat(turns[: i + 1]), tools, form, False) or "" for form in forms]
            if not any(all(part in text for message in turn for part in _parts(message)) for text in texts):
                return False
    return True


def ends_calls(oracle: Oracle) -> bool:
    """Whether the token that ends an answer stands between a call and its result, too."""
    form = ("text", "text", "dict", "long", "", {})
    asked, result = {"role": "user", "content": "zq"}, {"role": "tool_response", "content": "zs"}
    answered = oracle.render(
        [asked, {"role": "assistant", "content": "zr"}, {**asked, "content": "zs"}], TOOLS, form, False
    )
    called = oracle.render([asked, _WEATHER, result], TOOLS, form, False)
    behind = (answered or "").rpartition("zs")[0].rpartition("zr")[2]
    end = _SPECIAL.search(behind)
    return end is None or end[0] in (called or "").rpartition("zs")[0].rpartition("Ulm")[2]


def opens_thoughts(oracle: Oracle, messages: Any) -> bool:
    """Whether the generation prompt opens a thought, which the template then does not show."""
    prompt = oracle.render(messages[:1], None, ("text", "text", "dict", "long", "", {}), True)
    return prompt is not None and prompt.rstrip().endswith("<think>")


def measure(template: str, directory: Path) -> dict[str, list[str]]:
    """The faults of a template by scenario."""
    from rayswift.data.tokens.encoder import Encoder

    encoder = Encoder(save_tokenizer(template, directory), template_backend="jinja")
    oracle = Oracle(encoder.tokenizer)
    found: dict[str, list[str]] = {}
    for scenario in SCENARIOS:
        try:
            found[scenario] = list(faults(encoder, oracle, scenario))
        except Exception as error:
            found[scenario] = [f"crashed: {type(error).__name__}: {error}"]
    return found


def main() -> None:
    """Print what is clean of the templates in each folder."""
    import tempfile

    verbose = "-v" in sys.argv
    only = [a[2:] for a in sys.argv if a.startswith("-k")]
    for folder in [argument for argument in sys.argv[1:] if not argument.startswith("-")]:
        clean, files = 0, sorted(Path(folder).glob("*.jinja"))
        files = [f for f in files if not only or only[0] in f.name]
        by_scenario: Counter[str] = Counter()
        for file in files:
            with tempfile.TemporaryDirectory() as directory:
                found = measure(file.read_text(encoding="utf-8"), Path(directory))
            bad = {scenario: list_ for scenario, list_ in found.items() if list_}
            clean += not bad
            by_scenario.update(scenario for scenario in found if scenario not in bad)
            if bad:
                print(f"{file.name}: {', '.join(bad)}")
                for scenario, list_ in bad.items() if verbose else ():
                    for fault in list_[:3]:
                        print(f"    {scenario}: {fault}")
        print(f"{folder}: {clean} of {len(files)} templates clean")
        for scenario in SCENARIOS:
            print(f"    {scenario}: {by_scenario[scenario]} of {len(files)}")


if __name__ == "__main__":
    main()
