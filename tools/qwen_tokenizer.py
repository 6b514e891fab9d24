"""Rebuild the Qwen2.5 tokenizer from the rank file that the `dashscope` package ships (Apache-2.0).

    python tools/qwen_tokenizer.py [TARGET_DIR]        # default .cache/qwen2.5-tokenizer

The package carries `dashscope/resources/qwen.tiktoken`: 151,643 byte sequences with their merge ranks, the same that
the model's `tokenizer.json` was made from. The rest (pre-tokenizer pattern, normaliser, 22 added tokens from id
151643 on) is the model's published configuration. The chat template is the one in `tests/data/qwen2.5`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

DASHSCOPE = "dashscope==1.25.24"
RANK_FILE = "dashscope/resources/qwen.tiktoken"
REPOSITORY = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = REPOSITORY / "tests" / "data" / "qwen2.5" / "chat_template.jinja"

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In id order from 151643 (the number of ranks); the first group is `special`, the second is ordinary added tokens.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
ADDED_TOKENS = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip


def build_qwen_tokenizer(target_dir: str | os.PathLike[str]) -> Path:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` to `target_dir` and return it.

    Does nothing when the folder is already whole. The folder appears under its name only once complete, so several
    processes may call this at the same time.
    """
    target = Path(target_dir)
    if (target / "tokenizer_config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name + ".") as scratch:
        built = Path(scratch) / "tokenizer"
        built.mkdir()
        _tokenizer(_read_ranks(Path(scratch))).save(str(built / "tokenizer.json"), pretty=False)
        shutil.copy(CHAT_TEMPLATE, built / "chat_template.jinja")
        (built / "tokenizer_config.json").write_text(json.dumps(_config(), indent=2) + "\n", encoding="utf-8")
        try:
            built.rename(target)
        except OSError:  # somebody else was first, or an older build was interrupted half-way
            if not (target / "tokenizer_config.json").exists():
                shutil.rmtree(target)
                built.rename(target)
    return target


def _read_ranks(scratch: Path) -> dict[bytes, int]:
    """Download the package (no install, no dependencies) and parse the rank file: one `base64 rank` per line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(scratch), DASHSCOPE], check=True)
    with zipfile.ZipFile(next(scratch.glob("dashscope-*.whl"))) as wheel:
        lines = wheel.read(RANK_FILE).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _tokenizer(ranks: dict[bytes, int]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = _byte_letters()
    vocab = {_spell(token, letters): rank for token, rank in ranks.items()}
    merges = [
        (_spell(left, letters), _spell(right, letters))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
        for left, right in _last_merge(token, rank, ranks)
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED_TOKENS])
    return tokenizer


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Split `token` as byte-pair encoding with only the ranks below its own would: the pair is the merge for it.

    A few published tokens cannot be reached by merging two others; they get no merge and are never produced.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= rank:
            return []
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [(parts[0], parts[1])]


def _byte_letters() -> dict[int, str]:
    """GPT-2's byte → printable character table, which byte-level vocabularies are spelled in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + offset)
    return letters


def _spell(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],
    }


if __name__ == "__main__":
    print(build_qwen_tokenizer(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / ".cache" / "qwen2.5-tokenizer"))
