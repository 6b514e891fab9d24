"""Content-addressed files of standard rows and token rows: an unchanged dataset is never read or encoded twice.

An entry is an Arrow IPC file and, written last, a JSON summary: an entry without its summary does not exist. Its name
is a hash of everything it depends on: the bytes of the data file, the rules and settings, and this package's code.

Schemas:
    rows: ``row: large_binary`` (a standard row as JSON), ``kind: string`` and ``number: int64`` (its
        :class:`~rayswift.data.files.Position`).
    tokens: ``input_ids: list<int32>``, ``labels: list<int32>`` (−100 where not trained), ``loss_scale: list<float>``
        (null where every weight is 0 or 1), ``rejected_start: int32`` (of a pair, where the rejected conversation
        begins; else null), ``source: int64`` (number of the standard row it came from), ``length: int32`` (tokens),
        ``text_ends: list<int32>`` and ``targets: list<float>`` (of tasks that tell numbers; else null).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from rayswift.data.files import Chunk, filesystem_of
from rayswift.data.tokens.arrow_files import default_root, open_arrow
from rayswift.data.tokens.packed_encoder import CONFIGURATION, tokenizer_files
from rayswift.errors import UserError, one_line
from rayswift.files import atomic_file, parse_json

if TYPE_CHECKING:
    import pyarrow as pa

    from rayswift.data.rows.standard import RowRules
    from rayswift.data.tokens.encoder import Encoder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class TokenCache:
    """The files below one folder.

    Args:
        root: a local folder, or the URI of storage that every node reaches.
        reuse: False (``--load_from_cache_file false``) makes every entry anew.
    """

    root: str
    reuse: bool = True
    #: How many entries of this process's work were there (``hits``), and had to be made (``misses``).
    counts: Counter[str] = field(default_factory=Counter, compare=False)

    def path(self, key: str) -> str:
        """The path or URI of an entry's Arrow file."""
        return f"{self.root}/{key[:2]}/{key}.arrow"

    def summary(self, key: str) -> dict[str, Any] | None:
        """An entry's summary, None when there is no whole entry."""
        filesystem, inner = filesystem_of(self.path(key).removesuffix(".arrow") + ".json")
        try:
            with filesystem.open_input_stream(inner) as stream:
                return parse_json(stream.read())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def whole(self, key: str) -> dict[str, Any] | None:
        """The summary of an entry whose file is the one that was written, byte by byte (a bucket checks its own); None
        where it has to be made again."""
        summary = self.summary(key)
        return summary if summary and summary.get("file") == self._file_stamp(key) else None

    def _file_stamp(self, key: str) -> list[Any] | None:
        path = self.path(key)
        filesystem, inner = filesystem_of(path)
        info = filesystem.get_file_info(inner)
        if not info.is_file or "://" in path:
            return [info.size] if info.is_file else None
        digest = xxhash.xxh3_64()
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        return [info.size, digest.hexdigest()]

    @contextlib.contextmanager
    def write(self, key: str, schema: pa.Schema) -> Iterator[Any]:
        """A writer of record batches; the entry is whole once its summary follows (:meth:`finish`)."""
        import pyarrow as pa

        options = pa.ipc.IpcWriteOptions(compression="lz4" if schema.names[0] == "row" else None)
        try:
            with self._new_file(self.path(key)) as sink, pa.ipc.new_file(sink, schema, options=options) as file:
                yield file
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise self._unusable(error) from error

    def finish(self, key: str, summary: dict[str, Any]) -> None:
        """Make an entry whole."""
        path = self.path(key).removesuffix(".arrow") + ".json"
        with self._usable():
            stamp = self._file_stamp(key)
            with self._new_file(path) as sink:
                sink.write(json.dumps({**summary, "file": stamp}).encode())

    @contextlib.contextmanager
    def _new_file(self, path: str) -> Iterator[Any]:
        """A stream into a file that is whole or not there."""
        filesystem, inner = filesystem_of(path)
        with contextlib.ExitStack() as stack:
            with self._usable():
                filesystem.create_dir(os.path.dirname(inner), recursive=True)
                if "://" in path:  # a bucket shows an object when it is complete
                    stack.push(lambda failed, *_: filesystem.delete_file(inner) if failed else None)
                else:
                    inner = str(stack.enter_context(atomic_file(inner)))
                sink = stack.enter_context(filesystem.open_output_stream(inner))
            yield sink

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"the token cache {self.root}: {one_line(error)}; RAYSWIFT_CACHE names another folder")

    def open(self, key: str) -> pa.ipc.RecordBatchFileReader:
        """An entry, memory-mapped; one in a bucket is copied to this machine first."""
        return open_arrow(self.path(key))

    # --- keys ---

    def rows_key(self, chunk: Chunk, rules: RowRules) -> str:
        """The key of a chunk's standard rows."""
        return _hash("rows", self._content(chunk.path), chunk.start, chunk.end, rules_hash(rules), code_hash())

    def _content(self, path: str) -> str:
        """A hash of a file's bytes, remembered by path, size, times and inode; of a remote file, its path, size and
        time."""
        filesystem, inner = filesystem_of(path)
        if "://" in path:
            info = filesystem.get_file_info(inner)
            return _hash(path, info.size, info.mtime_ns)
        found = os.stat(path)
        # Programs that put a file's old time back cannot put back when they did so.
        stamp = [path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        # What this machine knows of its own files is kept on it, wherever the cache is.
        here, memo = TokenCache(default_root()), _hash("file", path)
        known = here.summary(memo)
        if known and known["stamp"] == stamp:
            return known["digest"]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        here.finish(memo, {"stamp": stamp, "digest": digest})
        return digest


def rules_hash(rules: RowRules) -> str:
    """A hash of the rules that make raw rows standard ones, functions included."""
    from ray import cloudpickle

    # A copy: what rules keep of columns they have seen is pickled too, and differs from process to process.
    plain = replace(rules, message_names=replace(rules.message_names))
    return hashlib.sha256(cloudpickle.dumps(plain)).hexdigest()[:40]


def tokens_key(rows_key: str, encoder: Encoder, subset: Any = None) -> str:
    """The key of the token rows of a chunk, those of all its standard rows or of a subset (int64 numbers)."""
    return _hash("tokens", rows_key, encoder_hash(encoder), None if subset is None else subset.tobytes().hex())


@functools.lru_cache(maxsize=16)
def encoder_hash(encoder: Encoder) -> str:
    """A hash of the settings of an encoder and of the tokenizer's files; where the model lies does not count."""
    settings = {**encoder.settings(), "model_dir": ""}
    files = [file for file in tokenizer_files(encoder.model_dir) if file.name != CONFIGURATION]
    digests = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return _hash(sorted(settings.items()), digests)


@functools.cache
def code_hash() -> str:
    """A hash of the code and records that turn bytes into tokens: this package."""
    folder = Path(__file__).parents[1]
    return _hash(*(file.read_text() for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")])))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
