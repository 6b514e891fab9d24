"""A model folder with anything in it is refused in one line, never with a traceback."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import llama, word_tokenizer

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.modeling.loading import (
    load_model,
    load_tokenizer,
    parameter_counts,
    read_config,
    read_safetensors_header,
    resolve_dtype,
)

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
NO_OBJECTS = ["[]", "null", "3", '"x"', "", "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]
CONFIG: dict[str, list[Any]] = {
    "hidden_size": [-1, "x", None], "num_attention_heads": [0, 7], "num_hidden_layers": ["a"], "vocab_size": [-5, "z"],
    "architectures": [3, ["Nope"]], "model_type": [3, None], "dtype": ["int7", 3], "max_position_embeddings": ["a"],
    "rope_parameters": [3], "quantization_config": [3, [], {"quant_method": "x"}], "hidden_act": ["nope"],
    "eos_token_id": ["x"], "tie_word_embeddings": ["yes"], "auto_map": [3],
}  # fmt: skip
TOKENIZER: dict[str, list[Any]] = {
    "chat_template": [3, "{{", "{% for %}"], "eos_token": [3, []], "tokenizer_class": [3, "Nope"],
    "added_tokens_decoder": [3, {"a": 1}, {"5": 3}], "model_max_length": ["x"], "extra_special_tokens": [3],
}  # fmt: skip
TENSOR: dict[str, list[Any]] = {
    "data_offsets": [3, [1], [0, "x"], [5, 3], [-4, 8], None], "shape": [3, ["a"], [-1], [10**12]],
    "dtype": [3, "Q9", None],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def changed(path: Path, changes: dict[str, list[Any]]) -> Iterator[str]:
    content = json.loads(path.read_text())
    yield from NO_OBJECTS
    yield from (json.dumps({**content, name: value}) for name, values in changes.items() for value in values)


def headers(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    first = next(name for name in header if name != "__metadata__")
    altered = [{**header, first: {**header[first], name: value}} for name, values in TENSOR.items() for value in values]
    altered += [{**header, first: 3}, {**header, "__metadata__": 3}, {k: v for k, v in header.items() if k != first}]
    for text in [*NO_OBJECTS, *map(json.dumps, altered)]:
        yield struct.pack("<Q", len(text)) + text.encode() + rest
    yield from (b"", data[:-3], data + b"x", struct.pack("<Q", 2**63) + data[8:])


def used(folder: Path) -> None:
    """What a command does with a model's folder."""
    read_config(str(folder))
    parameter_counts(str(folder))
    resolve_dtype(None, str(folder), use_gpu=False)
    load_tokenizer(str(folder))
    Encoder(str(folder)).encode_batch([ROW])
    load_model(str(folder), torch_dtype="float32")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_a_malformed_file_is_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    used(whole)
    contents: Iterator[str | bytes] = {
        "config.json": lambda: changed(whole / name, CONFIG),
        "tokenizer_config.json": lambda: changed(whole / name, TOKENIZER),
        "tokenizer.json": lambda: iter([*NO_OBJECTS, "{}", '{"version": "1.0"}']),
        "model.safetensors": lambda: headers(whole / name),
    }[name]()
    refusals: list[str] = []
    for number, content in enumerate(contents):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            used(folder)
        except UserError as error:
            refusals.append(str(error))
        shutil.rmtree(folder)
    assert [line for line in refusals if "\n" in line] == []
    assert len(refusals) > 8  # some odd values do no harm


def test_headers_that_were_damaged_are_told_from_whole_ones(whole: Path, tmp_path: Path) -> None:
    assert read_safetensors_header(whole / "model.safetensors")
    for number, content in enumerate(headers(whole / "model.safetensors")):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        try:
            header = read_safetensors_header(path)
        except UserError:
            continue
        assert all(isinstance(tensor["dtype"], str) for tensor in header.values())
