"""Tiny random-weight models and the tuner arguments they are trained with, built by script in milliseconds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

LORA_DEFAULTS = {
    "lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.05, "lora_bias": "none", "lora_dtype": None,
    "target_modules": ["all-linear"], "target_regex": None, "target_parameters": [],
    "modules_to_save": [], "use_rslora": False,
    "use_dora": False, "init_weights": "true",
}  # fmt: skip


def llama_config(**changes: Any) -> Any:
    """A two-layer Llama configuration with tied embeddings and grouped key/value heads."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(sizes | changes))


def llama(seed: int = 0, **changes: Any) -> Any:
    """A float32 Llama with random weights from ``seed``."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def qwen3_mixture(seed: int = 0, **changes: Any) -> Any:
    """A float32 Qwen3 mixture of four experts, two of them at a time, with random weights from ``seed``."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "decoder_sparse_step": 1,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(sizes | changes))).eval()


def qwen25_half_billion_on_meta() -> Any:
    """Qwen2.5-0.5B as its configuration describes it, without storage."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


def word_tokenizer(vocab_size: int = 160) -> Any:
    """A word-level tokenizer of ``vocab_size`` entries with the special tokens that ``llama_config`` names."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def lora_args(**changes: Any) -> Any:
    """SWIFT's default LoRA arguments with ``changes``."""
    return SimpleNamespace(**(LORA_DEFAULTS | changes))


def randomise_lora(model: Any, std: float = 0.1) -> None:
    """Give the adapter an effect (LoRA starts as zero)."""
    import torch

    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=std)
