"""Rows that are joined to one sequence lose nothing: each gets the loss it has alone, with every attention."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rayswift.data.tokens.table import TokenizedRow
from rayswift.modeling.loading import load_model, load_tokenizer
from rayswift.modeling.varlen_attention import FUSED, NAME, fused_attention, varlen_attention
from rayswift.train.collate import flatten, pad

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Two plus two makes four.",
    "In winter the days are short; the sun rises late and sets early, and people stay at home by the fire.",
    "No.",
]


@pytest.fixture(scope="module", params=["random", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def model_dir(request: pytest.FixtureRequest, smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two random layers, strong enough that each token's loss depends on those before it; or a real model."""
    if request.param == "SmolLM2":
        return smollm2_dir
    from tiny_models import llama

    folder = str(tmp_path_factory.mktemp("random"))
    llama(vocab_size=49152, initializer_range=0.3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(smollm2_dir: str) -> list[TokenizedRow]:
    tokenizer = load_tokenizer(smollm2_dir)
    found = []
    for text in TEXTS:
        ids = np.array(tokenizer(text)["input_ids"], np.int32)
        found.append(TokenizedRow(ids, np.where(np.arange(len(ids)) > 0, ids, -100).astype(np.int32)))
    return found


def model_of(model_dir: str, attention: str, dtype: str = "float32") -> Any:
    return load_model(model_dir, torch_dtype=dtype, attn_impl=attention).eval()


def losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Loss of each trained token, in order; float32."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
    every = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return every[labels[:, 1:].flatten() != -100]


def per_row(values: torch.Tensor, rows: list[TokenizedRow]) -> torch.Tensor:
    return torch.stack([part.mean() for part in values.split([len(row.input_ids) - 1 for row in rows])])


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [(NAME, "float32", 1e-5), (NAME, "bfloat16", 5e-3), ("sdpa", "float32", 1e-5), ("eager", "float32", 1e-5)],
)
def test_a_joined_row_has_the_loss_it_has_alone(
    attention: str, dtype: str, tolerance: float, model_dir: str, rows: list[TokenizedRow]
) -> None:
    model = model_of(model_dir, attention, dtype)
    alone = torch.stack([losses(model, pad([row], 0)).mean() for row in rows])
    joined = per_row(losses(model, flatten(rows)), rows)
    assert joined.tolist() == pytest.approx(alone.tolist(), rel=tolerance)
    # The rows are different enough for this to mean something.
    assert alone.std() > 0.1


def test_padded_batches_are_what_they_are_under_sdpa(model_dir: str, rows: list[TokenizedRow]) -> None:
    found = [losses(model_of(model_dir, attention), pad(rows, 0)) for attention in (NAME, "sdpa")]
    assert torch.allclose(*found, rtol=1e-5)


def test_gradients_are_those_of_the_rows_alone(model_dir: str, rows: list[TokenizedRow]) -> None:
    gradients = []
    for batches in ([flatten(rows)], [pad([row], 0) for row in rows]):
        model = model_of(model_dir, NAME).train()
        for batch in batches:
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert gradients[0].abs().max() > 0.1
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_a_sliding_window_is_kept(rows: list[TokenizedRow]) -> None:
    """Against the mask that Transformers itself builds for joined rows."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=50_000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    found = []
    for attention in ("sdpa", NAME):
        model.set_attn_implementation(attention)
        found.append(losses(model, flatten(rows)))
    assert torch.allclose(*found, rtol=1e-5)
    model.config.sliding_window = None
    assert not torch.allclose(found[0], losses(model, flatten(rows)), rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_one_call_for_all_rows_is_each_row_alone(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """What PyTorch's kernel for GPUs is given: by its documentation, written out."""
    lengths, bounds = [5, 1, 7], torch.tensor([0, 5, 6, 13], dtype=torch.int32)

    def kernel(query: Any, key: Any, value: Any, starts: Any, _: Any, most: int, __: int, **settings: Any) -> Any:
        assert (query.shape, key.shape, most, settings["enable_gqa"]) == ((13, 4, 8), (13, 2, 8), 7, True)
        back, ahead = settings["window_size"]
        parts = []
        for begin, end in itertools.pairwise(starts.tolist()):
            q, k, v = (one[begin:end].transpose(0, 1) for one in (query, key, value))
            apart = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            seen = (apart >= -ahead) & ((apart <= back) | (back == -1))
            parts.append(torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=settings["scale"], enable_gqa=True).transpose(0, 1))  # fmt: skip
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    module: Any = SimpleNamespace(num_key_value_groups=2)
    settings: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "cu_seq_lens_q": bounds}
    wanted, _ = varlen_attention(module, query, key, value, None, **settings)
    found, _ = fused_attention(module, query, key, value, None, **settings, max_length_q=7)
    assert torch.allclose(found, wanted, atol=1e-6)
    for unknown in ({"softcap": 5.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match=FUSED):
            fused_attention(module, query, key, value, None, **settings, max_length_q=7, **unknown)
    padded, alone = (attention(module, query, key, value, None, scaling=0.3)[0]
                     for attention in (fused_attention, varlen_attention))  # fmt: skip
    assert torch.equal(padded, alone)
