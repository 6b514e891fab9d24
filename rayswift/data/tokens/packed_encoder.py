"""An encoder on its way to other machines: its tokenizer's files go with it, as the model may be on this machine only.

In: an :class:`~rayswift.data.tokens.encoder.Encoder` whose model folder is here. Out, wherever it is unpacked: one
that works there. Packed once, an object of Ray's store serves every task.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from rayswift.data.flow.cache import default_root, tokenizer_files
from rayswift.data.tokens.encoder import Encoder


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
            self._write(folder)
        return replace(self.encoder, model_dir=str(folder))

    def _are_in(self, folder: Path) -> bool:
        paths = {folder / name: len(content) for name, content in self.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def _write(self, folder: Path) -> None:
        temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        for name, content in self.files.items():
            (temporary / name).write_bytes(content)
        try:
            os.replace(temporary, folder)
        except OSError:  # another process of this machine was faster
            shutil.rmtree(temporary, ignore_errors=True)


def pack_encoder(encoder: Encoder) -> PackedEncoder:
    """Take the tokenizer's files from the encoder's model folder."""
    return PackedEncoder(encoder, {path.name: path.read_bytes() for path in tokenizer_files(encoder.model_dir)})
