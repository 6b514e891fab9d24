"""``--rope_scaling`` and ``--max_model_len``: what they make of a model's configuration, wherever it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama, word_tokenizer

from rayswift.arguments import make_arguments
from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate.transformers import context_length
from rayswift.modeling.loading import load_model, read_config
from rayswift.modeling.positions import changed_positions, longest
from rayswift.train.model import find_model

OLD = {"max_position_embeddings": 128, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("config", "scaling", "length", "expected"),
    [
        (OLD, "yarn", 512, {"rope_parameters": YARN, "max_position_embeddings": 512}),
        (OLD, "yarn", 500, {"rope_parameters": YARN, "max_position_embeddings": 500}),
        (OLD, {"type": "yarn", "factor": 4.0}, None, {"rope_parameters": YARN, "max_position_embeddings": 512}),
        ({**OLD, "max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
          "original_max_position_embeddings": 128}}, "yarn", 1024,
         {"rope_parameters": {**YARN, "factor": 8.0}, "max_position_embeddings": 1024}),
        ({**OLD, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "linear", 256,
         {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
          "max_position_embeddings": 256}),
        (OLD, "dynamic", 256, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5},
                               "max_position_embeddings": 128}),
        (OLD, None, 64, {"max_position_embeddings": 64}),
        (OLD, None, None, {}),
    ],
)  # fmt: skip
def test_what_changes_in_a_configuration(config: Any, scaling: Any, length: int | None, expected: Any) -> None:
    assert changed_positions(config, scaling, length) == expected


def test_how_far_it_goes_must_be_said() -> None:
    with pytest.raises(UserError, match="--rope_scaling: how far"):
        changed_positions(OLD, "yarn", None)
    with pytest.raises(UserError, match="no positions of one kind"):
        changed_positions({"rope_parameters": {"full_attention": {}}, **OLD}, "yarn", 512)


def test_it_is_asked_before_a_cluster_is(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--rope_scaling: how far"):
        find_model(make_arguments("sft", model=str(tmp_path), dataset=["d"], rope_scaling="yarn"))


def test_a_model_is_loaded_with_them_and_prompts_may_be_as_long(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    args = make_arguments("sft", model=str(tmp_path), dataset=["d"], rope_scaling="yarn", max_model_len=512)
    model = load_model(str(tmp_path), torch_dtype="float32", model_kwargs=args.model_kwargs)
    plain = load_model(str(tmp_path), torch_dtype="float32")
    assert model.config.max_position_embeddings == 512 and model.config.rope_parameters["rope_type"] == "yarn"
    ids = torch.arange(3, 100)[None]
    assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), torch_dtype="float32")
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
    assert Encoder.for_training(args, str(tmp_path)).max_length == 512
    assert context_length(Encoder(str(tmp_path)), args.positions) == 512
    assert longest(read_config(str(tmp_path)), {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}) == 384
    answered = make_arguments("infer", model=str(tmp_path)).with_saved(args.to_dict())
    assert answered.model_kwargs == {"rope_scaling": "yarn", "max_model_len": 512}
