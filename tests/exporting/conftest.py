"""A model, an adapter and a hub of the test's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Read when the client is imported: its four tries per listing would cost seven seconds in each test without a server.
os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A hub with the accounts alice (may write) and reader (may not); both clients retry without waiting."""
    from hub_server import running_hub
    from hub_uploads import Account
    from huggingface_hub import constants
    from huggingface_hub.utils import _http
    from modelscope_hub import _openapi, _upload

    with running_hub() as running:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms_home"))
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path / "rayswift"))
        # huggingface_hub read these from the environment when it was imported. Xet is a protocol of its own, spoken
        # with another server; without it the client sends large files as git LFS does.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for module in (_http, _openapi, _upload):
            without_waiting = {**vars(module.time), "sleep": lambda seconds: None}
            monkeypatch.setattr(module, "time", SimpleNamespace(**without_waiting))
        monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda self, response=None: None)
        running.uploads.accounts = {"alice-token": Account("alice"), "reader-token": Account("reader", write=False)}
        yield running


@pytest.fixture
def base_and_adapter(tmp_path: Path) -> tuple[str, str]:
    """A tiny base model folder, and a checkpoint of a LoRA run on it with its losses."""
    import json

    from tiny_models import llama, lora_args, randomise_lora, word_tokenizer

    from rayswift.modeling.adapters import add_lora

    base, run = tmp_path / "base", tmp_path / "v0-20250422-101811"
    llama().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    model = add_lora(llama(), lora_args())
    randomise_lora(model)
    model.save_pretrained(run / "checkpoint-3")
    settings = {"command": "sft", "model": str(base), "dataset": ["AI-ModelScope/alpaca-gpt4-data-zh#500"],
                "learning_rate": 1e-4, "lora_rank": 8, "hub_token": "***"}  # fmt: skip
    (run / "checkpoint-3" / "args.json").write_text(json.dumps(settings))
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    steps = [{"loss": 2.0 - step / 4, "token_acc": 0.5, "global_step/max_steps": f"{step}/4"} for step in (1, 2, 3, 4)]
    steps.insert(2, {"eval_loss": 1.25, "eval_token_acc": 0.6, "global_step/max_steps": "2/4"})
    (run / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    return str(base), str(run / "checkpoint-3")


@pytest.fixture
def byte_level_model(tmp_path: Path) -> str:
    """A tiny Llama with a byte-level BPE tokenizer of the kind that GPT-2 and SmolLM have."""
    from tiny_models import llama
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    folder = tmp_path / "tiny-chat"
    llama(vocab_size=320, hidden_size=64, intermediate_size=96).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)
