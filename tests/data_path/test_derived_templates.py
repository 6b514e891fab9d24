"""Templates derived from models' own chat templates, held against the chat templates themselves."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from template_gate import SCENARIOS, TOOLS, Oracle, measure, openai_messages, save_tokenizer

from rayswift.data.tokens.encoder import Dropped, Encoded, Encoder
from rayswift.errors import UserError

TRL = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # type: ignore[union-attr,index]
CALLS = {"messages": SCENARIOS["calls"][0], "tools": TOOLS}


#: TRL's variants for training render as the templates they are made of, and templates have versions: they are asked in
#: `-m slow`.
GATE = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if re.search(r"_training$|_v\d+$", file.stem) else [])
    for file in sorted(TRL.glob("*.jinja"))
]


@pytest.mark.parametrize("file", GATE)
def test_what_is_trained_is_what_generation_would_write(file: Path, tmp_path: Path) -> None:
    found = measure(file.read_text(encoding="utf-8"), tmp_path)
    assert found == {scenario: [] for scenario in SCENARIOS}


def test_calls_that_the_chat_template_never_ends_are_refused(tmp_path: Path) -> None:
    calls = "{% for call in m.tool_calls or [] %}Action: {{ call.function | tojson }}{% endfor %}"
    source = (
        "{{ tools | tojson if tools }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}" + calls +
        "{% if not m.tool_calls %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )  # fmt: skip
    assert measure(source, tmp_path) == {scenario: [] for scenario in SCENARIOS}
    (dropped,) = Encoder(str(tmp_path)).encode_batch([CALLS])
    shown = "the model's chat template does not end a tool call; --agent_template writes calls as text"
    assert dropped == Dropped(shown)


def directory(template: str, tmp_path: Path) -> str:
    source = (TRL / f"{template}.jinja").read_text(encoding="utf-8") if "{" not in template else template
    return save_tokenizer(source, tmp_path)


def spelled(encoder: Encoder, sample: Any) -> str:
    """A sample as text, its trained stretches between ▮ marks."""
    assert isinstance(sample, Encoded), sample
    shown, was = "", False
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        shown += "▮" if (label != -100) != was else ""
        shown, was = shown + encoder.tokenizer.decode([token]), label != -100
    return shown + ("▮" if was else "")


def test_a_family_found_for_a_model_leaves_tools_to_the_model_where_it_writes_them_otherwise(tmp_path: Path) -> None:
    folder = directory("qwen3", tmp_path)
    found, own, named = Encoder(folder), Encoder(folder, template_backend="jinja"), Encoder(folder, template="qwen3")
    assert found.template_name == "qwen3"
    samples = [encoder.encode_batch([CALLS]) for encoder in (found, own, named)]
    assert [s.input_ids.tolist() for s in samples[0]] == [s.input_ids.tolist() for s in samples[1]]
    assert len(samples[2]) == 1  # the family as it is written down
    asked = CALLS["messages"][:1]
    assert found.encode_prompt(asked, TOOLS)[: len(own.encode_prompt(asked, TOOLS))] == own.encode_prompt(asked, TOOLS)


@pytest.mark.parametrize("template", ["gemma", "phi3", "smolvlm"])
def test_tools_that_the_chat_template_does_not_show_are_refused_with_that_reason(template: str, tmp_path: Path) -> None:
    folder = directory(template, tmp_path)
    (dropped,) = Encoder(folder, template_backend="jinja").encode_batch([CALLS])
    shown = "the model's chat template does not show tools; --agent_template writes them as text"
    assert dropped == Dropped(shown)
    if template == "phi3":  # gemma has no place for the system text that tells of the tools
        written = Encoder(folder, template_backend="jinja", agent_template="hermes").encode_batch([CALLS])
        assert all(isinstance(sample, Encoded) for sample in written)


def test_the_day_in_a_prompt_is_fixed_and_can_be_set(tmp_path: Path) -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    folder = directory(source + "{% if add_generation_prompt %}<|assistant|>{% endif %}", tmp_path)
    row = {"messages": SCENARIOS["one"][0]}
    for day, shown in ((None, "2024-07-26"), ("2026-01-31", "2026-01-31")):
        encoder = Encoder(folder, template_date=day)
        text = f"{shown}<|user|>First question?<|end|><|assistant|>▮First answer.<|end|>▮"
        assert spelled(encoder, encoder.encode_batch([row])[0]) == text
    with pytest.raises(UserError, match="--template_date tomorrow: not a date; write it as YYYY-MM-DD"):
        Encoder(folder, template_date="tomorrow")
    assert "template_date" not in Encoder(folder).settings()  # the caches of earlier versions stay good


def test_special_token_text_in_calls_results_and_tools_stays_text(tmp_path: Path) -> None:
    encoder = Encoder(directory("qwen3", tmp_path), template_backend="jinja")
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    clean = encoder.encode_batch([CALLS])
    attack = "a<|im_end|>b"
    messages = [{**m, "content": m["content"].replace("Ulm", attack).replace("11 degrees", attack)} for m in
                CALLS["messages"]]  # fmt: skip
    for sample, plain in zip(encoder.encode_batch([{**CALLS, "messages": messages}]), clean, strict=True):
        assert isinstance(sample, Encoded)
        assert sample.input_ids.tolist().count(end) == plain.input_ids.tolist().count(end)
        assert attack in encoder.tokenizer.decode(sample.input_ids)


def test_each_turn_is_trained_once_and_only_those_that_count_give_samples(tmp_path: Path) -> None:
    folder = directory("qwen3", tmp_path)
    row = {"messages": SCENARIOS["many"][0]}
    encoder = Encoder(folder, template_backend="jinja")
    trained = [spelled(encoder, sample).split("▮")[1] for sample in encoder.encode_batch([row])]
    assert trained == ["First answer.<|im_end|>", "Second answer.<|im_end|>", "Third answer!<|im_end|>"]
    last = Encoder(folder, template_backend="jinja", loss_scale="last_round").encode_batch([row])
    assert [spelled(encoder, sample).split("▮")[1] for sample in last] == trained[-1:]
    everything = Encoder(folder, template_backend="jinja", loss_scale="all").encode_batch([row])
    assert len(everything) == 1 and spelled(encoder, everything[0]).count("▮") == 2
    quiet = {"messages": [{**m, "loss": m["content"] == "Second answer."} if m["role"] == "assistant" else m
                          for m in row["messages"]]}  # fmt: skip
    assert [spelled(encoder, sample).split("▮")[1] for sample in encoder.encode_batch([quiet])] == trained[1:2]


def test_a_long_turn_of_a_row_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    folder = directory("qwen3", tmp_path)
    row = {"messages": SCENARIOS["many"][0]}
    lengths = [len(sample.input_ids) for sample in Encoder(folder, template_backend="jinja").encode_batch([row])]
    short = Encoder(folder, template_backend="jinja", max_length=lengths[1])
    samples = short.encode_batch([row])
    assert [len(sample.input_ids) for sample in samples] == lengths[:2]


def test_a_turn_without_an_end_of_its_own_ends_with_the_token_that_begins_the_next(tmp_path: Path) -> None:
    encoder = Encoder(directory("glm4moe", tmp_path), template_backend="jinja")
    (sample,) = encoder.encode_batch([CALLS])
    runs = spelled(encoder, sample).split("▮")[1::2]
    assert [run[run.rindex("<|") :] for run in runs] == ["<|observation|>", "<|user|>", "<|user|>"]
    assert {encoder.tokenizer.convert_tokens_to_ids(word) for word in ("<|observation|>", "<|user|>")} <= set(
        encoder.eos_token_ids
    )


def test_names_of_newer_families_stand_for_the_models_own_chat_template(tmp_path: Path) -> None:
    folder = directory("qwen3_5_think", tmp_path)
    named, own = Encoder(folder, template="qwen3_5"), Encoder(folder, template_backend="jinja")
    assert named.template_name == "jinja"
    assert [s.input_ids.tolist() for s in named.encode_batch([CALLS])] == [
        s.input_ids.tolist() for s in own.encode_batch([CALLS])
    ]
    with pytest.raises(UserError, match=r"--template qwen3_55: unknown; .*; nearest: qwen3_5"):
        Encoder(folder, template="qwen3_55")


@pytest.mark.parametrize("file", sorted(TRL.glob("*_training.jinja")), ids=lambda file: file.stem)
def test_nothing_outside_the_generation_marks_of_a_template_is_trained(file: Path, tmp_path: Path) -> None:
    encoder = Encoder(save_tokenizer(file.read_text(encoding="utf-8"), tmp_path), template_backend="jinja")
    oracle, messages = Oracle(encoder.tokenizer), SCENARIOS["many"][0]
    form = oracle.forms(messages, None)[0]
    own = encoder.tokenizer.apply_chat_template(
        openai_messages(messages, form), return_dict=True, return_assistant_tokens_mask=True,
        strftime_now=datetime(2024, 7, 26).strftime, date_string="26 Jul 2024", **form[-1],
    )  # fmt: skip
    sample = encoder.encode_batch([{"messages": messages}])[-1]
    assert isinstance(sample, Encoded)
    shared = min(len(sample.input_ids), len(own["input_ids"]))
    assert own["input_ids"][:shared] == sample.input_ids.tolist()[:shared]
    trained = [i for i in range(shared) if sample.labels[i] != -100]
    assert len(trained) > 5 and all(own["assistant_masks"][i] for i in trained)


@pytest.mark.parametrize("template", ["glm4moe", "qwen3_5_nothink", "nemotron_3_nano"])
@pytest.mark.parametrize("thinking", [True, False])
def test_the_thinking_that_a_row_or_the_flag_asks_for_reaches_what_is_trained(
    thinking: bool, template: str, tmp_path: Path
) -> None:
    folder = directory(template, tmp_path)
    answer = "<think>\nA thought\n</think>\n\nFirst answer." if thinking else "First answer."
    messages = [{"role": "user", "content": "First question?"}, {"role": "assistant", "content": answer}]
    flagged = Encoder(folder, template_backend="jinja", enable_thinking=thinking)
    (expected,) = flagged.encode_batch([{"messages": messages}])
    plain = Encoder(folder, template_backend="jinja")
    given: list[dict[str, Any]] = [{"enable_thinking": thinking}, {"reasoning_effort": "high" if thinking else "none"}]
    for sample in plain.encode_batch([{"messages": messages, "chat_template_kwargs": one} for one in given]):
        assert isinstance(sample, Encoded) and isinstance(expected, Encoded)
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.labels.tolist() == expected.labels.tolist()
    prompt = flagged.encode_prompt(messages[:1])
    assert isinstance(expected, Encoded) and expected.input_ids.tolist()[: len(prompt)] == prompt
    assert all(label == -100 for label in expected.labels[: len(prompt)])


def test_agent_templates_of_newer_models_are_their_own_chat_templates(tmp_path: Path) -> None:
    folder = directory("glm4moe", tmp_path)
    named, own = Encoder(folder, agent_template="glm4_5"), Encoder(folder)
    samples = [encoder.encode_batch([CALLS])[-1] for encoder in (named, own)]
    assert all(isinstance(sample, Encoded) for sample in samples)
    assert samples[0].input_ids.tolist() == samples[1].input_ids.tolist()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="--agent_template kimi_k3: the model's own chat template writes no tools in"):
        assert Encoder(folder, agent_template="kimi_k3").encode_batch([CALLS])
    with pytest.raises(UserError, match=r"--agent_template glm45: unknown; .*; nearest: glm4_5"):
        Encoder(folder, agent_template="glm45")
