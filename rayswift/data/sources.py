"""Files to raw rows: which files a path holds, how they are cut into chunks, and one generator that reads a chunk.

Formats: jsonl, json (an array, one object, or lines), csv, txt, parquet, each plain, ``.gz`` or ``.zst``, on any
``pyarrow.fs`` file system. A row's position is kept so that an error can name ``file:line``.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

FORMATS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst")
#: Uncompressed jsonl and txt are cut into pieces of this many bytes, so that one big file feeds every core.
CHUNK_BYTES = 32 * 2**20


class BadRow(Exception):
    """A row that cannot be read at all (broken JSON, wrong encoding, truncated file); carries its position."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


@dataclass(frozen=True)
class Chunk:
    """A piece of one data file: bytes ``[start, end)`` of a plain line file, or the whole file (``end`` is None)."""

    path: str
    start: int = 0
    end: int | None = None


def split_format(path: str) -> tuple[str, str] | None:
    """``("…/x.jsonl.gz")`` → ``(".jsonl", ".gz")``; None when the name is no data file's."""
    lowered = path.lower()
    for compression in COMPRESSIONS:
        for data_format in FORMATS:
            if lowered.endswith(data_format + compression):
                return data_format, compression
    return None


def filesystem_of(path: str) -> tuple[FileSystem, str]:
    """The pyarrow file system of a path or URI, and the path inside it.

    Raises:
        UserError: a URI of no known kind.
    """
    import pyarrow
    from pyarrow import fs

    if "://" not in path:
        return fs.LocalFileSystem(), path
    from rayswift.hub import open_filesystem

    try:
        return open_filesystem(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: cannot be opened ({error}); s3://, oss://, gs:// and file:// are known") from None


def plan_chunks(paths: list[str]) -> list[Chunk]:
    """Cut data files into chunks that can be read independently, in order."""
    chunks: list[Chunk] = []
    for path in paths:
        names = split_format(path)
        if names is None:
            raise UserError(f"--dataset {path}: not a data file ({', '.join(FORMATS)}, plain, .gz or .zst)")
        filesystem, inner = filesystem_of(path)
        size = filesystem.get_file_info(inner).size or 0
        if names not in ((".jsonl", ""), (".txt", "")) or size <= CHUNK_BYTES:
            chunks.append(Chunk(path))
            continue
        starts = range(0, size, CHUNK_BYTES)
        chunks += [Chunk(path, start, min(start + CHUNK_BYTES, size)) for start in starts]
    return chunks


def iter_rows(chunk: Chunk) -> Iterator[tuple[Any, int]]:
    """Read one chunk: ``(row, position)``; position is what :func:`locate` turns into a line.

    Raises:
        BadRow: at the first row that cannot be read.
    """
    names = split_format(chunk.path)
    assert names is not None, chunk.path
    data_format, compression = names
    if data_format == ".parquet":
        yield from _iter_parquet(chunk.path, compression)
    elif data_format == ".json":
        yield from _iter_json(chunk, compression)
    elif data_format == ".csv":
        yield from _iter_csv(chunk, compression)
    else:
        for text, position in _iter_lines(chunk, compression):
            if data_format == ".txt":
                yield {"text": text}, position
            elif text.strip():
                yield _parse_json_line(text, position), position


def locate(path: str, position: int) -> str:
    """``file:line`` of a row's position (a byte offset, or a negated 1-based line or row number)."""
    if position < 0:
        return f"{path}:{-position}"
    filesystem, inner = filesystem_of(path)
    line = 1
    with filesystem.open_input_stream(inner, compression=None) as stream:
        left = position
        while left > 0 and (data := stream.read(min(left, 1 << 20))):
            line += data.count(b"\n")
            left -= len(data)
    return f"{path}:{line}"


def iter_raw_rows(paths: list[str]) -> Iterator[tuple[Any, str, int]]:
    """Every row of some files with its file and position, read in this process (for small data: infer, preview)."""
    for path in paths:
        try:
            for row, position in iter_rows(Chunk(path)):
                yield row, path, position
        except BadRow as error:
            raise UserError(f"{locate(path, error.position)}: {error.reason}") from None


def _parse_json_line(text: str, position: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(position, f"broken JSON: {error.msg} at column {error.colno}; mend or remove the line") from None
    except RecursionError:
        raise BadRow(position, "JSON nested too deeply; mend or remove the line") from None


def _open(path: str, compression: str) -> Any:
    import pyarrow

    filesystem, inner = filesystem_of(path)
    codec = {"": None, ".gz": "gzip", ".zst": "zstd"}[compression]
    try:
        return filesystem.open_input_stream(inner, compression=codec, buffer_size=1 << 20)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise BadRow(-1, f"the file cannot be opened: {error}") from None


def _iter_lines(chunk: Chunk, compression: str) -> Iterator[tuple[str, int]]:
    """Lines whose first byte lies in the chunk. Plain files give byte offsets, compressed ones negated line numbers."""
    if compression:
        for number, raw in enumerate(_raw_lines(_open(chunk.path, compression)), start=1):
            yield _decode(raw, -number), -number
        return
    filesystem, inner = filesystem_of(chunk.path)
    offset = chunk.start
    with filesystem.open_input_file(inner) as file:
        stream = io.BufferedReader(file, 1 << 20)
        if chunk.start:
            # The line that the previous chunk began belongs to it.
            stream.seek(chunk.start - 1)
            offset += len(stream.readline()) - 1
        while chunk.end is None or offset < chunk.end:
            raw = stream.readline()
            if not raw:
                return
            yield _decode(raw, offset), offset
            offset += len(raw)


def _raw_lines(stream: Any) -> Iterator[bytes]:
    """Lines of a compressed stream; a truncated or damaged one raises BadRow at the line it breaks in."""
    with stream, io.BufferedReader(stream, 1 << 20) as lines:
        for number in itertools.count(1):
            try:
                raw = lines.readline()
            except OSError as error:
                raise BadRow(-number, f"the compressed file is damaged or cut short: {error}") from None
            if not raw:
                return
            yield raw


def _decode(raw: bytes, position: int) -> str:
    try:
        # utf-8-sig only strips a byte order mark, which may stand at the start of the first line alone.
        return raw.decode("utf-8-sig" if position in (0, -1) else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRow(position, f"not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None


def _iter_json(chunk: Chunk, compression: str) -> Iterator[tuple[Any, int]]:
    """A ``.json`` file: an array of rows, one object, or (as SWIFT accepts) one object a line."""
    text = "\n".join(line for line, _ in _iter_lines(chunk, compression))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield _parse_json_line(line, -number), -number
            return
        raise BadRow(-error.lineno, f"broken JSON: {error.msg} at column {error.colno}; mend the file") from None
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield row, -number


def _iter_csv(chunk: Chunk, compression: str) -> Iterator[tuple[Any, int]]:
    import csv

    csv.field_size_limit(2**31 - 1)
    lines = (line + "\n" for line, _ in _iter_lines(chunk, compression))
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            if None in row:
                raise BadRow(-reader.line_num, "more fields than the header has columns; mend the line")
            yield row, -reader.line_num
    except csv.Error as error:
        raise BadRow(-reader.line_num, f"broken CSV: {error}; mend the line") from None


def _iter_parquet(path: str, compression: str) -> Iterator[tuple[Any, int]]:
    import pyarrow
    import pyarrow.parquet as pq

    filesystem, inner = filesystem_of(path)
    number = 0
    try:
        # Parquet is read from its end: a compressed file has to be unpacked as a whole.
        source = pyarrow.BufferReader(_open(path, compression).read()) if compression else None
        file = pq.ParquetFile(source) if source else pq.ParquetFile(inner, filesystem=filesystem)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield row, -number
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise BadRow(-(number + 1), f"the parquet file cannot be read: {error}") from None
