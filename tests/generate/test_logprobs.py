"""Bytes of tokens, and the log probabilities of a prompt."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from rayswift.generate.logprobs import REPLACEMENT, logprob_entry, prompt_logprobs, token_bytes, token_names
from rayswift.generate.vllm_pool import openai_logprobs

TEXT = "naïve Ünïcödé 数据 🦙 \N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def byte_level(smollm2_dir: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """A tokenizer with SentencePiece's pieces for bytes."""
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁a": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def halves_of(tokenizer: Any) -> list[int]:
    """Two tokens that are parts of characters."""
    ids = dict.fromkeys(tokenizer.encode("🦙Ü\N{SNOWMAN}", add_special_tokens=False))
    return [token for token in ids if REPLACEMENT in tokenizer.decode([token])][:2]


def test_the_bytes_of_tokens_add_up_to_the_text(byte_level: Any) -> None:
    ids = byte_level.encode(TEXT, add_special_tokens=False)
    halves = [token for token in ids if "\N{REPLACEMENT CHARACTER}" in byte_level.decode([token])]
    assert len(halves) > 4, "some tokens are half a character"
    assert b"".join(token_bytes(byte_level, token) for token in ids) == TEXT.encode()


def test_the_bytes_of_pieces_for_bytes_are_those(byte_fallback: Any) -> None:
    assert [token_bytes(byte_fallback, byte + 2) for byte in (0xE6, 0x95, 0xB0)] == [b"\xe6", b"\x95", b"\xb0"]
    assert token_bytes(byte_fallback, 1) in (b"a", b" a")


def test_entries_of_every_engine_have_the_tokens_own_bytes(byte_level: Any) -> None:
    half = byte_level.encode("数", add_special_tokens=False)[0]
    entry = logprob_entry(byte_level, [(half, -1.0), (half, -1.0)])
    own = list(token_bytes(byte_level, half))
    assert entry["bytes"] == entry["top_logprobs"][0]["bytes"] == own != list("\N{REPLACEMENT CHARACTER}".encode())
    pooled = openai_logprobs(byte_level, [half], [{half: {"logprob": -1.0, "rank": 1}}])
    assert pooled is not None and pooled["content"][0]["bytes"] == own


def test_vllms_server_gives_them_too(byte_level: Any) -> None:
    """On a stand-in of its app: the answer of the real one is in the table that deployments are asked."""
    from rayswift import private

    half = byte_level.encode("数", add_special_tokens=False)[0]

    def create(token_ids: list[int], top_logprobs: list[dict[int, Any]], **options: Any) -> Any:
        entries = [SimpleNamespace(bytes=[], top_logprobs=[SimpleNamespace(bytes=[]) for _ in step])
                   for step in top_logprobs]  # fmt: skip
        return SimpleNamespace(content=entries)

    chat = SimpleNamespace(_create_chat_logprobs=create)
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_chat=chat))
    private.correct_token_bytes(app, lambda token: token_bytes(byte_level, token))
    (entry,) = chat._create_chat_logprobs(token_ids=[half], top_logprobs=[{half: None, 33: None}]).content
    assert entry.bytes == list(token_bytes(byte_level, half))
    assert [other.bytes for other in entry.top_logprobs] == [entry.bytes, [49]]


def test_tokens_of_one_place_have_names_of_their_own(byte_level: Any, byte_fallback: Any) -> None:
    """Names are keys of an object: two tokens with one text must not be one entry."""
    halves = halves_of(byte_level)
    own = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(byte_level, half)) for half in halves]
    assert len(set(own)) == 2
    assert token_names(byte_level, [(halves[0], ""), (halves[1], REPLACEMENT), (33, "1"), (34, "1")]) == [
        *own, "1", "token_id:34",
    ]  # fmt: skip
    assert token_names(byte_fallback, [(0xE6 + 2, "数"), (1, "a"), (1 + 1, "a")]) == ["bytes:\\xe6", "a", "token_id:2"]
    whole = byte_level.encode(" naïve", add_special_tokens=False)
    texts = [byte_level.decode([token]) for token in whole]
    assert token_names(byte_level, zip(whole, texts, strict=True)) == texts


@pytest.mark.parametrize("as_ids", [False, True])
def test_completions_keep_every_alternative_and_the_chosen_tokens_own_value(byte_level: Any, as_ids: bool) -> None:
    """The token that was chosen is not the likeliest, and another with its text is less likely still."""
    from rayswift.serve.replica.openai_answers import Shape

    half, other = halves_of(byte_level)
    place = [(half, -2.0), (33, -0.5), (other, -4.0), (34, -5.0)]
    shape = Shape("m", False, byte_level, [[1]], tokens_as_ids=as_ids)
    found = shape._logprobs(0, [place, place])
    assert found is not None
    assert found["token_logprobs"] == [-2.0, -2.0] and found["text_offset"][0] == 0
    for token, top in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert list(top.values()) == [-2.0, -0.5, -4.0, -5.0]
        assert top[token] == -2.0
        assert max(top.values()) == -0.5  # what lm-eval's "is greedy" compares with the token's own


def test_vllms_completions_keep_them_too(byte_level: Any) -> None:
    from rayswift import private

    half, other = halves_of(byte_level)

    def create(token_ids: list[int], top_logprobs: list[Any], **options: Any) -> Any:
        return SimpleNamespace(tokens=[""] * len(token_ids), top_logprobs=[None] * len(token_ids))

    def creating(
        token_ids: Any, top_logprobs: Any, num_output_top_logprobs: Any, tokenizer: Any, logprob_token_ids: Any = None,
        initial_text_offset: int = 0, return_as_token_id: Any = None,
    ) -> Any:  # fmt: skip
        return create(token_ids, top_logprobs)

    def decoded(logprob: Any, token: int, tokenizer: Any) -> str:
        return "" if token in (half, other) else str(tokenizer.decode([token]))

    completion = SimpleNamespace(
        _create_completion_logprobs=creating, _get_decoded_token=decoded, return_tokens_as_token_ids=False
    )
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_completion=completion))
    private.name_completion_tokens(app, lambda tokens: token_names(byte_level, tokens))
    values = {33: -0.5, half: -2.0, other: -4.0, 34: -math.inf, 35: -6.0}
    step = {token: SimpleNamespace(logprob=value) for token, value in values.items()}
    found = completion._create_completion_logprobs(
        token_ids=[half, half], top_logprobs=[None, step], num_output_top_logprobs=3, tokenizer=byte_level
    )
    assert found.tokens == token_names(byte_level, [(half, "")]) * 2
    assert found.top_logprobs[0] is None
    assert list(found.top_logprobs[1].values()) == [-2.0, -0.5, -4.0, -9999.0]
    assert found.top_logprobs[1][found.tokens[1]] == -2.0
    kept = completion._create_completion_logprobs([half], [step], 3, byte_level, return_as_token_id=True)
    assert kept.top_logprobs == [None]  # token_id:N is a name of its own already


def test_another_vllm_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    from rayswift import private

    for chat in (SimpleNamespace(), SimpleNamespace(_create_chat_logprobs=lambda other: None)):
        private.report.cache_clear()
        private.correct_token_bytes(SimpleNamespace(state=SimpleNamespace(openai_serving_chat=chat)), bytes)
        assert "half a character" in caplog.messages[-1]
        private.name_completion_tokens(SimpleNamespace(state=SimpleNamespace(openai_serving_completion=chat)), list)
        assert "loses tokens" in caplog.messages[-1]


def test_a_prompt_in_parts_has_the_log_probabilities_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_models import llama

    from rayswift.generate import logprobs

    model = llama()
    prompt = torch.randint(3, 160, (23,)).tolist()
    whole = prompt_logprobs(model, prompt, 2)
    monkeypatch.setattr(logprobs, "_PASS", 5)
    parts = prompt_logprobs(model, prompt, 2)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(whole) == len(parts) == 22
    for place, (one, other) in enumerate(zip(whole, parts, strict=True)):
        assert [token for token, *_ in one] == [token for token, *_ in other]
        assert one[0][0] == prompt[place + 1] and one[1][2] == 1 and one[2][2] == 2
        assert one[0][1] == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-4)
        assert other[0][1] == pytest.approx(one[0][1], abs=1e-4)
        assert one[0][2] == int((expected[place] > expected[place, prompt[place + 1]]).sum()) + 1
    assert json.dumps(whole)  # plain numbers
