"""Files to raw rows: which files a path holds, how they are cut into chunks, and one generator that reads a chunk.

Formats: jsonl, json (an array, ``{"data": array}``, one object, or lines), csv, tsv, txt, parquet, arrow, each plain,
``.gz`` or ``.zst``, on any ``pyarrow.fs`` file system. NaN and infinities are missing values (null) in all of them. A
row's :class:`Position` is kept so that an error can name ``file:line``. A row that can be read but not used comes as a
:class:`~rayswift.data.rows.standard.Drop`, as does a broken line of jsonl or txt; where reading cannot go on there is a
:class:`BadRow`.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rayswift.data.json_text import BadJson, has_half_surrogate, loads
from rayswift.data.rows.messages import HALF_SURROGATE
from rayswift.data.rows.standard import Drop
from rayswift.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_TABLES = (".parquet", ".arrow")
COMPRESSIONS = ("", ".gz", ".zst")
#: Uncompressed jsonl and txt are cut into pieces of this many bytes, so that one big file feeds every core.
CHUNK_BYTES = 4 * 2**20
#: Cells of csv and tsv files that hold no value; all but the first are how floats are written.
_MISSING = frozenset({"", "nan", "NaN", "inf", "-inf"})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Position(NamedTuple):
    """Where a row is in its file: the offset of its first byte (0, 1, …), its line, or its element of a JSON array (its
    row of a table), these counted from 1."""

    kind: Literal["byte", "line", "element"]
    number: int


class BadRow(Exception):
    """Where reading a file ends too early (broken table, truncated file); carries the position."""

    def __init__(self, position: Position, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


class CsvRow(dict[str, Any]):
    """A row of a csv or tsv file; ``missing``: the columns whose cells are empty or NaN, and so are None."""

    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of one data file: bytes ``[start, end)`` of a plain line file, or the whole file (``end`` is None)."""

    path: str
    start: int = 0
    end: int | None = None


def formats_line() -> str:
    """What a data file may be, in words."""
    return f"{' '.join(FORMATS)}, plain, .gz or .zst"


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
            raise UserError(f"--dataset {path}: not a data file ({formats_line()})")
        filesystem, inner = filesystem_of(path)
        size = filesystem.get_file_info(inner).size or 0
        if names not in ((".jsonl", ""), (".txt", "")) or size <= CHUNK_BYTES:
            chunks.append(Chunk(path))
            continue
        starts = range(0, size, CHUNK_BYTES)
        chunks += [Chunk(path, start, min(start + CHUNK_BYTES, size)) for start in starts]
    return chunks


def chunk_bytes(chunk: Chunk) -> int:
    """Bytes of text in a chunk; those of a compressed file are guessed from its size."""
    if chunk.end is not None:
        return chunk.end - chunk.start
    filesystem, inner = filesystem_of(chunk.path)
    size = filesystem.get_file_info(inner).size or 0
    return size if chunk.path.lower().endswith(tuple(set(FORMATS) - {".parquet"})) else 4 * size


def iter_rows(chunk: Chunk) -> Iterator[tuple[Any, Position]]:
    """Read one chunk: rows with their positions, which :func:`locate` turns into lines.

    Raises:
        BadRow: where reading cannot go on.
    """
    names = split_format(chunk.path)
    assert names is not None, chunk.path
    data_format, compression = names
    if data_format in _TABLES:
        return _iter_table(chunk.path, data_format, compression)
    readers = {".jsonl": _iter_jsonl, ".json": _iter_json, ".csv": _iter_csv, ".tsv": _iter_tsv, ".txt": _iter_txt}
    return readers[data_format](_iter_lines(chunk, compression))


def locate(path: str, position: Position) -> str:
    """Where a row of a data file is: ``file:line``, or ``file, element N`` (row N of a table)."""
    kind, number = position
    if kind == "element":
        names = split_format(path)
        return f"{path}, {'row' if names and names[0] in _TABLES else 'element'} {number}"
    if kind == "line":
        return f"{path}:{number}"
    filesystem, inner = filesystem_of(path)
    line = 1
    with filesystem.open_input_stream(inner, compression=None) as stream:
        left = number
        while left > 0 and (data := stream.read(min(left, 1 << 20))):
            line += data.count(b"\n")
            left -= len(data)
    return f"{path}:{line}"


def iter_raw_rows(paths: list[str]) -> Iterator[tuple[Any, str, Position]]:
    """Every row of some files as it is there, with its file and position, read in this process (for small data).

    Raises:
        UserError: a file is broken (names file:line).
    """
    for path in paths:
        try:
            for row, position in iter_rows(Chunk(path)):
                if isinstance(row, Drop) and row.broken:
                    raise BadRow(position, row.reason)
                yield row, path, position
        except BadRow as error:
            raise UserError(f"{locate(path, error.position)}: {error.reason}") from None


def _open(path: str, compression: str) -> Any:
    import pyarrow

    filesystem, inner = filesystem_of(path)
    codec = {"": None, ".gz": "gzip", ".zst": "zstd"}[compression]
    try:
        return filesystem.open_input_stream(inner, compression=codec, buffer_size=1 << 20)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise BadRow(Position("line", 1), f"the file cannot be opened: {error}") from None


def _iter_lines(chunk: Chunk, compression: str) -> Iterator[tuple[bytes, Position]]:
    """Lines whose first byte lies in the chunk, with their line ends but without a byte order mark.

    Plain files give byte offsets, compressed ones line numbers.
    """
    if compression:
        for number, raw in enumerate(_raw_lines(_open(chunk.path, compression)), start=1):
            yield (raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw), Position("line", number)
        return
    filesystem, inner = filesystem_of(chunk.path)
    offset = chunk.start
    with filesystem.open_input_file(inner) as file:
        stream = io.BufferedReader(file, 1 << 20)
        if chunk.start:
            # The line that the previous chunk began belongs to it.
            stream.seek(chunk.start - 1)
            offset += len(stream.readline()) - 1
        end = float("inf") if chunk.end is None else chunk.end
        for raw in stream if offset < end else ():
            yield (raw if offset else raw.removeprefix(_BYTE_ORDER_MARK)), Position("byte", offset)
            offset += len(raw)
            if offset >= end:
                return


def _raw_lines(stream: Any) -> Iterator[bytes]:
    """Lines of a compressed stream; a truncated or damaged one raises BadRow at the line it breaks in."""
    with stream, io.BufferedReader(stream, 1 << 20) as lines:
        for number in itertools.count(1):
            try:
                raw = lines.readline()
            except OSError as error:
                told = f"the compressed file is damaged or cut short: {error}"
                raise BadRow(Position("line", number), told) from None
            if not raw:
                return
            yield raw


def _decode(raw: bytes, position: Position) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error.start, position) from None


def _not_utf8(byte: int, position: Position) -> BadRow:
    return BadRow(position, f"not UTF-8 at byte {byte} of the line; convert the file to UTF-8")


def _iter_jsonl(lines: Iterator[tuple[bytes, Position]]) -> Iterator[tuple[Any, Position]]:
    for raw, position in lines:
        try:
            row = loads(raw)
        except UnicodeDecodeError as error:
            yield Drop(_not_utf8(error.start, position).reason, "line"), position
        except BadJson as error:
            if raw.strip():  # a blank line holds no row
                column = "" if error.column is None else f" at column {error.column}"
                reason = "null bytes in the line" if b"\0" in raw else f"broken JSON: {error}{column}"
                yield Drop(f"{reason}; mend or remove the line", "line"), position
        else:
            yield (Drop(HALF_SURROGATE) if _has_half_surrogate(row, raw) else row), position


def _has_half_surrogate(row: Any, raw: bytes) -> bool:
    # Only a text with such an escape can hold half a pair.
    return (b"\\ud" in raw or b"\\uD" in raw) and has_half_surrogate(row)


def _iter_txt(lines: Iterator[tuple[bytes, Position]]) -> Iterator[tuple[Any, Position]]:
    for raw, position in lines:
        try:
            text = _decode(raw, position).rstrip("\r\n")
        except BadRow as error:
            yield Drop(error.reason, "line"), position
        else:
            yield ({"text": text} if text.strip() else Drop("a blank line")), position


def _iter_json(lines: Iterator[tuple[bytes, Position]]) -> Iterator[tuple[Any, Position]]:
    """A ``.json`` file: an array of rows (alone or as ``data`` of an object), one object, or (as SWIFT accepts) one
    object a line."""
    data = b"".join(raw for raw, _ in lines)
    try:
        value = loads(data)
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        raise _not_utf8(error.start - start, Position("line", 1 + data.count(b"\n", 0, start))) from None
    except BadJson as error:
        if _is_json(data.strip().partition(b"\n")[0]):
            yield from _iter_jsonl(_numbered(data.split(b"\n")))
        elif data.strip():
            column = "" if error.column is None else f" at column {error.column}"
            raise BadRow(Position("line", error.line or 1), f"broken JSON: {error}{column}; mend the file") from None
        return
    if isinstance(value, dict) and isinstance(rows := value.get("data"), list) and rows and isinstance(rows[0], dict):
        value = rows
    if not isinstance(value, list):
        yield (Drop(HALF_SURROGATE) if _has_half_surrogate(value, data) else value), Position("line", 1)
        return
    check = _has_half_surrogate(value, data)
    for number, row in enumerate(value, start=1):
        yield (Drop(HALF_SURROGATE) if check and has_half_surrogate(row) else row), Position("element", number)


def _is_json(raw: bytes) -> bool:
    try:
        return isinstance(loads(raw), dict)
    except ValueError:
        return False


def _iter_tsv(lines: Iterator[tuple[bytes, Position]]) -> Iterator[tuple[Any, Position]]:
    return _iter_csv(lines, "\t")


def _iter_csv(lines: Iterator[tuple[bytes, Position]], delimiter: str = ",") -> Iterator[tuple[Any, Position]]:
    import csv

    csv.field_size_limit(2**31 - 1)
    # Without `strict` a quote that is never closed would swallow the rest of the file.
    texts = (_decode(raw, position) for raw, position in _numbered(raw for raw, _ in lines))
    reader = csv.reader(texts, strict=True, delimiter=delimiter)
    start, header = 1, None
    try:
        for cells in reader:
            if header is None:
                header = cells
                twice = next((name for number, name in enumerate(cells) if name in cells[:number]), None)
                if twice is not None:
                    raise BadRow(Position("line", 1), f"two columns are named {twice!r}; rename one")
            elif len(cells) != len(header) and cells:
                more = "more" if len(cells) > len(header) else "fewer"
                raise BadRow(Position("line", start), f"{more} fields than the header has columns; mend the line")
            elif cells:
                row = CsvRow(zip(header, cells, strict=True))
                if not _MISSING.isdisjoint(cells):
                    row.missing = tuple(name for name, cell in row.items() if cell in _MISSING)
                    row.update(dict.fromkeys(row.missing))
                yield row, Position("line", start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadRow(Position("line", start), f"broken CSV: {error}; mend the row that begins here") from None


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Position]]:
    return ((raw, Position("line", number)) for number, raw in enumerate(lines, start=1))


def _iter_table(path: str, data_format: str, compression: str) -> Iterator[tuple[Any, Position]]:
    import pyarrow

    number = 0
    try:
        # Parquet is read from its end: a compressed file has to be unpacked as a whole.
        source = pyarrow.BufferReader(_open(path, compression).read()) if compression else None
        schema, batches = (_open_parquet if data_format == ".parquet" else _open_arrow)(path, source)
        nested = [column.name for column in schema if pyarrow.types.is_nested(column.type)]
        floats = [column.name for column in schema if pyarrow.types.is_floating(column.type)]
        for row in (row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict")):
            number += 1
            row.update({name: _without_nulls(row[name]) for name in nested})
            row.update({name: None for name in floats if _is_null(row[name])})
            yield row, Position("element", number)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise BadRow(Position("element", number + 1), f"the {data_format[1:]} file cannot be read: {error}") from None


def _open_parquet(path: str, source: Any) -> tuple[Any, Iterator[Any]]:
    import pyarrow.parquet as pq

    filesystem, inner = filesystem_of(path)
    file = pq.ParquetFile(source) if source else pq.ParquetFile(inner, filesystem=filesystem)
    return file.schema_arrow, file.iter_batches(batch_size=1024)


def _open_arrow(path: str, source: Any) -> tuple[Any, Iterator[Any]]:
    """An Arrow file, or the Arrow stream that ``datasets`` saves."""
    import pyarrow

    if source is None:
        filesystem, inner = filesystem_of(path)
        source = filesystem.open_input_file(inner)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        file = pyarrow.ipc.open_file(source)
        schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
    else:
        stream = pyarrow.ipc.open_stream(source)
        schema, batches = stream.schema, iter(stream)
    return schema, (batch.slice(start, 1024) for batch in batches for start in range(0, len(batch), 1024))


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _without_nulls(value: Any) -> Any:
    """A nested value without the null fields that a table gives an object for every key its neighbours have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if not _is_null(item)}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else None if _is_null(value) else value
