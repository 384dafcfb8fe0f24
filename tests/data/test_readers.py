"""Tests of the readers: same numbered rows from all formats, flat memory, one-line located errors."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.rows import json_text, readers
from dpo_runner.data.rows.decoding import decode_rows
from dpo_runner.data.rows.sources import open_sources
from dpo_runner.errors import RowError
from tests.support.common import ROWS
from tests.support.files import (
    LINES,
    LIST,
    TRICKY,
    WRITERS,
    error_of,
    read_path,
    rows_of,
    to_lines,
    to_table,
    write,
    write_arrow,
)

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


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "train"])
def test_the_rows_of_an_object_around_the_list(key: str, indent: int | None) -> None:
    wrapped = {"version": 1, "notes": ["x"], "none": [], "by": {"a": [{"prompt": "no row"}]}, key: TRICKY, "end": "}"}
    text = json.dumps(wrapped, indent=indent, ensure_ascii=False)
    assert [row for _, row in read_path(write("a.json", text))] == TRICKY
    bad = text.replace('"chosen"', "chosen", 1)
    assert "Expecting property name" in error_of(write("a.json", bad))
    twice = '{"data": [{"a": 1}],\n"data": [{"a": 2}]}'
    assert "line 2, column 9: `data` appears twice" in error_of(write("a.json", twice))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Why?"}], "chosen": "a", "rejected": "b"},
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"question": "Why?", "candidates": [{"text": "a", "reward": 1}, {"text": "b", "reward": 0}]},
        {"data": [1, {"a": 1}]},
        {"data": []},
    ],
)
def test_an_object_that_is_a_row_stays_one(row: dict[str, Any]) -> None:
    assert read_path(write("a.json", json.dumps(row))) == [(1, row)]
    assert read_path(write("a.json", json.dumps(row) + '\n{"data": [{"a": 1}]}')) == [
        (1, row),
        (2, {"data": [{"a": 1}]}),
    ]


@pytest.mark.parametrize("cells", [lambda name: [row[name] for row in ROWS], lambda name: {"0": "a", "10": "b"}])
def test_an_object_of_columns_is_refused(cells: Any) -> None:
    text = json.dumps({name: cells(name) for name in ROWS[0]})
    problem = "one object of columns; write a list of rows (with pandas, orient='records')"
    assert error_of(write("a.json", text)) == f"`data.path=a.json`: cannot be read; {problem}"


def test_an_object_of_several_lists_leaves_a_choice() -> None:
    text = json.dumps({"train": [{"a": 1}], "test": [{"a": 2}]})
    assert error_of(write("a.json", text)) == (
        "`data.path=a.json`: cannot be read; one object with several lists of objects (`train`, `test`); write each "
        "list to a file of its own"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json"])
def test_rows_that_were_encoded_twice(name: str) -> None:
    twice = [json.dumps(json.dumps(row)) for row in TRICKY]
    twice[1] = json.dumps(twice[1])
    text = f"[{','.join(twice)}]" if name.endswith(".json") else "\n".join(twice)
    assert [row for _, row in read_path(write(name, text))] == TRICKY
    (_, bad), (_, text_row) = read_path(write("a.jsonl", json.dumps('{"a": ') + '\n"{ is a brace"'))
    assert {bad.reason, text_row.reason} == {"broken JSON"}


def test_blanks_around_the_names_of_a_table_go_unless_names_would_become_equal() -> None:
    assert read_path(write("a.csv", "prompt, chosen ,\trejected\n p, c ,r\n")) == [
        (2, {"prompt": " p", "chosen": " c ", "rejected": "r"})
    ]
    assert read_path(write("a.csv", "a, a\n1,2\n")) == [(2, {"a": "1", " a": "2"})]
    problem = "line 1: column 2 has a blank before its quote; remove such blanks"
    assert problem in error_of(write("a.csv", '"a", "b"\n"1, 2", "3"\n'))  # else part of the name, and of each cell


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("a.jsonl", '\n\n{"a": 1}\n  \r\n{"a": 2}\n\t\n\n{"a": 3}', [3, 5, 8]),
        ("a.jsonl", '{"a": "\u2028\x85\x0c"}\n{"a": 2}\n', [1, 2]),
        ("a.json", '\n[\n{"a": 1},\n\n{"a":\n2}\n,{"a": 3}, {"a": 4}\n]\n', [3, 5, 7, 7]),
        ("a.json", '{"a": 1}\n{"a":\n\n3} {"a": 2}\n{"a": 4}', [1, 2, 4, 5]),
        ("a.json", '[{"a": 1}, {"a": 2}, {"a": 3}]', [1, -2, -3]),
        ("a.json", '\n {"v": {"n": [1]},"of":\n\t"x" , "data" :\n[{"a": 1},\n\n{"a": 2}], "end": [] }\n', [4, 6]),
        ("a.json", '{"data": [{"a": 1}, {"a": 2}, {"a": 3}]}', [1, -2, -3]),
        ("a.csv", 'a,b\n1,2\n"x\ny\n\nz",3\n\n\n4,5\n', [2, 3, 9]),
        ("a.csv", '\n\na,b\r\n1,2\r\n"x\r\ny",3\r\n4,5', [4, 5, 7]),
        ("a.csv", "a,b\r1,2\r3,4\r", [2, 3]),
        ("a.tsv", 'a\tb\n"1\n1"\t2\n3\t"4"\n', [2, 4]),
    ],
)
@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
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
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    indent, ascii_only = 2 if "pretty" in layout else None, "ascii" in layout
    rows = json.loads(json.dumps(PIECES))  # joins surrogate pairs
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
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    text = "[" + " ,\n".join(VALUES) + ', {"a": 1}]'
    source, _ = open_sources(SourceFields(path=write("a.json", text)), "data")
    batches = list(source.batches(100))
    assert batches[0].rows == [*VALUES, '{"a": 1}'] and batches[0].numbers == [*range(1, 12), 11]
    assert [str(row) for row in rows_of(source)[:-1]] == [
        *["not an object: a number"] * 4,
        "not an object: a boolean",
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
    ('[{"a": 1}]\udcc3', "line 1, column 11: Extra data"),  # the file ends in the middle of a character
    ('{"a": 1}\n{"a"', "line 2, column 5: Expecting ':' delimiter"),
    ('{"a": 1}\n{"b": "text', "line 2, column 7: Unterminated string starting at"),
    ('{"a": 1}\n{"b": "te\nxt"}', "line 2, column 10: Invalid control character at"),
    ('{"a": 1}\n]', "line 2, column 1: Expecting an object, or one list of them"),
    ('{"a": 1},\n{"a": 2}', "line 1, column 9: Expecting an object, or one list of them"),
    (
        '"text"',
        "line 1, column 1: Expecting an object, or one list of them; a list or object in quotes was encoded twi",
    ),
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
    monkeypatch.setattr(json_text, "CHUNK", max(chunk, len(text) // 100))
    assert error_of(write("a.json", text)).startswith(f"`data.path=a.json`: cannot be read; {problem}")


def test_a_mistake_is_found_without_reading_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        json_text, "LONGEST_ROW", 100_000
    )  # exceeded if the mistake were treated as an incomplete value
    monkeypatch.setattr(json_text, "CHUNK", 1000)
    text = '[{"a": 1},\n{"a": oops},' + '{"a": 1},' * 100_000 + "]"
    assert "line 2, column 7: Expecting value" in error_of(write("a.json", text))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", '{"data": [' + '{"a": 1},' * 200, "line 1, column 1: longer than 1,000 characters"),
        ("a.jsonl", "{}\n[" + '{"a": 1},' * 200, "line 2: longer than 1,000 bytes"),
        ("a.csv", 'a,b\n1,2\n"' + "x\n" * 1000, "line 3: a quote is never closed"),
    ],
)
def test_a_file_laid_out_otherwise_is_not_loaded_whole(
    name: str, text: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (readers, json_text):
        monkeypatch.setattr(module, "LONGEST_ROW", 1000)
    monkeypatch.setattr(json_text, "CHUNK", 100)
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
    (b"true", "not an object: a boolean"),
    (b"null", "not an object: null"),
    (b'{"chosen": "a", "chosen": "b"}', "duplicate key: `chosen` appears twice"),
    (b'{"m": [{"a": 1, "b": 2, "a": 1}]}', "duplicate key: `a` appears twice"),
    (b'{"\\ud800\\n": 1, "\\ud800\\n": 1}', "duplicate key: `\\ud800\\n` appears twice"),
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
        ('1,"a "b" c",3', "broken quoting: ',' expected after '\"'; double each quote inside quotes"),
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
        ("a,b,a\n1,2,3\n", "line 1: column `a` appears twice"),
        ('a,"\n\udcff","\n\udcff"\n1,2,3\n', "line 1: column `\\n\\udcff` appears twice"),
        (",a,b\n0,1,2\n", "line 1: column 1 has no name (with pandas, write with index=False)"),
        ("\na, ,b\n0,1,2\n", "line 2: column 2 has no name (with pandas, write with index=False)"),
        ('a,b\n1,2\n"3,4\n5,6\n', "line 3: a quote is never closed (unexpected end of data)"),
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


# --- memory


def peak_of(path: str, size: int = 256) -> tuple[int, int]:
    """Return the number of rows, and the peak Python memory in bytes while reading them."""
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
    monkeypatch.setattr(json_text, "CHUNK", 1000)
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
