"""A base model trained with a template that is not its own: its checkpoints carry that to programs without families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from arguments.reads import training_here
from tiny_models import llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from rayswift import train
from rayswift.arguments import make_arguments
from rayswift.data.chat.families import load_templates
from rayswift.data.tokens.carried_template import carry_ends, carry_template
from rayswift.data.tokens.encoder import Encoder
from rayswift.modeling.loading import load_tokenizer
from rayswift.modeling.merging import merge_adapter

ROW = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]}
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def base(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a chat template that stops at <|endoftext|>, as base models do."""
    folder = tmp_path_factory.mktemp("base")
    model = llama(vocab_size=49152, max_position_embeddings=256)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained(base: str, folder: Path, **flags: Any) -> str:
    (folder / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 4)
    args = make_arguments(
        "sft", model=base, dataset=[str(folder / "rows.jsonl")], output_dir=str(folder / "out"), max_steps=1,
        gradient_accumulation_steps=1, torch_dtype="float32", num_workers=1, split_dataset_ratio=0, report_to="none",
        template="chatml", **flags,
    )  # fmt: skip
    with training_here():
        return str(train.sft(args)["last_model_checkpoint"])


class _Say(LogitsProcessor):
    """Lets the third token be the one that ends a turn."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.end if input_ids.shape[1] == self.start + 2 else 100
        return scores.fill_(-1e9).index_fill_(1, torch.tensor([token]), 0.0)


@pytest.mark.slow
def test_a_checkpoint_prompts_and_stops_as_it_was_trained(base: str, tmp_path: Path) -> None:
    """From outside: with plain Transformers, of full training and of an adapter that is merged."""
    for number, flags in enumerate(({"train_type": "full"}, {})):
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint = trained(base, folder, **flags)
        if not flags:
            checkpoint = merge_adapter(checkpoint, base, str(folder / "merged"))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        assert prompt == Encoder(base, template="chatml").encode_prompt(ASKED)
        model, end = AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer.convert_tokens_to_ids("<|im_end|>")
        said = LogitsProcessorList([_Say(len(prompt), end)])
        found = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, logits_processor=said)
        assert found[0, len(prompt) :].tolist() == [100, 100, end]


@pytest.mark.slow
def test_every_family_is_carried_as_it_is_laid_out_or_left_out(smollm2_dir: str) -> None:
    tokenizer, left_out = load_tokenizer(smollm2_dir), []
    for name in load_templates():
        tokenizer.chat_template = None
        left_out += [] if carry_template(Encoder(smollm2_dir, template=name), tokenizer) else [name]
    assert left_out == ["deepseek_r1", "deepseek_v3_1", "dummy"]


def test_a_models_own_template_and_ends_stay(smollm2_dir: str) -> None:
    tokenizer = load_tokenizer(smollm2_dir)
    own = tokenizer.chat_template
    for template in (None, "smollm2"):
        assert carry_template(Encoder(smollm2_dir, template=template), tokenizer) and tokenizer.chat_template == own
    config = GenerationConfig(eos_token_id=2)
    carry_ends(Encoder(smollm2_dir), config)
    assert config.eos_token_id == 2
    carry_template(Encoder(smollm2_dir, template="llama3"), tokenizer)
    with pytest.raises(Exception, match="no format for tools"):
        tokenizer.apply_chat_template(ASKED, tools=[{"type": "function"}], tokenize=False)
