"""Bytes of tokens, and the log probabilities of a prompt."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from rayswift.generate.logprobs import logprob_entry, prompt_logprobs, token_bytes
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


def test_another_vllm_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    from rayswift import private

    for chat in (SimpleNamespace(), SimpleNamespace(_create_chat_logprobs=lambda other: None)):
        private.report.cache_clear()
        private.correct_token_bytes(SimpleNamespace(state=SimpleNamespace(openai_serving_chat=chat)), bytes)
        assert "half a character" in caplog.messages[-1]


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
