"""``--to_gguf``: a model folder as one GGUF file, for llama.cpp, Ollama and Transformers' ``gguf_file``.

The package ``gguf`` (llama.cpp's own) names the tensors, packs the weights and writes the file; what it does not know
of a model, this module reads from the folder: sizes, the tokenizer's kind, and the order of rotary rows.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rayswift.errors import UserError
from rayswift.files import parse_json
from rayswift.modeling.loading import read_config, read_safetensors_header, weight_files

#: Transformers' model_type -> GGUF architecture: decoders whose layers differ in nothing but what the config says.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: How a byte-level tokenizer splits text -> llama.cpp's name for it. A key is the regular expression of its Split, or
#: the kinds of its steps where it has none.
_PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+": "llama-bpe",
    "Digits ByteLevel": "smollm",
    "ByteLevel": "gpt-2",
}
#: Types too coarse for the embeddings and the output head; llama.cpp's own mixes keep more bits there too.
_COARSE = ("q4_0", "q4_1", "q5_0", "q5_1")
_BLOCK = 32  # weights that share a scale in every one of these types


def file_name(name: str, kind: str) -> str:
    """What the file is called: ``<model>-q8_0.gguf``."""
    return f"{Path(name).name}-{kind}.gguf"


def check_convertible(model_dir: str) -> None:
    """Refuse what this conversion does not do, before any weight is read.

    Raises:
        UserError: names --model and what of it has no GGUF form here.
    """
    config = read_config(model_dir)
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(
            f"--to_gguf: no conversion for model_type {kind} (has {known}); llama.cpp's convert_hf_to_gguf.py may do it"
        )
    if config.get("quantization_config"):
        raise UserError(f"--to_gguf: {model_dir} is quantised; give the model it was made from")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"--to_gguf: no conversion for rope_type {rope.get('rope_type', rope.get('type'))}")
    _tokenizer_kind(_read_tokenizer(model_dir), model_dir)


def write_gguf(model_dir: str, path: str, kind: str, name: str) -> None:
    """Write the model as one file; one tensor is in memory at a time."""
    import gguf
    from safetensors import safe_open

    config = read_config(model_dir)
    arch = _ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch)
    _add_settings(writer, config, name, kind)
    _add_tokenizer(writer, model_dir, config["vocab_size"])
    names = _tensor_names(model_dir, arch, config["num_hidden_layers"])
    for gguf_name, shape in names.values():
        type_ = _tensor_type(gguf_name, shape, kind)
        size = prod(gguf.quant_shape_to_byte_shape(shape, type_))
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), size, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    where = {name: path for path in weight_files(model_dir) for name in read_safetensors_header(path)}
    files = {path: safe_open(path, framework="pt") for path in set(where.values())}
    for hf_name, (gguf_name, shape) in names.items():
        tensor = files[where[hf_name]].get_tensor(hf_name).float().numpy()
        values = _permuted(hf_name, tensor, config) if arch == "llama" else tensor
        writer.write_tensor_data(gguf.quants.quantize(values, _tensor_type(gguf_name, shape, kind)))
    writer.close()


def _add_settings(writer: Any, config: dict[str, Any], name: str, kind: str) -> None:
    import gguf

    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_rope_dimension_count(head_dim)


def _read_tokenizer(model_dir: str) -> dict[str, Any]:
    path = Path(model_dir) / "tokenizer.json"
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--to_gguf: {model_dir} has no tokenizer.json, the source of the vocabulary") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return content


def _tokenizer_kind(tokenizer: dict[str, Any], model_dir: str) -> str:
    """llama.cpp's name for how this tokenizer splits text; its own list is by name too."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    key = patterns[0] if patterns else " ".join(step.get("type", "") for step in steps)
    if model.get("type") != "BPE" or model.get("byte_fallback") or key not in _PRE_TOKENIZERS:
        raise UserError(
            f"--to_gguf: the tokenizer of {model_dir} is of a kind that has no conversion here (byte-level BPE as"
            " Qwen, Llama 3 and SmolLM have it); llama.cpp's convert_hf_to_gguf.py may do it"
        )
    return _PRE_TOKENIZERS[key]


def _add_tokenizer(writer: Any, model_dir: str, vocab_size: int) -> None:
    import gguf

    tokenizer = _read_tokenizer(model_dir)
    tokens = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    size = max(vocab_size, max(tokens) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_tokenizer_kind(tokenizer, model_dir))
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    gguf.SpecialVocab(model_dir, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _tensor_names(model_dir: str, arch: str, layers: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name of each tensor -> its GGUF name and shape, in the order in which they are written."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[arch], layers)
    found = {}
    for path in weight_files(model_dir):
        for name, tensor in read_safetensors_header(path).items():
            gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise UserError(f"--to_gguf: {path.name} holds {name}, which GGUF's {arch} has no place for")
            found[name] = (gguf_name, tuple(tensor["shape"]))
    return found


def _permuted(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Query and key rows in llama.cpp's order: the two halves of each head's rotary pairs side by side."""
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".q_proj." not in name:
        return tensor
    pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _tensor_type(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """The type of one tensor: norms and biases stay float32, rows that no block divides float16."""
    import gguf

    if len(shape) < 2:
        kind = "f32"
    elif name in ("token_embd.weight", "output.weight") and kind in _COARSE:
        kind = "q8_0"
    if kind.startswith("q") and shape[-1] % _BLOCK:
        kind = "f16"
    return gguf.GGMLQuantizationType[kind.upper()]
