"""Load tokenizers and models from local folders, safetensors only, and read what a folder holds without loading it."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import sys
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from operator import index
from pathlib import Path
from typing import Any

from rayswift import private
from rayswift.errors import UserError, one_line
from rayswift.files import parse_json
from rayswift.modeling.positions import with_positions

logger = logging.getLogger("rayswift.modeling.loading")

DTYPES = ("bfloat16", "float16", "float32")
ATTN_IMPLS = {"flash_attn": "flash_attention_2"}  # SWIFT's short name; Transformers' own names pass through
SAFETENSORS_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
# What `folder_fingerprint` reads of a tensor, and about how much in all: a mixture of experts has 100,000 tensors, and
# each place costs a round trip on network storage.
_PLACES, _ALL_PLACES = 8, 8192
EMBEDDING_MULTIPLE = 64  # resized embeddings keep a row count that tensor cores and vLLM's sharding like


@dataclass(frozen=True)
class ParameterCounts:
    """What the weight files of a folder hold: number of parameters and their bytes on disk (tied weights once)."""

    parameters: int
    bytes: int


def read_config(model_dir: str) -> dict[str, Any]:
    """Return ``config.json`` of ``model_dir``. UserError when the folder or the file is missing or broken."""
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise UserError(f"--model {model_dir}: no such folder; give a model folder or a hub id")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--model {model_dir}: no config.json in it, so it is not a model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; download the model again")
    return config


def config_dtype(model_dir: str) -> str:
    """The dtype of the weights as ``config.json`` gives it; ``float32`` where it says nothing (as Transformers)."""
    config = read_config(model_dir)
    text_config = config.get("text_config") or {}
    dtype = (
        config.get("dtype") or config.get("torch_dtype") or text_config.get("dtype") or text_config.get("torch_dtype")
    )
    dtype = str(dtype).removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def resolve_dtype(requested: str | None, model_dir: str, use_gpu: bool, *, training: bool = True) -> str:
    """Decide the dtype to compute in: ``bfloat16``, ``float16`` or ``float32``.

    What the user asked for (``--torch_dtype``) is taken as it is. None takes ``config.json``'s dtype, except that
    training never starts from an accidental float32 or float16 (SWIFT 3.3 trains in bfloat16 too; float16 weights would
    need loss scaling), and that a device without bfloat16 computes in what it has: float16 on an old GPU, float32 on a
    CPU without bfloat16 instructions (there PyTorch's bfloat16 products are up to a hundred times slower; measured).
    """
    if requested is not None:
        if requested not in DTYPES:
            raise UserError(f"--torch_dtype {requested}: unknown; choose one of {', '.join(DTYPES)}")
        return requested
    dtype = config_dtype(model_dir)
    if training or dtype == "bfloat16" or (dtype == "float16" and not use_gpu):
        if supports_bfloat16(use_gpu):
            return "bfloat16"
        return "float16" if use_gpu else "float32"
    return dtype


def supports_bfloat16(use_gpu: bool) -> bool:
    """True when the device computes in bfloat16 at speed. A driver that sees no GPU itself trusts the workers' GPUs."""
    if not use_gpu:
        return private.cpu_has_bfloat16()
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _is_plain_tokenizer(model_dir: str) -> bool:
    """Whether ``tokenizer.json`` is all there is to the tokenizer: no class of its own, no code beside it.

    ``AutoTokenizer`` gives the same object then, but its import brings in PyTorch and the list of all models: ten
    seconds of CPU time in every process that reads data.
    """
    folder = Path(model_dir)
    try:
        config = parse_json((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    generic = isinstance(config, dict) and config.get("tokenizer_class") in (
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    )
    return generic and "auto_map" not in config and (folder / "tokenizer.json").is_file()


def load_tokenizer(model_dir: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of ``model_dir``; its pad token falls back to eos. UserError when there is none."""
    try:
        if _is_plain_tokenizer(model_dir):
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
        else:
            from transformers import AutoTokenizer

            options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(model_dir, **options)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length {tokenizer.model_max_length!r} is no number")
    except Exception as error:  # a folder with anything in it makes Transformers raise anything
        raise UserError(f"{model_dir}: its tokenizer cannot be loaded ({one_line(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model_dir: str,
    *,
    torch_dtype: str = "bfloat16",
    attn_impl: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    auto_class: str = "AutoModelForCausalLM",
    new_head: bool = False,
) -> Any:
    """Load a causal language model from ``model_dir`` in ``torch_dtype``, or a model of another ``auto_class``.

    Args:
        attn_impl: ``--attn_impl``: ``sdpa``, ``eager``, ``flash_attn`` (= ``flash_attention_2``), …; None: automatic.
        device: where the model goes (``"cuda"``, ``"cpu"``); None leaves it where Transformers puts it.
        model_kwargs: ``--model_kwargs``: further keywords of ``from_pretrained``, and ``rope_scaling`` and
            ``max_model_len`` as flags have them. ``{"use_safetensors": false}`` allows pickle weights
            (``pytorch_model.bin``) of a source the user trusts.
        new_head: the folder may lack the weights of the head that ``auto_class`` has on the model.

    Raises:
        UserError: no or broken weights, pickle weights, weights that do not fit the config, an unknown architecture.
    """
    import torch
    import transformers
    from transformers.utils import logging as transformers_logging

    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    options |= with_positions(read_config(model_dir), model_kwargs or {})
    if options["use_safetensors"]:
        parameter_counts(model_dir)  # a broken file is named here, before seconds of loading
    if attn_impl is not None:
        options["attn_implementation"] = ATTN_IMPLS.get(attn_impl, attn_impl)
    if not sys.stderr.isatty():  # worker logs, scripts: no bars
        transformers_logging.disable_progress_bar()
    try:
        loaded: Any = getattr(transformers, auto_class).from_pretrained(
            model_dir,
            dtype=getattr(torch, torch_dtype),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **options,
        )
    except Exception as error:
        raise load_error(error, model_dir, attn_impl) from error
    model, loading_info = loaded
    missing = sorted(loading_info["missing_keys"])
    if new_head:  # what lies beside the model's body
        missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if missing:  # Transformers would only warn, and go on with random numbers
        raise UserError(f"--model {model_dir}: its weight files lack {len(missing)} tensors, such as {missing[0]}")
    return model.to(device) if device is not None else model


def load_error(error: Exception, model_dir: str, attn_impl: str | None) -> Exception:
    """Turn what ``from_pretrained`` raises on bad input into a UserError; other failures (out of memory) stay."""
    text = one_line(error)
    ours = isinstance(error, RecursionError) or "size mismatch" in text or "mismatched" in text
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and not ours):
        return error
    if attn_impl is not None and ("attn" in text.lower() or "attention" in text.lower()):
        return UserError(f"--attn_impl {attn_impl}: {text}; leave the flag out for the automatic choice")
    if "trust_remote_code" in text:
        return UserError(f"--model {model_dir}: needs its own code; if you trust it, add --trust_remote_code true")
    return UserError(f"--model {model_dir}: cannot be loaded ({text})")


def weight_files(model_dir: str) -> list[Path]:
    """The safetensors files of ``model_dir``, all of those that its index names. UserError when there are none."""
    folder = Path(model_dir)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: cannot be read ({error}); download the model again") from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{model_dir}: {len(absent)} of {len(names)} weight files are missing, such as {absent[0]}")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"--model {model_dir}: holds only pickle weights (pytorch_model*.bin), which can run code when loaded; if "
            """you trust their source, add --model_kwargs '{"use_safetensors": false}'"""
        )
    raise UserError(f"--model {model_dir}: no weights (model.safetensors) in it")


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return ``{tensor name: {"dtype", "shape", "data_offsets"}}`` of a safetensors file without reading its data.

    UserError when the file is cut short or no safetensors file.
    """
    broken = UserError(f"{path}: broken or incomplete safetensors file; copy or download it again")
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) != 8:
            raise broken
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise broken
        try:
            header = parse_json(file.read(length))
            header.pop("__metadata__", None)
            spans = [(0, 0), *sorted(tuple(map(index, tensor["data_offsets"])) for tensor in header.values())]
            in_a_row = all(before[1] == start <= end for before, (start, end) in pairwise(spans))
            shapes = [prod(map(index, tensor["shape"])) for tensor in header.values()]
            known = all(isinstance(tensor["dtype"], str) for tensor in header.values())
        except (ValueError, TypeError, KeyError, AttributeError):
            raise broken from None
    size = 8 + length + spans[-1][1]
    if not (in_a_row and known) or min(shapes, default=0) < 0 or path.stat().st_size != size:
        raise broken
    return header


def model_fingerprint(model_dir: str) -> str:
    """What tells one model's weights from another's of the same shapes: a hash of every tensor's name, type, shape and
    some of its bytes. How the tensors are spread over files does not count. Milliseconds; not proof against forgery.
    """
    known: dict[str, Any] = {}
    for path in weight_files(model_dir):
        known |= _tensor_samples(path, 1)
    return _digest(sorted(known.items()))


def folder_fingerprint(folder: str) -> str:
    """What tells the model or adapter in a folder from another that lay or will lie there: its tensors, as
    :func:`model_fingerprint` in more places, and the files beside them (settings, tokenizer, chat template), whole.

    Milliseconds for any size: a change of a few rows of a large tensor alone may go unnoticed.
    """
    known: dict[str, Any] = {}
    weights = [path for path in Path(folder).iterdir() if path.suffix == ".safetensors"]
    for path in weights:
        share = _ALL_PLACES // len(weights) // max(1, len(read_safetensors_header(path)))
        known |= _tensor_samples(path, max(1, min(share, _PLACES)))
    for path in Path(folder).iterdir():
        if path in weights:
            continue
        if path.suffix in (".bin", ".gguf"):  # the directory at the end of PyTorch's file has checksums of the rest
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 2**20))
                known[path.name] = (size, hashlib.sha256(file.read()).hexdigest())
        elif path.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py") and path.is_file():
            known[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _digest(sorted(known.items()))


def _tensor_samples(path: Path, places: int) -> dict[str, Any]:
    """Type, shape and bytes from some places of each tensor of a safetensors file."""
    found = {}
    header = read_safetensors_header(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            pieces = b""
            for place in range(1, places + 1):
                offset = start + (end - start) * place // (places + 1)
                file.seek(8 + length + offset)
                pieces += file.read(min(64, end - offset))
            found[name] = (tensor["dtype"], tensor["shape"], pieces)
    return found


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=20).hexdigest()


def parameter_counts(model_dir: str) -> ParameterCounts:
    """Count the parameters of a model folder from the headers of its weight files (milliseconds, nothing loaded)."""
    parameters = size = 0
    for path in weight_files(model_dir):
        for tensor in read_safetensors_header(path).values():
            count = prod(tensor["shape"])
            parameters += count
            size += count * SAFETENSORS_ITEM_BYTES.get(tensor["dtype"], 1)
    return ParameterCounts(parameters, size)


def add_special_tokens(model: Any, tokenizer: Any, new_special_tokens: list[str]) -> int:
    """Add ``--new_special_tokens`` to the tokenizer, in this order, and make room for them in the embeddings.

    Returns the number of tokens that were new to the tokenizer. The new rows start at the mean of the old ones
    (Transformers' default); ``model.new_token_ids`` names them to :func:`~rayswift.modeling.adapters.add_lora`.
    """
    known = tokenizer.get_vocab()
    added = tokenizer.add_tokens(list(new_special_tokens), special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=EMBEDDING_MULTIPLE)
    new = [token for token in dict.fromkeys(new_special_tokens) if token not in known]
    model.new_token_ids = tokenizer.convert_tokens_to_ids(new)
    logger.info("new_special_tokens: %d added, %d tokens now", added, len(tokenizer))
    return int(added)
