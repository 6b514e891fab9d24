"""Data files of every format and compression, whole and broken, read as a user would find them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayswift.data import files as sources
from rayswift.data.files import Chunk, iter_raw_rows, iter_rows, locate, plan_chunks, split_format
from rayswift.data.rows.standard import Drop
from rayswift.errors import UserError

ROWS = [{"query": f'问题 {i}, "quoted"', "response": f"line one\nline two {i} 🙂"} for i in range(30)]
FORMATS = [".jsonl", ".json", ".csv", ".txt", ".parquet"]
COMPRESSIONS = ["", ".gz", ".zst"]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_bytes(data_format: str) -> bytes:
    buffer = io.StringIO(newline="")
    if data_format == ".jsonl":
        return jsonl(ROWS)
    if data_format == ".json":
        return json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    if data_format == ".csv":
        writer = csv.DictWriter(buffer, ["query", "response"])
        writer.writeheader()
        writer.writerows(ROWS)
        return buffer.getvalue().encode()
    if data_format == ".txt":
        return "".join(row["query"] + "\n" for row in ROWS).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def compress(data: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(data)
    if compression == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


def write(path: Path, data: bytes) -> str:
    path.write_bytes(compress(data, path.suffix))
    return str(path)


def read(*paths: str) -> list[Any]:
    return [row for row, _, _ in iter_raw_rows(list(paths))]


def error_of(path: str) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("data_format", FORMATS)
def test_every_format_and_compression_gives_the_same_rows(tmp_path: Path, data_format: str, compression: str) -> None:
    path = write(tmp_path / f"data{data_format}{compression}", as_bytes(data_format))
    expected = [{"text": row["query"]} for row in ROWS] if data_format == ".txt" else ROWS
    assert read(path) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/B.JSONL", (".jsonl", "")),
        ("x.csv.GZ", (".csv", ".gz")),
        ("s3://bucket/x.parquet", (".parquet", "")),
        ("x.jsonl.bz2", None),
        ("README.md", None),
        ("jsonl", None),
    ],
)
def test_which_names_are_data_files(name: str, expected: tuple[str, str] | None) -> None:
    assert split_format(name) == expected


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_broken_line_is_named(tmp_path: Path, compression: str) -> None:
    lines = jsonl(ROWS).split(b"\n")
    lines[16] = lines[16][:-20]
    path = write(tmp_path / f"train.jsonl{compression}", b"\n".join(lines))
    message = error_of(path)
    assert message.startswith(f"{path}:17: broken JSON: ")
    assert "mend or remove the line" in message


def test_rows_before_and_behind_a_broken_line_arrive(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", jsonl(ROWS[:16]) + b"{\n" + jsonl(ROWS[16:]))
    seen = [row for row, _ in iter_rows(Chunk(path))]
    assert isinstance(seen[16], Drop) and seen[16].broken == "line"
    assert seen[:16] + seen[17:] == ROWS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("row_17", "reason"),
    [(b"a,b,c\n", "more fields than the header"), (b'"' + b"\xff\xfe" + b'",b\n', "not UTF-8 at byte 1 of the line")],
)
def test_broken_csv_line_is_named(tmp_path: Path, compression: str, row_17: bytes, reason: str) -> None:
    good = [f"q{i},r{i}\n".encode() for i in range(40)]
    path = write(tmp_path / f"train.csv{compression}", b"".join([b"query,response\n", *good[:15], row_17, *good[15:]]))
    message = error_of(path)
    assert message.startswith(f"{path}:17: ")
    assert reason in message


def test_csv_line_numbers_count_lines_not_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", b'query,response\nq,"two\nlines"\nq,r,surplus\n')
    assert error_of(path).startswith(f"{path}:4: ")


def test_broken_json_array_is_named_by_line(tmp_path: Path) -> None:
    lines = json.dumps([{"text": str(i)} for i in range(20)], indent=1).replace("},\n {\n", "},\n{").split("\n")
    broken = next(i for i, line in enumerate(lines) if i >= 16)
    lines[broken] = lines[broken].replace('"', "", 1)
    path = write(tmp_path / "train.json", "\n".join(lines).encode())
    assert error_of(path).startswith(f"{path}:{broken + 1}: broken JSON")


def test_json_may_be_an_array_one_object_or_lines(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", json.dumps(ROWS).encode())) == ROWS
    assert read(write(tmp_path / "o.json", json.dumps(ROWS[0], indent=2).encode())) == ROWS[:1]
    assert read(write(tmp_path / "l.json", jsonl(ROWS))) == ROWS
    lines = jsonl(ROWS).split(b"\n")
    lines[16] = b'{"text": '
    path = write(tmp_path / "broken.json", b"\n".join(lines))
    assert error_of(path).startswith(f"{path}:17: broken JSON")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("data_format", [".jsonl", ".csv", ".txt"])
def test_a_truncated_compressed_file_is_not_read_as_a_shorter_one(
    tmp_path: Path, data_format: str, compression: str
) -> None:
    whole = compress(as_bytes(data_format), compression)
    path = tmp_path / f"train{data_format}{compression}"
    path.write_bytes(whole[: len(whole) // 2])
    message = error_of(str(path))
    assert message.startswith(f"{path}:")
    assert "damaged or cut short" in message


def test_damage_in_the_middle_of_a_gzip_file(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(jsonl([{"text": f"{i * 7919 % 10007} {i}"} for i in range(5000)])))
    whole[len(whole) // 2 : len(whole) // 2 + 8] = b"\xff" * 8
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(bytes(whole))
    assert error_of(str(path)).startswith(f"{path}:")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.parquet.gz", "x.txt.gz"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is plain text\n" * 50)
    first_row = f"{path}, row 1: " if "parquet" in name else f"{path}:1: "
    assert error_of(str(path)).startswith(first_row)


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(as_bytes(".parquet")[:-20])
    assert "cannot be read" in error_of(str(path))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_invalid_utf8_is_named(tmp_path: Path, compression: str) -> None:
    line = '{"text": "中文"}\n'.encode("gb18030")
    path = write(tmp_path / f"train.jsonl{compression}", jsonl([{"text": "a"}] * 16) + line + jsonl([{"text": "b"}]))
    assert error_of(path) == f"{path}:17: not UTF-8 at byte 10 of the line; convert the file to UTF-8"


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("data_format", [".jsonl", ".json", ".csv", ".txt"])
def test_byte_order_mark_and_crlf_do_not_reach_the_rows(tmp_path: Path, data_format: str, compression: str) -> None:
    rows = [{"text": f"甲 {i}"} for i in range(5)]
    texts = {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows),
        ".json": json.dumps(rows, indent=1).replace("\n", "\r\n"),
        ".csv": "text\r\n" + "".join(row["text"] + "\r\n" for row in rows),
        ".txt": "".join(row["text"] + "\r\n" for row in rows),
    }
    path = write(tmp_path / f"data{data_format}{compression}", b"\xef\xbb\xbf" + texts[data_format].encode())
    assert read(path) == rows


def test_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\n{"text": "a"}\n  \n\n{"text": "b"}')
    assert read(path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz", "a.txt.zst"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, b"")) == []


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 97, 1000, 10**6])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_every_row_arrives_once_however_a_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, end: bytes
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
    rows = [{"text": "长" * (i % 11) + "x" * (i % 5), "n": i} for i in range(40)]
    data = b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", end)
    path = write(tmp_path / "train.jsonl", data)
    chunks = plan_chunks([path])
    assert len(chunks) == -(-len(data) // chunk_bytes)
    found = [pair for chunk in chunks for pair in iter_rows(chunk)]
    assert [row for row, _ in found] == rows
    assert [locate(path, position) for _, position in found] == [f"{path}:{i + 1}" for i in range(40)]


@pytest.mark.parametrize("chunk_bytes", [16, 50, 333])
def test_a_broken_line_is_named_in_whichever_chunk_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
    lines = jsonl(ROWS).split(b"\n")
    lines[16] = b'{"query": '
    path = write(tmp_path / "train.jsonl", b"\n".join(lines))
    broken = []
    for chunk in plan_chunks([path]):
        broken += [locate(path, position) for row, position in iter_rows(chunk) if isinstance(row, Drop) and row.broken]
    assert broken == [f"{path}:17"]


def test_compressed_and_small_files_are_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / name, jsonl(ROWS)) for name in ("a.jsonl", "b.jsonl.gz")]
    assert plan_chunks(paths) == [Chunk(path) for path in paths]
    monkeypatch.setattr(sources, "CHUNK_BYTES", 10)
    assert plan_chunks(paths[1:]) == [Chunk(paths[1])]


def test_a_file_that_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"notes\.md: not a data file .*\.parquet"):
        plan_chunks([write(tmp_path / "notes.md", b"hello")])


def test_uris_are_read_like_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", jsonl(ROWS))
    assert read(f"file://{path}") == ROWS
