"""``--new_special_tokens``: room is made for them, they are trained and saved, and come back, merged or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama, word_tokenizer

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.modeling.adapters import load_adapter
from rayswift.modeling.loading import add_special_tokens, load_model, load_tokenizer, read_config
from rayswift.modeling.merging import merge_adapter
from rayswift.train.model import build_model, reference_model

TOKENS = ["<a>", "<b>"]
IDS = torch.tensor([[5, 6, 160, 7, 161, 8]])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Enough for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def arguments(**flags: Any) -> Any:
    return make_arguments("rlhf", model="m", dataset=["d"], new_special_tokens=TOKENS, lora_dropout=0,
                          gradient_checkpointing=False, **flags)  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_an_adapter_trains_the_new_rows_and_no_other(folder: str, tmp_path: Path) -> None:
    dtype = "float32" if read_config(folder)["tie_word_embeddings"] else "bfloat16"
    model = build_model(arguments(), folder, dtype, None)
    before = model.get_input_embeddings()(torch.arange(162)).detach().clone()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.get_input_embeddings()(torch.arange(162)).detach()
    assert [row for row in range(162) if not torch.equal(before[row], after[row])] == [160, 161]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(folder, torch_dtype=dtype)
    add_special_tokens(again, load_tokenizer(folder), TOKENS)
    torch.testing.assert_close(logits(load_adapter(again, str(tmp_path / "adapter"))), expected)
    merged = merge_adapter(str(tmp_path / "adapter"), folder, str(tmp_path / "merged"), new_special_tokens=TOKENS,
                           torch_dtype="float32")  # fmt: skip
    if dtype == "float32":
        found = logits(load_model(merged, torch_dtype="float32"))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert load_tokenizer(merged).convert_tokens_to_ids(TOKENS) == [160, 161]


def test_full_training_and_its_reference_have_room_for_them(folder: str) -> None:
    args = arguments(train_type="full")
    for model in (build_model(args, folder, "float32", None), reference_model(args, folder, "float32")):
        assert logits(model).shape[-1] >= 162


def test_full_training_has_float32_weights_unless_asked_otherwise(folder: str) -> None:
    for pure, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        args = arguments(train_type="full", pure_bf16=pure)
        for model in (build_model(args, folder, "bfloat16", None), reference_model(args, folder, "bfloat16")):
            assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_layers_that_are_trained_anyway_are_left_to_that(folder: str) -> None:
    for flags in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["all-embedding"]}):
        assert logits(build_model(arguments(**flags), folder, "float32", None)).shape[-1] >= 162


def test_new_rows_are_not_sharded() -> None:
    with pytest.raises(UserError, match="--new_special_tokens contradicts --deepspeed zero3"):
        arguments(deepspeed="zero3")
