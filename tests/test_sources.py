"""Every source and format gives the same rows, numbered, in flat memory; what is broken is one line that says where."""

import csv
import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROWS

from dpo_runner.data import readers
from dpo_runner.data.sources import RowSource, decode_rows, open_sources
from dpo_runner.data_config import SourceFields
from dpo_runner.errors import DataError, RowError


def read(source: RowSource, size: int = 7) -> list[tuple[int, Any]]:
    return [row for batch in source.batches(size) for row in decode_rows(pickle.loads(pickle.dumps(batch)))]


def read_path(path: str | Path, size: int = 7) -> list[tuple[int, Any]]:
    return read(open_sources(SourceFields(path=str(path)), "data")[0], size)


def rows_of(source: RowSource | None) -> list[Any]:
    assert source is not None
    return [row for _, row in read(source)]


def error_of(path: str | Path = "x", key: str = "data", **fields: Any) -> str:
    """The message of opening and reading a source that cannot be used."""
    with pytest.raises(DataError) as caught:
        for source in open_sources(SourceFields(path=str(path), **fields), key):
            if source:
                read(source)
    assert len(caught.value.mistakes) == 1 and "\n" not in str(caught.value), caught.value
    return str(caught.value)


def write(path: str, content: str | bytes) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    file.write_bytes(pack(path, data))
    return path


def pack(path: str, data: bytes) -> bytes:
    if path.endswith(".gz"):
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if path.endswith(".zst") else data


def to_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_arrow(path: str, table: pa.Table, new: Callable[..., Any] = pa.ipc.new_stream, **options: Any) -> str:
    with new(path, table.schema) as writer:
        writer.write_table(table, **options)
    return path


TRICKY = [
    {"prompt": "héllo 😀 \u2028 \x85", "chosen": 'a {"b": [1]} \\ "q"', "rejected": "one\ntwo\r\n\nthree, and\tfour"},
    {"prompt": "  spaced  ", "chosen": "]}", "rejected": ""},
    *ROWS,
]
LINES, LIST, TABLE = to_lines(TRICKY), json.dumps(TRICKY, indent=1, ensure_ascii=False), pa.Table.from_pylist(TRICKY)
TEXTS: dict[str, str] = {
    "pairs.jsonl": LINES,
    "pairs.ndjson": LINES,
    "PAIRS.JSONL": LINES,
    "my.v2.pairs.jsonl": LINES,
    "windows.jsonl": LINES.replace("\n", "\r\n"),
    "unended.jsonl": LINES.rstrip("\n"),
    "bom.jsonl": "\ufeff" + LINES,
    "ascii.jsonl": "".join(json.dumps(row) + "\n" for row in TRICKY),
    "pairs.json": LIST,
    "ascii.json": json.dumps(TRICKY),
    "compact.json": json.dumps(TRICKY, ensure_ascii=False, separators=(",", ":")),
    "bom.json": "\ufeff" + LIST + "\n\n",
    "lines.json": LINES,
    "unseparated.json": "".join(json.dumps(row) for row in TRICKY),
    "pretty_objects.json": "\n\n".join(json.dumps(row, indent=4) for row in TRICKY),
    "pairs.csv": to_table(TRICKY),
    "bom.csv": "\ufeff" + to_table(TRICKY),
    "pairs.tsv": to_table(TRICKY, "\t"),
}


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_formats_give_the_same_rows(name: str, packing: str, size: int) -> None:
    assert [row for _, row in read_path(write(name + packing, TEXTS[name]), size)] == TRICKY


WRITERS: dict[str, Callable[[str], object]] = {
    "pairs.parquet": lambda path: pq.write_table(TABLE, path),
    "groups.parquet": lambda path: pq.write_table(TABLE, path, row_group_size=3, write_page_checksum=True),
    "packed.parquet": lambda path: pq.write_table(TABLE, path, compression="zstd"),
    "stream.arrow": lambda path: write_arrow(path, TABLE),
    "stream_batches.arrow": lambda path: write_arrow(path, TABLE, max_chunksize=3),
    "file.arrow": lambda path: write_arrow(path, TABLE, pa.ipc.new_file),
    "file_batches.arrow": lambda path: write_arrow(path, TABLE, pa.ipc.new_file, max_chunksize=5),
    "large.arrow": lambda path: write_arrow(
        path, TABLE.cast(pa.schema([(name, pa.large_string()) for name in TABLE.column_names]))
    ),
    "dictionary.arrow": lambda path: write_arrow(
        path, pa.table([c.dictionary_encode() for c in TABLE], TABLE.schema.names)
    ),
    "view.arrow": lambda path: write_arrow(
        path, TABLE.cast(pa.schema([(name, pa.string_view()) for name in TABLE.column_names]))
    ),
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", WRITERS)
def test_arrow_formats_give_the_same_rows(name: str, size: int) -> None:
    WRITERS[name](name)
    assert read_path(name, size) == list(enumerate(TRICKY, start=1))


def test_nested_columns_and_missing_values_stay() -> None:
    rows = [{"chosen": [{"role": "user", "content": "a"}], "tools": None}, {"chosen": None, "tools": [{"x": 1.5}]}]
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    assert [row for _, row in read_path("rows.parquet")] == rows
    assert [row for _, row in read_path(write("rows.jsonl", to_lines(rows)))] == rows


@pytest.mark.parametrize("size", [1, 5, 9, 24, 100])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_batches_are_full_and_never_mix_files(name: str, size: int) -> None:
    kind = name.partition(".")[2]
    for name in (f"a.{kind}", f"b.{kind}"):
        if kind in ("parquet", "arrow"):
            table = pa.Table.from_pylist(ROWS)
            pq.write_table(table, name) if kind == "parquet" else write_arrow(name, table)
        else:
            write(name, {"jsonl": to_lines(ROWS), "json": json.dumps(ROWS), "csv": to_table(ROWS)}[kind])
    source, _ = open_sources(SourceFields(path=f"*.{kind}"), "data")
    batches = list(source.batches(size))
    sizes = [min(size, len(ROWS) - start) for start in range(0, len(ROWS), size)]
    assert [(batch.file, len(batch.numbers)) for batch in batches] == [(f, n) for f in (0, 1) for n in sizes]
    again = [(batch.file, batch.numbers, list(decode_rows(batch))) for batch in source.batches(size)]
    assert again == [(batch.file, batch.numbers, list(decode_rows(batch))) for batch in batches]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_batch_of_long_rows_ends_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BATCH_BYTES", 1000)
    rows = [{"prompt": "x" * 400} for _ in range(10)]
    if name.endswith(("parquet", "arrow")):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, name) if name.endswith("parquet") else write_arrow(name, table)
    else:
        write(name, {"jsonl": to_lines(rows), "json": json.dumps(rows), "csv": to_table(rows)}[name[2:]])
    source, _ = open_sources(SourceFields(path=name), "data")
    assert 4 <= len(list(source.batches(1000))) <= 5 and rows_of(source) == rows


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "rows.parquet"])
def test_a_batch_is_pickled_without_what_it_was_cut_from(name: str) -> None:
    table = pa.Table.from_pylist([{"prompt": f"{n:0100}", "kind": "u"} for n in range(10000)])
    table = table.set_column(1, "kind", table["kind"].dictionary_encode()).replace_schema_metadata({"note": "x" * 5000})
    if name == "rows.parquet":
        pq.write_table(table, name)
    else:
        write_arrow(name, table, pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)
    batches = list(open_sources(SourceFields(path=name), "data")[0].batches(10))
    assert len(batches) == 1000 and max(len(pickle.dumps(batch)) for batch in batches) < 5000


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("a.jsonl", '\n\n{"a": 1}\n  \r\n{"a": 2}\n\t\n\n{"a": 3}', [3, 5, 8]),
        ("a.jsonl", '{"a": "\u2028\x85\x0c"}\n{"a": 2}\n', [1, 2]),
        ("a.json", '\n[\n{"a": 1},\n\n{"a":\n2}\n,{"a": 3}, {"a": 4}\n]\n', [3, 5, 7, 7]),
        ("a.json", '{"a": 1}\n{"a":\n\n3} {"a": 2}\n{"a": 4}', [1, 2, 4, 5]),
        ("a.json", '[{"a": 1}, {"a": 2}, {"a": 3}]', [1, -2, -3]),
        ("a.csv", 'a,b\n1,2\n"x\ny\n\nz",3\n\n\n4,5\n', [2, 3, 9]),
        ("a.csv", '\n\na,b\r\n1,2\r\n"x\r\ny",3\r\n4,5', [4, 5, 7]),
        ("a.csv", "a,b\r1,2\r3,4\r", [2, 3]),
        ("a.tsv", 'a\tb\n"1\n1"\t2\n3\t"4"\n', [2, 4]),
    ],
)
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_rows_are_numbered_by_the_line_where_they_start(name: str, text: str, numbers: list[int], packing: str) -> None:
    name = write(name + packing, text)
    assert [number for number, _ in read_path(name, 2)] == numbers
    source = open_sources(SourceFields(path=name), "data")[0]
    assert (source.locate(0, 12), source.locate(0, -12)) == (f"{name}:12", f"{name}, row 12")


@pytest.mark.parametrize("name", ["pairs.parquet", "stream.arrow"])
def test_rows_without_lines_are_numbered_as_rows(name: str) -> None:
    WRITERS[name](name)
    assert open_sources(SourceFields(path=name), "data")[0].locate(0, 12) == f"{name}, row 12"


# --- JSON in pieces --------------------------------------------------------------------------------------------------

PIECES = [
    {"a": 1.25e-7, "b": -12, "c": [True, False, None, {}], "d": {"e": {"f": '}]"\\'}}},
    {"äöü😀": "日本語 \ud83d\ude00", "x": "\\" * 9, "y": "tab\t\u0007"},
    {"n": [1e5, -0.0, 123456789.5, float("inf"), float("-inf")]},
    {"deep": [[[[[{"k": "[{"}]]]]]},
]


@pytest.mark.parametrize("chunk", [*range(1, 24), 31, 64])
@pytest.mark.parametrize("layout", ["list", "pretty list", "ascii list", "objects", "pretty objects"])
def test_json_is_cut_anywhere(layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    indent, ascii_only = 2 if "pretty" in layout else None, "ascii" in layout
    rows = json.loads(json.dumps(PIECES))  # joins the surrogates
    if "list" in layout:
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    else:
        text = "\n".join(json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows)
    got = read_path(write("a.json", "\ufeff\n" + text + " \n"))
    assert [row for _, row in got] == rows
    starts = [number for number, line in enumerate(text.split("\n"), start=2) if line.strip() == "{"]
    assert [number for number, _ in got] == {
        "pretty list": [n for n in starts if text.split("\n")[n - 2] == "  {"],
        "pretty objects": [n for n in starts if text.split("\n")[n - 2] == "{"],
        "objects": [2, 3, 4, 5],
    }.get(layout, [2, -2, -3, -4])


VALUES = ["1.5e-10", "-0.25", "1E+5", "12345", "true", "null", "-Infinity", "NaN", '"\\ud83d\\ude00 x"', "[1.5]", "[]"]


@pytest.mark.parametrize("chunk", range(1, 21))
def test_values_that_are_no_objects_are_cut_anywhere_too(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    text = "[" + " ,\n".join(VALUES) + ', {"a": 1}]'
    source, _ = open_sources(SourceFields(path=write("a.json", text)), "data")
    batches = list(source.batches(100))
    assert batches[0].rows == [*VALUES, '{"a": 1}'] and batches[0].numbers == [*range(1, 12), 11]
    assert [str(row) for row in rows_of(source)[:-1]] == [
        *["not an object: a number"] * 4,
        "not an object: a truth value",
        "not an object: null",
        *["not an object: a number"] * 2,
        "not an object: a text",
        *["not an object: a list"] * 2,
    ]


BROKEN_JSON = [
    ('[{"a": 1},\n {"a": }]', "line 2, column 8: Expecting value"),
    ('[{"a": 1}\n {"a": 2}]', "line 2, column 2: Expecting ',' or ']'"),
    ('[{"a": 1},\n]', "line 2, column 1: Expecting value"),
    ('[,{"a": 1}]', "line 1, column 2: Expecting value"),
    ('[{"a": 1},\n{"a": 2}\n', "line 3, column 1: the list never closes"),
    ('[{"a": 1},\n', "line 2, column 1: the list never closes"),
    ("[", "line 1, column 2: the list never closes"),
    ('[{"a": 1}] x', "line 1, column 12: Extra data"),
    ('[{"a": 1}]\n[{"a": 2}]', "line 2, column 1: Extra data"),
    ('[{"a": 1}]]', "line 1, column 11: Extra data"),
    ('[{"a": 1}]\udcc3', "line 1, column 11: Extra data"),  # a byte that begins a character, and the file ends
    ('{"a": 1}\n{"a"', "line 2, column 5: Expecting ':' delimiter"),
    ('{"a": 1}\n{"b": "text', "line 2, column 7: Unterminated string starting at"),
    ('{"a": 1}\n{"b": "te\nxt"}', "line 2, column 10: Invalid control character at"),
    ('{"a": 1}\n]', "line 2, column 1: Expecting an object, or one list of them"),
    ('{"a": 1},\n{"a": 2}', "line 1, column 9: Expecting an object, or one list of them"),
    ('"text"', "line 1, column 1: Expecting an object, or one list of them"),
    ("\n12", "line 2, column 1: Expecting an object, or one list of them"),
    ("null", "line 1, column 1: Expecting an object, or one list of them"),
    ("plain text", "line 1, column 1: Expecting an object, or one list of them"),
    ("[" + '{"a":' * 100_000, "line 1, column 2: nested too deeply"),
]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(("text", "problem"), BROKEN_JSON, ids=[problem for _, problem in BROKEN_JSON])
def test_broken_json_names_line_and_column(
    text: str, problem: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", max(chunk, len(text) // 100))
    assert error_of(write("a.json", text)).startswith(f"`data.path=a.json`: cannot be read; {problem}")


def test_a_mistake_is_found_without_reading_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LONGEST_ROW", 100_000)  # would be exceeded if a mistake were taken for a cut
    monkeypatch.setattr(readers, "_CHUNK", 1000)
    text = '[{"a": 1},\n{"a": oops},' + '{"a": 1},' * 100_000 + "]"
    assert "line 2, column 7: Expecting value" in error_of(write("a.json", text))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", '{"data": [' + '{"a": 1},' * 200, "line 1, column 1: longer than 1,000 characters"),
        ("a.jsonl", "{}\n[" + '{"a": 1},' * 200, "line 2: longer than 1,000 bytes"),
        ("a.csv", 'a,b\n1,2\n"' + "x\n" * 1000, "line 3: a quote is opened that does not close"),
    ],
)
def test_a_file_laid_out_otherwise_is_not_loaded_whole(
    name: str, text: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_LONGEST_ROW", 1000)
    monkeypatch.setattr(readers, "_CHUNK", 100)
    assert f"`data.path={name}`: cannot be read; {problem}" in error_of(write(name, text))


# --- rows that cannot be used ----------------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"a": }', "broken JSON: Expecting value at column 7"),
    (b'{"a": 1', "broken JSON: Expecting ',' delimiter at column 8"),
    (b'{"a": "x', "broken JSON: Unterminated string starting at column 7"),
    (b'  {"a": 1} x', "broken JSON: Extra data at column 12"),
    (b"text", "broken JSON: Expecting value at column 1"),
    (b'{"a": "\xff"}', "invalid UTF-8: byte 8 of the line"),
    (b'{"a": "\xed\xa0\x80"}', "invalid UTF-8: byte 8 of the line"),
    (b'[{"a": 1}]', "not an object: a list"),
    (b'"text"', "not an object: a text"),
    (b"1", "not an object: a number"),
    (b"1.5", "not an object: a number"),
    (b"true", "not an object: a truth value"),
    (b"null", "not an object: null"),
    (b'{"chosen": "a", "chosen": "b"}', "duplicate key: `chosen` stands twice"),
    (b'{"m": [{"a": 1, "b": 2, "a": 1}]}', "duplicate key: `a` stands twice"),
    (b'{"\\ud800\\n": 1, "\\ud800\\n": 1}', "duplicate key: `\\ud800\\n` stands twice"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "broken JSON: nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON: a number of more than 4300 digits"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES, ids=[problem for _, problem in BAD_LINES])
def test_a_bad_line_costs_one_row(line: bytes, problem: str) -> None:
    (_, good), (number, bad), (_, last) = read_path(write("a.jsonl", b'{"a": 1}\n' + line + b'\r\n{"a": 2}\n'))
    assert (good, last, number) == ({"a": 1}, {"a": 2}, 2)
    assert isinstance(bad, RowError) and str(bad) == problem


@pytest.mark.parametrize("name", ["a.json", "lines.json"])
@pytest.mark.parametrize(("line", "problem"), BAD_LINES[-5:-2] + BAD_LINES[-1:])
def test_a_bad_object_costs_one_row_of_json_too(line: bytes, problem: str, name: str) -> None:
    text = b'{"a": 1}\n' + line if name == "lines.json" else b'[{"a": 1},\n' + line + b"]"
    (_, good), (number, bad) = read_path(write(name, text))
    assert (good, number, str(bad)) == ({"a": 1}, 2, problem)


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_bad_byte_of_json_and_csv_stays_for_the_check_of_texts(name: str) -> None:
    text = {"a.json": b'[{"a": "x\xff"},\n{"a": "y"}]', "a.csv": b"a\nx\xff\ny\n"}[name]
    assert [row for _, row in read_path(write(name, text))] == [{"a": "x\udcff"}, {"a": "y"}]


def test_numbers_that_are_none_are_floats_for_others_to_judge() -> None:
    ((_, row),) = read_path(write("a.jsonl", '{"a": NaN, "b": -Infinity}'))
    assert row["a"] != row["a"] and row["b"] == float("-inf")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1,2,3,4", "wrong number of cells: 4 instead of 3"),
        ("1,2", "wrong number of cells: 2 instead of 3"),
        ("text", "wrong number of cells: 1 instead of 3"),
        ('1,"a "b" c",3', "broken quoting: ',' expected after '\"'; a quote inside of quotes is written twice"),
    ],
)
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_bad_line_of_a_table_costs_one_row(line: str, problem: str, delimiter: str) -> None:
    name = "a.csv" if delimiter == "," else "a.tsv"
    text = "\n".join(["a,b,c", "1,,3", line, '"4, 4","5 ""x""",6']).replace(",", delimiter)
    (_, good), (number, bad), (_, last) = read_path(write(name, text))
    assert (good, number) == ({"a": "1", "b": "", "c": "3"}, 3)
    assert last == {"a": f"4{delimiter} 4", "b": '5 "x"', "c": "6"}
    assert isinstance(bad, RowError) and str(bad) == problem.replace("','", f"'{delimiter}'")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b,a\n1,2,3\n", "line 1: column `a` stands twice"),
        ('a,"\n\udcff","\n\udcff"\n1,2,3\n', "line 1: column `\\n\\udcff` stands twice"),
        (",a,b\n0,1,2\n", "line 1: column 1 has no name (pandas writes none with index=False)"),
        ("\na, ,b\n0,1,2\n", "line 2: column 2 has no name (pandas writes none with index=False)"),
        ('a,b\n1,2\n"3,4\n5,6\n', "line 3: a quote is opened that does not close (unexpected end of data)"),
    ],
)
def test_a_table_needs_a_header_and_quotes_that_close(text: str, problem: str) -> None:
    assert error_of(write("a.csv", text)) == f"`data.path=a.csv`: cannot be read; {problem}"


def test_a_cell_may_be_long() -> None:
    assert [row for _, row in read_path(write("a.csv", f"a,b\n{'x' * 500_000},1\n"))] == [
        {"a": "x" * 500_000, "b": "1"}
    ]


def test_a_broken_text_of_arrow_costs_one_row() -> None:
    texts = [b"one", b"t\xffwo", "drei ß".encode()]
    offsets = pa.array([0, 3, 7, 14], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"".join(texts))])
    write_arrow("a.arrow", pa.table({"a": column}))
    (_, first), (number, bad), (_, last) = read_path("a.arrow")
    assert (first, number, str(bad), last) == ({"a": "one"}, 2, "invalid UTF-8: byte 2 of a text", {"a": "drei ß"})


def test_a_time_out_of_range_costs_one_row() -> None:
    write_arrow("a.arrow", pa.table({"t": pa.array([0, 2**60], pa.timestamp("s"))}))
    (_, first), (_, bad) = read_path("a.arrow")
    assert isinstance(first, dict) and isinstance(bad, RowError) and bad.reason == "value out of range"


# --- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_packed_file_that_is_cut_short_is_never_taken_as_whole(suffix: str, packing: str) -> None:
    name = f"a.{suffix}.{packing}"
    whole = pack(name, {"jsonl": to_lines(ROWS), "json": json.dumps(ROWS), "csv": to_table(ROWS)}[suffix].encode())
    for length in [*range(1, 30), *range(30, len(whole) - 12, 17), *range(len(whole) - 12, len(whole))]:
        Path(name).write_bytes(whole[:length])
        assert error_of(name).startswith(f"`data.path={name}`: cannot be read; "), length


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize(
    "harm", [lambda data: data + b"garbage!", lambda data: data[:90] + b"\0\1\2\3" + data[94:], lambda data: b"{}\n"]
)
def test_a_packed_file_that_is_damaged_is_refused(packing: str, harm: Callable[[bytes], bytes]) -> None:
    name = f"a.jsonl.{packing}"
    Path(name).write_bytes(harm(pack(name, to_lines(ROWS).encode())))
    assert error_of(name).startswith(f"`data.path={name}`: cannot be read; ")


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_packed_files_may_be_joined(packing: str) -> None:
    name = f"a.jsonl.{packing}"
    Path(name).write_bytes(pack(name, to_lines(ROWS).encode()) * 2)
    assert [row for _, row in read_path(name)] == ROWS * 2


@pytest.mark.parametrize("name", ["pairs.parquet", "groups.parquet", "stream_batches.arrow", "file_batches.arrow"])
def test_a_corrupt_arrow_file_is_refused(name: str) -> None:
    WRITERS[name](name)
    whole = Path(name).read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], whole[:20], b"PAR1" * 9, b"no arrow file at all"):
        Path(name).write_bytes(damaged)
        if name == "stream_batches.arrow" and damaged == whole[:-20]:
            continue  # a stream may end without its end mark
        assert error_of(name).startswith(f"`data.path={name}`: cannot be read; ")


def test_a_parquet_page_that_changed_is_found() -> None:
    pq.write_table(TABLE, "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True)
    whole = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(whole.replace(b"It is 24.", b"It is 42.", 1))
    assert "crc checksum" in error_of("a.parquet").lower()


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_wrong_offset_is_found_before_it_ends_the_process(new: Callable[..., Any]) -> None:
    write_arrow("a.arrow", pa.table({"a": ["one", "four", "eleven!"]}), new)
    offsets = [struct.pack("<4i", *numbers) for numbers in ((0, 3, 7, 14), (0, 1 << 30, 7, 14))]
    whole = Path("a.arrow").read_bytes()
    assert offsets[0] in whole
    Path("a.arrow").write_bytes(whole.replace(*offsets))
    assert "offset" in error_of("a.arrow")


def test_a_column_name_that_is_no_text_is_refused() -> None:
    write_arrow("a.arrow", pa.table({"abcdefgh": ["one"]}))
    Path("a.arrow").write_bytes(Path("a.arrow").read_bytes().replace(b"abcdefgh", b"abcd\xfffgh"))
    assert error_of("a.arrow").startswith("`data.path=a.arrow`: cannot be read; 'utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_of_one_name_are_refused(name: str) -> None:
    table = pa.table([pa.array(["x"]), pa.array(["y"])], ["a", "a"])
    pq.write_table(table, name) if name == "a.parquet" else write_arrow(name, table)
    assert error_of(name) == f"`data.path={name}`: cannot be read; column `a` stands twice"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_called_by_its_name(name: str, encoding: str) -> None:
    text = "\ufeff" * (encoding == "utf-16-le") + to_lines(ROWS)
    assert error_of(write(name, text.encode(encoding))) == (
        f"`data.path={name}`: cannot be read; it is UTF-16; save it as UTF-8"
    )


NO_ROWS = {"a.jsonl": "\n \n", "a.json": "[]", "b.json": " \n", "c.json": " [ ] ", "a.csv": "a,b\n", "b.csv": "\n"}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", NO_ROWS)
def test_a_source_without_rows_is_refused(name: str, packing: str) -> None:
    name, text = name + packing, NO_ROWS[name]
    assert error_of(write(name, text)) == f"`data.path={name}`: holds no rows"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_an_arrow_file_without_rows_is_refused(name: str) -> None:
    for table in (pa.table({"a": pa.array([], pa.string())}), pa.table({})):
        pq.write_table(table, name) if name == "a.parquet" else write_arrow(name, table)
        assert error_of(name) == f"`data.path={name}`: holds no rows"


def test_one_of_several_files_may_be_without_rows() -> None:
    write("rows/a.jsonl", "\n")
    write("rows/b.jsonl", to_lines(ROWS))
    assert [row for _, row in read_path("rows")] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.csv.zst", "a.parquet", "a.arrow"])
def test_an_empty_file_is_refused(name: str) -> None:
    Path(name).touch()
    assert error_of(name) == f"`data.path={name}`: the file is empty"


FORMATS = ".json, .jsonl, .ndjson, .csv, .tsv (each also with .gz or .zst), .parquet or .arrow"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.txt", ".txt"),
        ("a.pkl", ".pkl"),
        ("a.gz", ".gz"),
        ("a.parquet.gz", ".parquet.gz"),
        ("a.jsonl.bz2", ".bz2"),
        ("a", ""),
        (".jsonl", ""),
    ],
)
def test_an_unknown_format_is_refused(name: str, suffix: str) -> None:
    Path(name).write_text("text")
    assert error_of(name) == f"`data.path={name}`: no such format `{suffix}`; use {FORMATS}"


@pytest.mark.parametrize(
    "path", ["pears.jsonl", "./pears.jsonl", "here/pairs", "~/pears.jsonl", "/nowhere/pears.jsonl"]
)
def test_a_missing_file_is_missed_with_the_nearest_name(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for folder in (".", "here"):
        write(f"{folder}/pairs.jsonl", LINES)
    near = "" if "nowhere" in path else "; did you mean `pairs.jsonl`?"
    assert error_of(path) == f"`data.path={path}`: no such file{near}"
    assert error_of("pairs.jsonl", eval_path=path) == f"`data.eval_path={path}`: no such file{near}"


@pytest.mark.parametrize("path", ["a.jsonl", "./a", "/a/b", "~nobody-of-this-name/a.jsonl", "a/b/c", "a b", "x" * 300])
def test_what_can_be_no_hub_dataset_is_a_missing_file(path: str) -> None:
    message = error_of(path)
    assert message.startswith(f"`data.path={path}`: ") and "hub" not in message


def test_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    write("home/pairs.jsonl", LINES)
    for path in ("~/pairs.jsonl", "~", "~/*.jsonl"):
        assert [row for _, row in read_path(path)] == TRICKY
    assert open_sources(SourceFields(path="~/pairs.jsonl"), "data")[0].files == ("~/pairs.jsonl",)


@pytest.mark.parametrize("path", ["a.jsonl", "folder", "*.jsonl"])
def test_a_file_that_may_not_be_read_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "folder/a.jsonl"):
        write(name, LINES)

    def refuse(file: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)  # the tests may be run by root, who may read everything
    message = error_of(path)
    assert message.startswith(f"`data.path={path}`: cannot be read; Permission denied (") and "a.jsonl" in message


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    write("folder/a.jsonl", LINES)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    assert error_of("folder") == "`data.path=folder`: cannot be read; Permission denied (folder)"


def test_a_file_that_vanishes_is_one_line() -> None:
    source, _ = open_sources(SourceFields(path=write("a.jsonl", LINES)), "data.sources.math")
    Path("a.jsonl").unlink()
    for use in (source.digest, lambda: list(source.batches(1))):
        with pytest.raises(DataError) as caught:
            use()
        assert str(caught.value) == (
            "`data.sources.math.path=a.jsonl`: cannot be read; No such file or directory (a.jsonl)"
        )


def test_the_source_of_a_mixture_is_named() -> None:
    assert error_of("a.jsonl", "data.sources.math") == "`data.sources.math.path=a.jsonl`: no such file"


def test_a_source_without_a_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"^`data\.path`: must be set"):
        open_sources(SourceFields(), "data")


# --- bundled, folders, globs -----------------------------------------------------------------------------------------


def test_bundled_pairs_bring_evaluation_rows() -> None:
    train, evaluation = open_sources(SourceFields(path="bundled:concise"), "data")
    assert evaluation is not None
    assert (train.files, evaluation.files) == (("bundled:concise/train.jsonl",), ("bundled:concise/eval.jsonl",))
    assert train.locate(0, 3) == "bundled:concise/train.jsonl:3"
    assert len(rows_of(train)) > len(rows_of(evaluation)) > 50


@pytest.mark.parametrize("name", ["concies", "", "../data"])
def test_unknown_bundled_pairs_are_refused(name: str) -> None:
    message = error_of(f"bundled:{name}")
    assert message.startswith(f"`data.path=bundled:{name}`: no such bundled data; ") and "concise" in message


def test_bundled_pairs_give_way_to_named_evaluation_rows() -> None:
    conf = SourceFields(path="bundled:concise", eval_path=write("mine.jsonl", LINES))
    assert rows_of(open_sources(conf, "data")[1]) == TRICKY


def open_names(path: str, **fields: Any) -> tuple[list[str], list[str] | None]:
    train, evaluation = open_sources(SourceFields(path=path, **fields), "data")
    return list(train.files), list(evaluation.files) if evaluation else None


@pytest.mark.parametrize(
    ("names", "train", "evaluation"),
    [
        (["a.jsonl", "b.csv.gz"], ["a.jsonl", "b.csv.gz"], []),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"], [0], [1]),
        (["x_eval.json", "x.json"], ["x.json"], ["x_eval.json"]),
        (["dev.tsv", "math.valid.tsv", "Evaluation2.tsv", "pairs.tsv"], ["pairs.tsv"], [2, 0, 1]),
        (["contest.jsonl", "device.jsonl", "latest.jsonl", "evaluate.jsonl", "eval.jsonl"], [0, 1, 3, 2], [4]),
        (["train_test_split.jsonl", "val.jsonl"], ["train_test_split.jsonl"], ["val.jsonl"]),
        (["test/0.jsonl", "train/0.jsonl", "train/dev.jsonl", "z/train.jsonl"], [1, 3], [0, 2]),
        (["b/2.jsonl", "a/1.jsonl", "c.jsonl"], [1, 0, 2], []),
        ([".hidden.jsonl", ".git/a.jsonl", "README.md", "a.txt", "dataset_infos.json", "a.jsonl"], ["a.jsonl"], []),
        (["state.json", "a.jsonl"], ["a.jsonl"], []),
    ],
)
@pytest.mark.parametrize("root", ["rows", "rows/", "./rows", "test", "absolute"])
def test_the_files_of_a_folder_are_told_apart_by_words(
    names: list[str], train: list[Any], evaluation: list[Any], root: str
) -> None:
    root = str(Path.cwd() / "rows") if root == "absolute" else root
    for name in names:
        write(f"{root}/{name}", "x")
    shown = [[str(Path(root) / (names[n] if isinstance(n, int) else n)) for n in part] for part in (train, evaluation)]
    assert open_names(root) == (shown[0], shown[1] or None)
    write("other/named.jsonl", "x")
    assert open_names(root, eval_path="other/named.jsonl") == (shown[0], ["other/named.jsonl"])


def test_rows_of_a_folder_say_their_file() -> None:
    write("rows/b.jsonl", to_lines(ROWS[2:]))
    write("rows/a.csv", to_table(ROWS[:2]))
    source, _ = open_sources(SourceFields(path="rows"), "data")
    assert rows_of(source) == ROWS
    assert source.locate(1, 5) == "rows/b.jsonl:5"
    write("rows/b.json", "[")
    assert error_of("rows") == "`data.path=rows`: rows/b.json: cannot be read; line 1, column 2: the list never closes"


@pytest.mark.parametrize("names", [[], ["README.md"], [".a.jsonl"], ["dataset_info.json"]])
def test_a_folder_without_rows_is_refused(names: list[str]) -> None:
    Path("rows").mkdir()
    for name in names:
        write(f"rows/{name}", "x")
    message = f"the folder holds no file of a known format; use {FORMATS}"
    assert error_of("rows") == f"`data.path=rows`: {message}"
    assert error_of("bundled:concise", eval_path="rows") == f"`data.eval_path=rows`: {message}"


def test_a_folder_of_evaluation_files_alone_is_refused() -> None:
    write("rows/test.jsonl", LINES)
    assert error_of("rows") == ("`data.path=rows`: holds evaluation files only; call one of them train.jsonl or alike")


def test_an_empty_file_of_a_folder_is_named() -> None:
    write("rows/a.jsonl", LINES)
    Path("rows/b.jsonl").touch()
    assert error_of("rows") == "`data.path=rows`: rows/b.jsonl: the file is empty"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("rows/*.jsonl", ["rows/a.jsonl", "rows/test.jsonl"]),
        ("rows/?.*", ["rows/a.jsonl", "rows/b.csv"]),
        ("rows/[ab].*", ["rows/a.jsonl", "rows/b.csv"]),
        ("rows/**/*.jsonl", ["rows/a.jsonl", "rows/sub/c.jsonl", "rows/test.jsonl"]),
        ("*/sub/*", ["rows/sub/c.jsonl"]),
    ],
)
def test_a_glob_takes_what_it_matches_as_it_is(pattern: str, expected: list[str]) -> None:
    for name in ("a.jsonl", "b.csv", "test.jsonl", ".hidden.jsonl", "sub/c.jsonl"):
        write(f"rows/{name}", "x")
    assert open_names(pattern) == (expected, None)
    assert open_names("rows/b.csv", eval_path=pattern) == (["rows/b.csv"], expected)


def test_a_glob_of_absolute_paths() -> None:
    write("rows/a.jsonl", LINES)
    assert open_names(f"{Path.cwd()}/rows/*") == ([f"{Path.cwd()}/rows/a.jsonl"], None)


def test_a_file_may_be_called_like_a_glob() -> None:
    write("pairs[1].jsonl", LINES)
    write("pairs1.jsonl", "x")
    assert open_names("pairs[1].jsonl") == (["pairs[1].jsonl"], None)


@pytest.mark.parametrize("pattern", ["rows/*.csv", "*.jsonl", "nowhere/*", "row?"])
def test_a_glob_without_a_match_is_refused(pattern: str) -> None:
    write("rows/a.jsonl", LINES)
    assert error_of(pattern) == f"`data.path={pattern}`: no file matches"


def test_a_glob_that_matches_an_unknown_format_is_refused() -> None:
    write("rows/a.jsonl", LINES)
    write("rows/b.txt", "x")
    assert error_of("rows/*") == f"`data.path=rows/*`: rows/b.txt: no such format `.txt`; use {FORMATS}"


@pytest.mark.parametrize("path", ["rows", "rows/*", "rows/**"])
@pytest.mark.parametrize("eval_path", ["rows/b.jsonl", "rows/[b].jsonl", "../{here}/rows/b.jsonl"])
def test_what_is_named_for_evaluation_is_not_trained_on(path: str, eval_path: str) -> None:
    for name in "abc":
        write(f"rows/{name}.jsonl", "x")
    eval_path = eval_path.format(here=Path.cwd().name)
    assert open_names(path, eval_path=eval_path) == (["rows/a.jsonl", "rows/c.jsonl"], [eval_path.replace("[b]", "b")])


@pytest.mark.parametrize("path", ["rows", "rows/*"])
def test_naming_all_files_for_evaluation_leaves_none_to_train_on(path: str) -> None:
    write("rows/a.jsonl", LINES)
    assert "holds evaluation files only" in error_of(path, eval_path="rows/a.jsonl")


def test_one_file_may_be_named_for_both() -> None:
    write("a.jsonl", LINES)
    assert open_names("a.jsonl", eval_path="a.jsonl") == (["a.jsonl"], ["a.jsonl"])


@pytest.mark.parametrize("path", ["a.jsonl", "rows", "rows/*", "bundled:concise"])
@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("subset", "main", "is for hub datasets, not for data.path={path}; leave it out"),
        ("revision", "v2", "is for hub datasets, not for data.path={path}; leave it out"),
        ("split", "test", "is for hub datasets and folders saved with splits, not for data.path={path}; leave it out"),
        (
            "eval_split",
            "test",
            "is for hub datasets and folders saved with splits, not for data.path={path}; set data.eval_path instead",
        ),
    ],
)
def test_settings_of_the_hub_are_refused_for_files(path: str, field: str, value: str, cure: str) -> None:
    for name in ("a.jsonl", "rows/a.jsonl"):
        write(name, LINES)
    assert error_of(path, **{field: value}) == f"`data.{field}={value}`: {cure.format(path=path)}"


# --- what `datasets` writes and loads --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dataset of three shards, a filtered one, one of mixed types, and a DatasetDict."""
    from datasets import Dataset, DatasetDict, Features, Json, List, Value, disable_progress_bars

    disable_progress_bars()
    root = tmp_path_factory.mktemp("saved")
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(root / "one", num_shards=3)
    rows.select([5, 3]).save_to_disk(root / "selected")
    DatasetDict(train=rows, test_prefs=rows.select(range(4))).save_to_disk(root / "both")
    mixed = Features({"prompt": Value("string"), "tools": List(Json()), "call": {"arguments": Json()}})
    Dataset.from_list(MIXED, features=mixed).save_to_disk(root / "mixed")
    Dataset.from_list(MIXED, features=mixed).to_parquet(root / "mixed.parquet")
    return root


MIXED = [
    {"prompt": "a", "tools": [{"x": 1}, {"y": ["z"]}], "call": {"arguments": {"n": 1.5, "m": None}}},
    {"prompt": "b", "tools": None, "call": {"arguments": [1, "two"]}},
    {"prompt": "c", "tools": [], "call": {"arguments": None}},
]


def test_a_saved_dataset(saved: Path) -> None:
    source, evaluation = open_sources(SourceFields(path=str(saved / "one")), "data")
    assert evaluation is None and rows_of(source) == ROWS
    assert source.files == tuple(f"{saved}/one/data-0000{n}-of-00003.arrow" for n in range(3))
    assert source.locate(2, 1) == f"{saved}/one/data-00002-of-00003.arrow, row 1"
    assert [row for _, row in read_path(saved / "selected")] == [ROWS[5], ROWS[3]]


@pytest.mark.parametrize("name", ["mixed", "mixed.parquet"])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_values_that_datasets_packs_as_json_are_unpacked(saved: Path, name: str, size: int) -> None:
    assert [row for _, row in read_path(saved / name, size)] == MIXED


def test_packed_json_that_is_broken_costs_one_row() -> None:
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "{", "[" * 100_000]))
    write_arrow("a.arrow", pa.table({"x": column}))
    (_, first), (_, second), (_, third) = read_path("a.arrow")
    assert first == {"x": {"a": 1}} and {second.reason, third.reason} == {"broken JSON"}


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_saved_dict_of_splits(saved: Path, slash: str) -> None:
    path = str(saved / "both") + slash
    train, evaluation = open_sources(SourceFields(path=path, eval_split="test_prefs"), "data")
    assert rows_of(train) == ROWS and rows_of(evaluation) == ROWS[:4]
    assert train.files == (f"{saved}/both/train/data-00000-of-00001.arrow",)
    assert open_sources(SourceFields(path=path), "data")[1] is None
    assert rows_of(open_sources(SourceFields(path=path, split="test_prefs"), "data")[0]) == ROWS[:4]
    split_as_file = SourceFields(path=path, eval_path=path.rstrip("/") + "/test_prefs")
    assert rows_of(open_sources(split_as_file, "data")[1]) == ROWS[:4]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"split": "trian"}, "`data.split=trian`: no such split in {path}; did you mean `train`?"),
        (
            {"eval_split": "test_pref"},
            "`data.eval_split=test_pref`: no such split in {path}; did you mean `test_prefs`?",
        ),
        ({"eval_split": "x"}, "`data.eval_split=x`: no such split in {path}; choose from test_prefs, train"),
        ({"subset": "x"}, "`data.subset=x`: is for hub datasets, not for data.path={path}; leave it out"),
        (
            {"eval_path": "{path}"},
            "`data.eval_path={path}`: the folder holds several splits; name the subfolder of one of them",
        ),
    ],
)
def test_settings_that_do_not_go_with_saved_splits(saved: Path, fields: dict[str, str], problem: str) -> None:
    path = str(saved / "both")
    fields = {key: value.format(path=path) for key, value in fields.items()}
    assert error_of(path, **fields) == problem.format(path=path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": 1}'])
def test_a_saved_folder_that_was_tampered_with(text: str) -> None:
    write("rows/state.json", text)
    write("rows/dataset_info.json", "{}")
    assert error_of("rows").startswith("`data.path=rows`: rows/state.json is not as `datasets` writes it; ")


def test_a_saved_folder_that_lacks_a_file() -> None:
    write("rows/state.json", '{"_data_files": [{"filename": "data-0.arrow"}]}')
    write("rows/dataset_info.json", "{}")
    assert error_of("rows") == "`data.path=rows`: rows/data-0.arrow: no such regular file"


@pytest.fixture
def hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Datasets from a hub that is a folder here; the calls are noted."""
    import datasets

    calls = []

    def load(path: str, subset: str | None, *, split: str, revision: str | None) -> Any:
        calls.append((path, subset, split, revision))
        both = datasets.load_from_disk(str(saved / "both"))
        if split not in both:
            raise ValueError(f'Unknown split "{split}". Should be one of {sorted(both)}.\nAnd more.')
        return both[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_hub_dataset(hub: list[tuple[Any, ...]], size: int) -> None:
    conf = SourceFields(path="org/prefs", subset="main", revision="v2", eval_split="test_prefs")
    train, evaluation = open_sources(conf, "data")
    assert evaluation is not None
    assert hub == [("org/prefs", "main", "train", "v2"), ("org/prefs", "main", "test_prefs", "v2")]
    assert (train.files, evaluation.files) == (("org/prefs (split train)",), ("org/prefs (split test_prefs)",))
    assert train.locate(0, 3) == "org/prefs (split train), row 3"
    assert read(train, size) == list(enumerate(ROWS, start=1)) and rows_of(evaluation) == ROWS[:4]
    assert max(len(batch.numbers) for batch in train.batches(size)) <= size
    assert train.digest() == train.dataset._fingerprint != evaluation.digest()


def test_a_hub_dataset_with_evaluation_rows_of_ones_own(hub: list[tuple[Any, ...]]) -> None:
    train, evaluation = open_sources(SourceFields(path="prefs", eval_path=write("a.jsonl", LINES)), "data")
    assert len(hub) == 1 and rows_of(train) == ROWS and rows_of(evaluation) == TRICKY


def test_an_unknown_split_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    assert error_of("org/prefs", eval_split="tset") == (
        "`data.path=org/prefs` (split tset): neither a file here nor a hub dataset in reach; "
        "Unknown split \"tset\". Should be one of ['test_prefs', 'train']."
    )


def test_a_hub_out_of_reach() -> None:
    message = error_of("no-such-org/no-such-dataset")
    assert message.startswith(
        "`data.path=no-such-org/no-such-dataset` (split train): neither a file here nor a hub dataset in reach; "
    )


def test_a_folder_here_comes_before_the_hub(hub: list[tuple[Any, ...]]) -> None:
    write("org/prefs/a.jsonl", LINES)
    assert [row for _, row in read_path("org/prefs")] == TRICKY and not hub


# --- digest, memory, imports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.csv.zst"])
def test_the_digest_is_of_the_content_alone(name: str) -> None:
    def digest(path: str) -> str:
        return open_sources(SourceFields(path=path), "data")[0].digest()

    write(name, LINES)
    data = Path(name).read_bytes()
    Path("copies").mkdir()
    copy = Path("copies", f"other_{name}")
    copy.write_bytes(data)
    assert digest(name) == digest(str(copy)) == digest("copies")
    copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert digest(str(copy)) != digest(name)
    other = Path("other.tsv" + Path(name).suffix.replace(".jsonl", ""))
    other.write_bytes(data)
    assert digest(str(other)) != digest(name)  # read in another way, it holds other rows


def test_the_digest_depends_on_where_files_end_and_on_their_order() -> None:
    contents = [("a", "bc"), ("ab", "c"), ("bc", "a"), ("abc",)]
    for number, texts in enumerate(contents):
        for name, text in zip("ab", texts, strict=False):
            write(f"{number}/{name}.jsonl", text)
    digests = {open_sources(SourceFields(path=str(n)), "data")[0].digest() for n in range(len(contents))}
    assert len(digests) == len(contents)


def peak_of(path: str, size: int = 256) -> tuple[int, int]:
    """Rows, and the most memory that Python held while they were read."""
    source, _ = open_sources(SourceFields(path=path), "data")
    tracemalloc.start()
    try:
        count = sum(len(batch.numbers) for batch in source.batches(size))
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_memory_stays_flat(name: str) -> None:
    row = {"prompt": "p" * 1000, "chosen": "é" * 500, "rejected": "r" * 1000}
    text = json.dumps(row, ensure_ascii=False).encode()
    with Path(name).open("wb") as file:
        if name == "a.csv":
            file.write(b"prompt,chosen,rejected\n")
            text = ",".join(row.values()).encode()
        file.write(b"[" * (name == "a.json"))
        for _ in range(21):
            file.write((text + (b"," if name == "a.json" else b"\n")) * 1000)
        file.write(text + b"]" * (name == "a.json"))
    assert Path(name).stat().st_size > 60_000_000
    count, peak = peak_of(name)
    assert count == 21_001 and peak < 20 << 20


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_memory_of_arrow_stays_flat(name: str) -> None:
    table = pa.table({"a": [f"{n:02000}" for n in range(10_000)]})
    if name == "a.parquet":
        pq.write_table(table, name, use_dictionary=False, compression="none")
    else:
        write_arrow(name, table, max_chunksize=1000)
    del table
    before = pa.total_allocated_bytes()
    source, _ = open_sources(SourceFields(path=name), "data")
    most = max(pa.total_allocated_bytes() - before for _ in source.batches(256))
    assert Path(name).stat().st_size > 19 << 20 and most < 8 << 20


def test_a_huge_object_is_not_scanned_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CHUNK", 1000)
    scanned = 0
    scan = json.JSONDecoder.raw_decode

    def count(decoder: json.JSONDecoder, text: str, start: int = 0) -> Any:
        nonlocal scanned
        scanned += len(text) - start
        return scan(decoder, text, start)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", count)
    row = {"m": [{"content": "x" * 90}] * 10_000}
    write("a.json", json.dumps([row]))
    (batch,) = open_sources(SourceFields(path="a.json"), "data")[0].batches(1)
    assert len(batch.rows[0]) > 1_000_000 and scanned < 4 * len(batch.rows[0])


def test_importing_it_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow"}
    code = f"import sys, dpo_runner.data.sources; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "set()\n", done.stderr
