"""An encoder on its way to other machines: its tokenizer's files go with it, as the model may be on this machine only.

In: an :class:`~rayswift.data.tokens.encoder.Encoder` whose model folder is here. Out, wherever it is unpacked: one
that works there. Packed once, an object of Ray's store serves every task.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from rayswift.data.tokens.arrow_files import default_root
from rayswift.data.tokens.encoder import Encoder

#: What a tokenizer is made of, in a model's folder.
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "chat_template*", "*.py")
#: What says which class of tokenizer that is, where nothing else does; it changes no token.
CONFIGURATION = "config.json"


@dataclass(frozen=True)
class PackedEncoder:
    """An encoder and the files its tokenizer is loaded from, by name."""

    encoder: Encoder
    files: dict[str, bytes]

    def unpack(self) -> Encoder:
        """The encoder with a model folder that this machine has: its own where it holds the same files."""
        if self._are_in(Path(self.encoder.model_dir)):
            return self.encoder
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}:{len(content)}:".encode() + content)
        folder = Path(default_root()) / "tokenizers" / digest.hexdigest()[:40]
        if not self._are_in(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                built = Path(scratch, "new")
                built.mkdir()
                for name, content in self.files.items():
                    (built / name).write_bytes(content)
                # Where another process of this machine was faster its folder stays, as it may be in use.
                with contextlib.suppress(OSError):
                    os.rename(built, folder)
        return replace(self.encoder, model_dir=str(folder))

    def _are_in(self, folder: Path) -> bool:
        paths = {folder / name: len(content) for name, content in self.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def tokenizer_files(model_dir: str) -> list[Path]:
    """The files of a model's folder that its tokenizer is loaded from."""
    patterns, folder = (*_TOKENIZER_FILES, CONFIGURATION), Path(model_dir)
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def pack_encoder(encoder: Encoder) -> PackedEncoder:
    """Take the tokenizer's files from the encoder's model folder."""
    return PackedEncoder(encoder, {path.name: path.read_bytes() for path in tokenizer_files(encoder.model_dir)})
