"""Files that grow by lines, of which a kill tears at most the last."""

import pytest

from cme.errors import CMEError
from cme.files import journal
from cme.files.journal import Journal
from cme.files.partial import Partial, partial_of


@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_a_line_cut_off_anywhere_costs_that_line_and_no_other(tmp_path, monkeypatch, block):
    monkeypatch.setattr(journal, "_BLOCK", block)
    whole = Journal(tmp_path / "j.jsonl")
    whole.append({"step": 1})
    before = whole.path.stat().st_size
    whole.append({"step": 2, "text": "é\n" * 9})
    for end in range(before, whole.path.stat().st_size):
        torn = Journal(tmp_path / f"{end}.jsonl")
        torn.path.write_bytes(whole.path.read_bytes()[:end])
        assert list(torn) == [{"step": 1}]
        torn.append({"step": 3})
        assert list(torn) == [{"step": 1}, {"step": 3}]


def test_a_first_line_that_was_cut_off_is_written_anew(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"st')
    Journal(tmp_path / "j.jsonl").append(1)
    assert (tmp_path / "j.jsonl").read_text() == "1\n"


@pytest.mark.parametrize("damage", ['{"st', "[" * 100_000, "\0" * 9, "é\r"])
@pytest.mark.parametrize("after", ["", '{"step": 3}\n', '{"st'])
def test_a_damaged_line_is_named_with_what_to_do(tmp_path, damage, after):
    (tmp_path / "j.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{after}', newline="")
    with pytest.raises(CMEError, match=r"line 2 of .*j.jsonl is damaged \(.*\): do this"):
        list(Journal(tmp_path / "j.jsonl", "do this"))


def test_lines_are_replaced_at_once(tmp_path):
    lines = Journal(tmp_path / "j.jsonl")
    assert list(lines) == []
    lines.append(1)
    lines.replace([2, "é"])
    assert list(lines) == [2, "é"]
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


ROWS = [{"a": 1.5}, [3, "not JSON"], {"b": None}]


def test_a_partial_file_keeps_rows_and_the_run_that_they_are_of(tmp_path):
    partial = Partial(partial_of(tmp_path / "out.csv"))
    partial.check({"input": 1})
    assert partial.header() is None
    assert partial.start({"input": {"sha256": "x"}, "size": 3}) == 0
    partial.append(ROWS)
    partial.append(ROWS[:1])
    with partial.path.open("ab") as file:
        file.write(b'[{"a"')
    again = Partial(tmp_path / "out.csv.partial")
    assert again.began == partial.began
    again.check({"size": 3})
    for identity, told in (
        ({"size": 4}, "with size = 3, not 4"),
        ({"input": {"sha256": "y"}}, "of an input with other contents"),
    ):
        with pytest.raises(CMEError, match=rf"out.csv.partial is of a run {told}.*forget it with --overwrite"):
            again.check(identity)
    assert again.start({"input": {"sha256": "x"}, "size": 3}) == 4
    again.append(ROWS[2:])
    assert list(again.rows()) == [*ROWS, ROWS[0], ROWS[2]]
    again.delete()
    assert not list(tmp_path.iterdir())
