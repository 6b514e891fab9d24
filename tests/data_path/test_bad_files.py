"""Files as they come from the world: each is read, or what is wrong is said with its file and line; no row vanishes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayswift.data import files as sources
from rayswift.data.files import BadRow, iter_rows, locate, plan_chunks
from rayswift.data.folders import list_data_files
from rayswift.data.rows.standard import Drop, standardise_row
from rayswift.errors import UserError


def outcome(path: Path) -> list[str]:
    """Every row in order: its texts joined by ``|``, or "where: why" if it was dropped or reading ended there."""
    found = []
    for chunk in plan_chunks([str(path)]):
        try:
            for raw, position in iter_rows(chunk):
                row = standardise_row(raw)
                if isinstance(row, Drop):
                    found.append(f"{locate(chunk.path, position)}: {row.reason}")
                else:
                    found.append("|".join(message["content"] for message in row["messages"]))
        except BadRow as error:
            found.append(f"{locate(chunk.path, error.position)}: {error.reason}")
    return [line.replace(str(path.parent) + "/", "") for line in found]


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def rows(*texts: str) -> list[str]:
    return [json.dumps({"text": text}, ensure_ascii=False) for text in texts]


def test_truncated_gzip(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(rows(*(f"{i * 7919 % 10007} {i}" for i in range(5000)))).encode())
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    *read, last = outcome(path)
    assert read == [f"{i * 7919 % 10007} {i}" for i in range(len(read))]
    assert last.startswith(f"x.jsonl.gz:{len(read) + 1}: the compressed file is damaged or cut short")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_invalid_utf8(tmp_path: Path, name: str) -> None:
    bad = '{"text": "中文"}'.encode("gb18030")
    lines = {"x.csv": [b"text", b"a", bad.replace(b'"', b"")], "x.txt": [b"a", b"b", bad]}
    path = write(tmp_path / name, *lines.get(name, [*rows("a", "b"), bad]))
    assert outcome(path)[-1].startswith(f"{name}:3: not UTF-8 at byte ")


def test_utf16_is_named_as_what_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    assert outcome(path)[0] == "x.jsonl:1: not UTF-8 at byte 0 of the line; convert the file to UTF-8"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_byte_order_mark_and_crlf(tmp_path: Path, suffix: str) -> None:
    data = b"\xef\xbb\xbf" + "\r\n".join(rows("甲", "\ufeff乙", "丙\r\n")).encode() + b"\r\n"
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert outcome(path) == ["甲", "\ufeff乙", "丙\r\n"]


def test_line_ends_inside_quoted_csv_cells_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'query,response\r\n"a\r\nb",c\r\n')
    assert outcome(path) == ["a\r\nb|c"]


def test_mixed_schemas_in_one_file(tmp_path: Path) -> None:
    mixed: list[Any] = [
        {"query": "q", "response": "r"},
        {"messages": [{"role": "user", "content": "u"}]},
        {"instruction": "i", "input": "x", "output": "o"},
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
        {"foo": "bar"},
        ["a", "list"],
        "a text",
        {"text": "t"},
    ]
    expected = ["q|r", "u", "i\nx|o", "h|g", "5: no column holds text (columns: foo); name it with --columns",
                "6: the row is a JSON list, not an object with columns",
                "7: the row is a JSON str, not an object with columns", "t"]  # fmt: skip
    found = outcome(write(tmp_path / "x.jsonl", *map(json.dumps, mixed)))
    assert [line.removeprefix("x.jsonl:") for line in found] == expected
    found = outcome(write(tmp_path / "x.json", json.dumps(mixed, indent=1)))
    assert [line.removeprefix("x.json, element ") for line in found] == expected


def test_a_line_of_50_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2**24)  # chunks begin inside the line
    long = "长" * (50 * 2**20 // 3)
    path = write(tmp_path / "x.jsonl", *rows("before", long, "after"))
    assert outcome(path) == ["before", long, "after"]
    assert len(plan_chunks([str(path)])) == 4


def test_null_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *rows("escaped \0 is text"), b'{"text": "a\0b"}', *rows("behind"))
    said = "x.jsonl:2: null bytes in the line; mend or remove the line"
    assert outcome(path) == ["escaped \0 is text", said, "behind"]
    path = write(tmp_path / "tail.jsonl", *rows("a"), b"\0" * 4096)
    assert outcome(path) == ["a", "tail.jsonl:2: null bytes in the line; mend or remove the line"]
    assert outcome(write(tmp_path / "x.csv", "text", "a\0b")) == ["a\0b"]
    assert outcome(write(tmp_path / "x.txt", "a\0b")) == ["a\0b"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.jsonl.gz"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert outcome(path) == []


def test_an_empty_file_that_should_have_a_table(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"")
    assert outcome(path)[0].startswith("x.parquet, row 1: the parquet file cannot be read: ")


def test_a_folder_with_no_data_file(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "# nothing here")
    with pytest.raises(
        UserError, match=r"no data file there \(\.jsonl \.json \.csv \.tsv \.txt \.parquet \.arrow, plain"
    ):
        list_data_files(str(tmp_path))


def parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


def test_parquet_with_nested_types(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    table = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}], "text": None},
        {"messages": None, "text": "plain"},
        {"messages": [{"role": "user", "content": "later"}], "text": None},
        {"messages": [], "text": None},
    ]
    path = parquet(tmp_path / "x.parquet", pa.Table.from_pylist(table))
    assert outcome(path) == [
        'q|{"name": "f", "arguments": {}}',
        "plain",
        "later",
        "x.parquet, row 4: the messages column is empty or not a list",
    ]


def test_parquet_maps_bytes_and_images(tmp_path: Path) -> None:
    turns = [[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "r")]]
    maps = pa.array([turns], pa.list_(pa.map_(pa.string(), pa.string())))
    assert outcome(parquet(tmp_path / "maps.parquet", pa.table({"messages": maps}))) == ["q|r"]
    table = pa.table({"query": pa.array([b"\xe7\x94\xb2", b"\xff"]), "response": ["r", "r"]})
    unusable = "bytes.parquet, row 2: the query is bytes that are not UTF-8 text"
    assert outcome(parquet(tmp_path / "bytes.parquet", table)) == ["甲|r", unusable]
    images = pa.table({"text": ["<image>"], "images": [[{"bytes": b"\xff\xd8\xff", "path": None}]]})
    ((row, _),) = iter_rows(plan_chunks([str(parquet(tmp_path / "image.parquet", images))])[0])
    standard = standardise_row(row)
    assert isinstance(standard, dict)
    assert standard["images"] == [{"bytes": None, "path": "data:image/jpeg;base64,/9j/"}]


def test_tools_in_a_table_have_no_nulls_for_their_neighbours_keys(tmp_path: Path) -> None:
    tools = [[{"name": "f", "x": {"a": 1}}], [{"name": "g", "x": {"b": 2}}]]
    path = parquet(tmp_path / "x.parquet", pa.Table.from_pylist([{"text": "t", "tools": tool} for tool in tools]))
    found = [standardise_row(row) for row, _ in iter_rows(plan_chunks([str(path)])[0])]
    assert [isinstance(row, dict) and row["tools"] for row in found] == tools


def test_a_column_that_is_an_object_in_one_row_and_text_in_the_next(tmp_path: Path) -> None:
    lines = [json.dumps({"query": "q", "response": value}) for value in ("r", {"a": 1}, ["x", "y"], 7, True, None)]
    assert outcome(write(tmp_path / "x.jsonl", *lines)) == [
        "q|r",
        "x.jsonl:2: the response is an object, not text",
        "q|x",
        "q|7",
        "x.jsonl:5: the response is true or false, not text",
        "q",
    ]


def test_blank_lines(tmp_path: Path) -> None:
    blank = "a blank line"
    assert outcome(write(tmp_path / "x.txt", "a", "", " \t", "b")) == [
        "a",
        f"x.txt:2: {blank}",
        f"x.txt:3: {blank}",
        "b",
    ]
    assert outcome(write(tmp_path / "x.jsonl", *rows("a"), "", *rows("b"), "{")) == [
        "a",
        "b",
        "x.jsonl:4: broken JSON: Expecting property name enclosed in double quotes at column 2"
        "; mend or remove the line",
    ]


def test_numbers_and_emoji_that_fast_parsers_refuse(tmp_path: Path) -> None:
    lines = [
        '{"query": "q", "response": 123456789012345678901234567890}',
        '{"text": "t", "label": NaN}',
        r'{"text": "whole \ud83d\ude00"}',
        r'{"text": "half \ud83d"}',
        '{"text": ' + "9" * 5000 + "}",
    ]
    half = "a text holds half a surrogate pair (a broken emoji), which is not valid Unicode"
    assert outcome(write(tmp_path / "x.jsonl", *lines)) == [
        "q|123456789012345678901234567890",
        "t",
        "whole 😀",
        f"x.jsonl:4: {half}",
        "x.jsonl:5: broken JSON: a number of more than 4300 digits; mend or remove the line",
    ]
    array = write(tmp_path / "x.json", "[" + ",".join(lines[:4]) + "]")
    assert outcome(array)[2:] == ["whole 😀", f"x.json, element 4: {half}"]


def test_json_nested_too_deeply(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *rows("a"), '{"text": ' + "[" * 100_000)
    assert outcome(path) == ["a", "x.jsonl:2: broken JSON: nested too deeply; mend or remove the line"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["query,response", "q"], "x.csv:2: fewer fields than the header has columns; mend the line"),
        (["query,response", "q,r", "q,r,s"], "x.csv:3: more fields than the header has columns; mend the line"),
        (["query,query", "q,r"], "x.csv:1: two columns are named 'query'; rename one"),
        (["query,response", "q,r", '"never closed,r', "q,r"], "x.csv:3: broken CSV: unexpected end of data"),
    ],
)
def test_broken_tables_of_text(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert outcome(write(tmp_path / "x.csv", *lines))[-1].startswith(expected)


def test_a_pretty_printed_object_that_is_broken_is_named_where_it_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", "{", ' "query": "q",', ' "response": r', "}")
    assert outcome(path) == ["x.json:3: broken JSON: Expecting value at column 14; mend the file"]
