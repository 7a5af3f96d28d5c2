"""Reading files of rows: what is no row is named, and nothing is changed or lost without a word."""

import csv
import io
import json
import sys
from datetime import timedelta

import pyarrow
import pyarrow.parquet
import pytest

from cme.errors import CMEError, DatasetError
from cme.files.csv_records import CsvRecords
from cme.files.strict_json import MAX_NESTING
from cme.files.tables import Malformed, open_table


@pytest.fixture
def read(tmp_path):
    """The rows of a file with the given bytes."""

    def rows(content, name="in.jsonl"):
        (tmp_path / name).write_bytes(content)
        return list(open_table(tmp_path / name).rows())

    return rows


def nested(depth):
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": NaN}', "NaN is no number in JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is no number in JSON"),
        (b'{"a": 1e999}', "the number 1e999 is beyond the range of a float"),
        (b'{"a": {"b": 1, "b": 2}}', "an object has the key 'b' twice"),
        (b'{"a": 1, "b": 3, "a": 2}', "an object has the key 'a' twice"),
        (b'{"a": ' + nested(MAX_NESTING) + b"}", f"nested more than {MAX_NESTING} deep"),
        (b'{"a": ' + nested(100_000) + b"}", f"nested more than {MAX_NESTING} deep"),
    ],
    ids=["NaN", "infinity", "range", "nested key twice", "key twice", "depth", "great depth"],
)
def test_json_that_readers_disagree_about_is_malformed(read, line, reason):
    good = b'{"a": "NaN", "b": 1e99}'
    first, bad, last = read(b"\n".join([good, line, good]))
    assert first == last == {"a": "NaN", "b": 1e99}
    assert bad.line == 2
    assert reason in bad.reason


def test_how_deep_a_line_may_be_does_not_hang_on_the_stack(read):
    lines = b"\n".join(b'{"a": ' + nested(depth) + b"}" for depth in range(MAX_NESTING - 3, MAX_NESTING + 3))

    def at(frames):
        return at(frames - 1) if frames else [isinstance(row, Malformed) for row in read(lines)]

    assert at(0) == at(sys.getrecursionlimit() // 2) == [False] * 3 + [True] * 3


def test_a_json_list_of_objects_has_rows(read):
    assert read(b'\xef\xbb\xbf[{"a": 1}, {"a": "x"}]', "in.json") == [{"a": 1}, {"a": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2}\n', "can't be read: not JSON"),
        (b'{"a": 1}', "is not a JSON list of objects; a file with one object per line ends with .jsonl"),
        (b'[{"a": 1}, 2]', "is not a JSON list of objects"),
        (b'[{"a": NaN}]', "NaN is no number"),
        (b"\xff", "can't be read: not UTF-8"),
        (b"[]", "is empty"),
    ],
)
def test_other_json_files_are_refused(read, content, message):
    with pytest.raises(DatasetError, match=message):
        read(content, "in.json")


ROWS = [f"p{i},r{i}\n" for i in range(3000)]


def csv_of(rows):
    return ("prompt,response\n" + "".join(rows)).encode()


@pytest.mark.parametrize("closed", [False, True], ids=["to the end", "to another quote"])
def test_a_stray_quote_spoils_its_own_line_alone(read, closed):
    rows = [*ROWS]
    rows[10] = 'p10,"r10\n'
    if closed:
        rows[1500] = 'p1500,"r, 1500"\n'
    found = read(csv_of(rows), "in.csv")
    (bad,) = (row for row in found if isinstance(row, Malformed))
    assert bad.line == 12
    assert ("a quote here would take 1,491 lines, up to line 1,502" if closed else "2,990 lines") in bad.reason
    assert [row["prompt"] for row in found if row != bad] == [f"p{i}" for i in range(3000) if i != 10]
    assert not closed or {"prompt": "p1500", "response": "r, 1500"} in found


@pytest.mark.parametrize(
    "last", ['"p400",r400\n', 'p400",r400\n', 'p400,"r400\n'], ids=["strict", "count", "open"]
)
def test_a_stray_quote_that_takes_a_few_odd_lines_too_spoils_them_and_its_own(read, last):
    rows = [*ROWS[:500]]
    rows[10], rows[50], rows[51], rows[400] = 'p10,"r10\n', "p50\n", "\n", last
    found = read(csv_of(rows), "in.csv")
    bad = [12, 52, 402] if last.endswith('"r400\n') else [12, 52]
    assert [row.line for row in found if isinstance(row, Malformed)] == bad
    assert len(found) == 499
    assert found[-1] == {"prompt": "p499", "response": "r499"}


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"name{i},{i}\n" for i in range(150)),
        "".join(f"As I said, line {i}\n" for i in range(20_000)),
        "".join(f'"{i}",a\n' for i in range(150)),
    ],
    ids=["a table", "long prose", "quotes"],
)
def test_a_sound_record_is_a_row_whatever_its_lines_look_like(read, text):
    assert read(csv_of([f"p,{quoted(text)}\n", "q,a\n"]), "in.csv") == [
        {"prompt": "p", "response": text},
        {"prompt": "q", "response": "a"},
    ]
    assert read(f"prompt\n{quoted(text)}\nq\n".encode(), "in.csv") == [{"prompt": text}, {"prompt": "q"}]


def test_a_table_in_a_sound_record_that_is_not_utf8_is_no_row(read):
    content = csv_of([f"p,{quoted(''.join(ROWS[:150]))}\n", "q,a\n"]).replace(b"p7,", b"\xff,")
    bad, good = read(content, "in.csv")
    assert bad.line == 2
    assert bad.reason.startswith("not UTF-8; its 151 lines")
    assert good == {"prompt": "q", "response": "a"}


def test_each_line_is_parsed_a_few_times_however_many_quotes_are_open(monkeypatch):
    parsed, reader = [], csv.reader
    lines = ["prompt,response\n", 'p,"r\n', *(['c",d,"e\n', *ROWS[:30]] * 100)]
    monkeypatch.setattr(csv, "reader", lambda lines, **kwargs: reader(map(seen, lines), **kwargs))

    def seen(line):
        parsed.append(line)
        return line

    found = list(CsvRecords(io.StringIO("".join(lines), newline="")))
    assert sum(isinstance(record, list) for _, record in found) == 3000
    assert len(parsed) < 4 * len(lines)


def test_a_response_of_many_lines_is_one_row(read):
    text = "\n".join(f"line {i}, of code" if i % 9 else "" for i in range(300)) + "\nthe end"
    assert read(csv_of([f'p,"{text}"\n', *ROWS[:3]]), "in.csv")[0] == {"prompt": "p", "response": text}


def test_a_malformed_record_says_how_many_lines_it_took(read):
    bad, good = read(csv_of(['p,"one\ntwo\nth"ree"\n', "p,r\n"]), "in.csv")
    assert bad.line == 2
    assert bad.reason.endswith("; its 3 lines up to line 4 are left out")
    assert good == {"prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'prompt,"resp"onse', "the header of .*in.csv can't be read: not CSV"),
        (b'prompt,"response', "the header of .*in.csv can't be read: not CSV"),
        (b"prompt,r\xe9ponse", "the header of .*in.csv can't be read: not UTF-8"),
        ("prompt,response".encode("utf-16"), "the header of .*in.csv can't be read: not UTF-8"),
        (b"a,b,a", "in.csv has two columns called 'a'"),
    ],
)
def test_a_header_that_cannot_be_read_is_named(read, header, message):
    with pytest.raises(DatasetError, match=message):
        read(header + b"\np,r\n", "in.csv")


def parquet(path, **columns):
    table = pyarrow.table(list(columns.values()), names=list(columns))
    pyarrow.parquet.write_table(table, path)


FAR = pyarrow.array([0, 10**15], pyarrow.timestamp("s"))
ODD_TEXT = pyarrow.StringArray.from_buffers(
    2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
)


@pytest.mark.parametrize(
    "column",
    [FAR, FAR.cast(pyarrow.timestamp("s", "Mars/Olympus")), pyarrow.array([timedelta(1)] * 2), ODD_TEXT],
    ids=["far date", "unknown time zone", "readable", "not UTF-8"],
)
def test_a_parquet_column_that_cannot_be_read_is_named(tmp_path, column):
    path = tmp_path / "in.parquet"
    parquet(path, prompt=["a", "b"], odd=column)
    if pyarrow.types.is_duration(column.type):
        assert list(open_table(path).rows())[1] == {"prompt": "b", "odd": timedelta(1)}
        return
    with pytest.raises(DatasetError, match=r"the column 'odd' in row group 0 of .*in.parquet can't be read"):
        open_table(path)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(DatasetError, match=r"in.parquet has two columns called 'prompt'"):
        open_table(tmp_path / "in.parquet")


def test_a_parquet_file_with_a_flipped_bit_is_read_or_named(tmp_path):
    path = tmp_path / "in.parquet"
    messages = [[{"role": "user", "content": f"Hi {i}"}] for i in range(40)]
    parquet(path, prompt=messages, response=[f"é{i}" * i for i in range(40)], score=[i / 7 for i in range(40)])
    content, outcomes = path.read_bytes(), set()
    counts = [i * 8 + 4 for i, byte in enumerate(content) if byte == 2 * 40]  # as Thrift writes 40 rows
    for bit in (*range(3, len(content) * 8, len(content) * 8 // 60), *counts):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        outcomes.add(outcome(path))
    assert {40} < outcomes
    assert all("in.parquet" in named for named in outcomes - {40})
    for count in ("it says 32 rows and has 40", "it says 40 rows and has 32"):
        assert any(count in named for named in outcomes - {40})


def outcome(path):
    """The number of rows, or the error."""
    try:
        return sum(1 for _ in open_table(path).rows())
    except CMEError as error:
        return str(error)


def test_one_table_is_the_same_in_every_format(tmp_path):
    rows = [{"prompt": f"p{i}", "response": 'a "b", c\nd' * (i % 3), "id": "007"} for i in range(5)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "in.json").write_text(json.dumps(rows))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) + "\r\n" for row in rows]
    (tmp_path / "in.csv").write_text(",".join(rows[0]) + "\r\n" + "".join(quoted), newline="")
    for suffix in ("parquet", "json", "jsonl", "csv"):
        table = open_table(tmp_path / f"in.{suffix}")
        assert (table.survey.rows, table.survey.columns) == (5, ("prompt", "response", "id"))
        assert list(table.rows()) == rows
