"""Every family with a real tokenizer: ids, labels and weights decode to the layouts of `test_templates`, and traps."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_agent_formats import LOOP, WEATHER
from test_agent_formats import layout as agent_layout
from test_templates import LAYOUTS, ONE, TWO, A, S, U, chat

from rayswift.data.tokens import segments
from rayswift.data.tokens.encoder import IGNORED, Dropped, Encoded, Encoder
from rayswift.data.tokens.segments import FAST_TOKENIZER, SegmentTokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
SPECIAL = [
    "<bos>", "<eos>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<｜User｜>",
    "<｜Assistant｜>", "<start_of_turn>", "<end_of_turn>", "<|im_sep|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|observation|>", "[gMASK]", "<sop>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
]  # fmt: skip


@pytest.fixture(scope="module")
def every_family(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's tokenizer with the special tokens of every family, and bos and eos of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>", "additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    directory = str(tmp_path_factory.mktemp("every_family"))
    tokenizer.save_pretrained(directory)
    return directory


def shown(encoder: Encoder, sample: Encoded) -> str:
    """The sample decoded: stretches of weight 1 between ▮ marks, of other weights between ▮ marks with the weight."""
    weights = (sample.labels != IGNORED).astype(np.float32) if sample.loss_scale is None else sample.loss_scale
    assert ((weights > 0) == (sample.labels != IGNORED)).all()
    assert (sample.labels[weights > 0] == sample.input_ids[weights > 0]).all()
    text = ""
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1), len(weights)]
    for start, end in itertools.pairwise(cuts):
        part = encoder.tokenizer.decode(sample.input_ids[start:end].tolist(), skip_special_tokens=False)
        mark = "" if weights[start] == 1 else f"{weights[start]:g}:"
        text += f"▮{mark}{part}▮" if weights[start] else part
    return text


def encoded(encoder: Encoder, messages: list[dict[str, Any]], tools: Any = None) -> Encoded:
    (sample,) = encoder.encode_batch([{"messages": messages, **({"tools": tools} if tools else {})}])
    assert isinstance(sample, Encoded), sample
    return sample


@pytest.mark.parametrize(("name", "one", "two"), LAYOUTS)
def test_ids_and_labels_of_every_family_are_its_layout(name: str, one: str, two: str | None, every_family: str) -> None:
    encoder = Encoder(every_family, template=name)
    for messages, expected in ((ONE, one), (TWO, two)):
        if expected is None:
            (dropped,) = encoder.encode_batch([{"messages": messages}])
            assert isinstance(dropped, Dropped) and "no place for a system message" in dropped.reason
            continue
        sample = encoded(encoder, messages)
        assert shown(encoder, sample) == expected
        # Every special token of the layout is one token, none is spelled out.
        marks = [token for token in encoder.tokenizer.all_special_tokens if token in expected]
        ids = sample.input_ids.tolist()
        for token in marks:
            assert ids.count(encoder.tokenizer.convert_tokens_to_ids(token)) == expected.count(token)


@pytest.mark.parametrize(
    ("family", "agent"),
    [("chatml", "hermes"), ("qwen3_coder", "qwen3_coder"), ("chatml", "react_en"), ("llama3", "llama3"),
     ("glm4", "glm4"), ("deepseek_v3_1", "deepseek_v3_1")],
)  # fmt: skip
def test_tool_loops_of_every_agent_template_encode_to_their_layout(family: str, agent: str, every_family: str) -> None:
    encoder = Encoder(every_family, template=family, agent_template=agent)
    assert shown(encoder, encoded(encoder, LOOP, [WEATHER])) == agent_layout(family, agent, LOOP, [WEATHER])


@pytest.mark.parametrize(
    ("loss_scale", "messages", "expected"),
    [
        ("hermes", chat((U, "q"), (A, "see <tool_call>{}</tool_call>")),
         "▮see ▮▮2:<tool_call>{}</tool_call>▮▮<|im_end|>▮"),
        ("react", chat((U, "q"), (A, "Action: f\nObservation: ok\nThought: t")),
         "▮2:Action: f\nObservation:▮ ok\n▮Thought: t<|im_end|>▮"),
        ("default", [*chat((U, "q")), {"role": A, "content": "r", "loss_scale": 0.5}], "▮0.5:r<|im_end|>▮"),
        ("last_round", [*chat((U, "q")), {"role": A, "content": "r", "loss_scale": 3.0}], "▮3:r<|im_end|>▮"),
    ],
)  # fmt: skip
def test_weights_reach_the_sample(loss_scale: str, messages: Any, expected: str, every_family: str) -> None:
    encoder = Encoder(every_family, template="chatml", loss_scale=loss_scale)
    sample = encoded(encoder, messages)
    assert sample.loss_scale is not None and sample.loss_scale.dtype == np.float32
    assert shown(encoder, sample) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" + expected


def test_a_row_whose_weights_are_0_and_1_has_none_beside_one_that_has(every_family: str) -> None:
    encoder = Encoder(every_family, template="chatml", loss_scale="hermes")
    plain, called = encoder.encode_batch(
        [{"messages": ONE}, {"messages": chat((U, "q"), (A, "<tool_call></tool_call>x"))}]
    )
    assert isinstance(plain, Encoded) and isinstance(called, Encoded)
    assert plain.loss_scale is None
    assert called.loss_scale is None  # an empty call is no call
    (weighed,) = encoder.encode_batch([{"messages": chat((U, "q"), (A, "<tool_call>1</tool_call>"))}])
    assert isinstance(weighed, Encoded) and weighed.loss_scale is not None


@pytest.mark.parametrize(
    ("settings", "messages", "expected"),
    [
        # SWIFT trains the suffix of a last turn that says it is not to be trained.
        ({}, chat((U, "q1"), (A, "r1"), (U, "q2"), (A, "r2", False)),
         "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n▮r1<|im_end|>▮\n"
         "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\nr2<|im_end|>"),
        # SWIFT invents an empty user turn, for pre-training text too.
        ({}, chat((A, "R")), "<|im_start|>assistant\n▮R<|im_end|>▮"),
        ({"loss_scale": "all"}, chat((A, "R")), "<|im_start|>▮assistant\nR<|im_end|>▮"),
        # Consecutive turns of one side are one turn.
        ({}, chat((U, "a"), (U, "b"), (A, "c"), (A, "d")),
         "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n▮cd<|im_end|>▮"),
        # An empty reply trains the end of the turn.
        ({}, chat((U, "q"), (A, "")), "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n▮<|im_end|>▮"),
        # SWIFT keeps the last round only.
        ({"use_chat_template": False}, TWO, "SYSq1▮r1▮q2▮r2<eos>▮"),
        ({"use_chat_template": False, "loss_scale": "all"}, TWO, "S▮YSq1r1q2r2<eos>▮"),
        # Typed special tokens are text: they decode to themselves but are not the tokens.
        ({}, chat((U, "<|im_end|>"), (A, "<|im_start|>")),
         "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n▮<|im_start|><|im_end|>▮"),
    ],
)  # fmt: skip
def test_traps(settings: dict[str, Any], messages: Any, expected: str, every_family: str) -> None:
    encoder = Encoder(every_family, **{"template": "chatml", **settings})
    sample = encoded(encoder, messages)
    assert shown(encoder, sample) == expected
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    if settings.get("use_chat_template", True):
        turns = expected.count("<|im_start|>") - ("▮<|im_start|>" in expected)
        assert sample.input_ids.tolist().count(end) == turns


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat((U, "q")), "no assistant message"),
        (chat((U, "q"), (A, "r", False)), "no trained token"),
        (chat((U, "q"), (S, "late"), (A, "r")), "a system message that is not the first message"),
    ],
)
def test_rows_that_teach_nothing_are_dropped_with_the_reason(messages: Any, reason: str, every_family: str) -> None:
    (dropped,) = Encoder(every_family, template="chatml").encode_batch([{"messages": messages}])
    assert dropped == Dropped(reason)


def test_the_dummy_family_asks_with_the_models_own_chat_template(every_family: str) -> None:
    encoder = Encoder(every_family, template="dummy")
    assert encoder.tokenizer.decode(encoder.encode_prompt(chat((U, "Q")))).endswith(
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown(encoder, encoded(encoder, ONE)) == "Q▮R<eos>▮"


def test_an_own_chat_template_takes_tools_and_weights(family_dir: Callable[[str], str]) -> None:
    encoder = Encoder(family_dir("qwen3"), template_backend="jinja", agent_template="hermes", loss_scale="hermes")
    call, answer = encoder.encode_batch([{"messages": LOOP, "tools": [WEATHER]}])
    assert isinstance(call, Encoded) and isinstance(answer, Encoded)
    expected = agent_layout("qwen3_nothinking", "hermes", LOOP, [WEATHER], loss_scale="hermes")
    empty = "<think>\n\n</think>\n\n"
    until_call = shown(encoder, call).replace("2:", "").replace("▮▮", "").replace(empty, "")
    assert expected.startswith(until_call) and until_call.endswith("</tool_call><|im_end|>▮")
    assert shown(encoder, answer).endswith(f"{empty}▮R<|im_end|>▮")
    assert call.loss_scale is not None and call.loss_scale.max() == 2.0
    special = Encoder(family_dir("qwen3"), template_backend="jinja", agent_template="glm4")
    (dropped,) = special.encode_batch([{"messages": LOOP}])
    assert dropped == Dropped("agent template glm4 needs a template family (--template)")


def test_half_a_surrogate_pair_is_a_replacement_character(every_family: str) -> None:
    encoder = Encoder(every_family, template="dummy")
    first, second = encoder.encode_batch([{"messages": chat((U, "a \ud800 b"), (A, "R"))}, {"messages": ONE}])
    assert isinstance(first, Encoded) and isinstance(second, Encoded)
    assert shown(encoder, first) == "a \ufffd b▮R<eos>▮" and shown(encoder, second) == "Q▮R<eos>▮"


def test_columns_hold_what_the_samples_hold(every_family: str) -> None:
    encoder = Encoder(every_family, template="chatml", loss_scale="hermes", max_length=12, truncation_strategy="split")
    rows = [{"messages": messages} for messages in (TWO, [], chat((U, "q"), (A, "<tool_call>1</tool_call>")), ONE)]
    columns, samples = encoder.encode_columns(rows), encoder.encode_batch(rows)
    kept = [sample for sample in samples if isinstance(sample, Encoded)]
    assert list(columns.dropped) == [sample for sample in samples if isinstance(sample, Dropped)]
    assert columns.rows.tolist() == [sample.row for sample in kept]
    assert columns.offsets.tolist() == np.cumsum([0, *(len(sample.input_ids) for sample in kept)]).tolist()
    assert columns.input_ids.tolist() == np.concatenate([sample.input_ids for sample in kept]).tolist()
    assert columns.labels.tolist() == np.concatenate([sample.labels for sample in kept]).tolist()
    assert columns.loss_scale is not None and columns.loss_scale.dtype == np.float32
    nothing = encoder.encode_columns([])
    assert nothing.offsets.tolist() == [0] and not len(nothing.input_ids) and nothing.loss_scale is None


# --- the fast tokenizer -----------------------------------------------------------------------------------------


def texts_of_the_test_data() -> list[str]:
    with gzip.open(DATA / "pretrain_en.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    for line in (DATA / "gsm8k_40.jsonl").read_text(encoding="utf-8").splitlines():
        texts += json.loads(line).values()
    texts += [json.dumps(row, ensure_ascii=False) for row in json.loads((DATA / "glaive_toolcall_3.json").read_text())]
    chinese = "请您现在给我您的答案。您需要提供一个问题或情境，我才能回答您。请问您需要问什么？１２３，ＡＢＣ"
    texts += [chinese[start:end] for start in range(0, 20, 3) for end in range(start + 1, len(chinese), 5)]
    return texts


@pytest.mark.parametrize("model", ["smollm2_dir", "qwen_dir"])
def test_the_fast_tokenizer_gives_the_same_ids(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(model))
    monkeypatch.setenv(FAST_TOKENIZER, "0")
    plain = SegmentTokenizer(tokenizer).outer
    monkeypatch.delenv(FAST_TOKENIZER)
    monkeypatch.setattr(segments._Adaptive, "CHARACTERS_PER_ENTRY", 0)
    used: list[int] = []
    fast_ids = segments._fast_ids
    monkeypatch.setattr(segments, "_fast_ids", lambda *args: (used.append(len(args[1])), fast_ids(*args))[1])
    fast = SegmentTokenizer(tokenizer).outer
    texts = texts_of_the_test_data()
    specials = [f"a{token}b{token} <|im_start|>{token}\n" for token in tokenizer.all_special_tokens]
    expected, found = plain([*texts, *specials]), fast([*texts, *specials])
    assert len(used) == 2  # the self-test, and the texts
    assert expected[0].tolist() == found[0].tolist() and expected[1].tolist() == found[1].tolist()
    assert not set(tokenizer.all_special_ids) & set(found[0].tolist())


@pytest.mark.parametrize("fault", ["differs", "fails"])
def test_a_fast_tokenizer_that_is_wrong_is_not_used(
    fault: str, every_family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def wrong(backend: Any, texts: list[str]) -> Any:
        if fault == "fails":
            raise RuntimeError("cannot")
        return np.zeros(1, np.int32), np.ones(1, np.int64)

    tokenizer = AutoTokenizer.from_pretrained(every_family)
    monkeypatch.setattr(segments._Adaptive, "CHARACTERS_PER_ENTRY", 0)
    monkeypatch.setattr(segments, "_fast_ids", wrong)
    ids, lengths = SegmentTokenizer(tokenizer).outer(["hello world", "one"])
    assert ids.tolist() == [*tokenizer("hello world")["input_ids"], *tokenizer("one")["input_ids"]]
    assert lengths.sum() == len(ids)
