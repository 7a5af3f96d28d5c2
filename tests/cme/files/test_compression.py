"""Compressed files: read like those that are not, and refused where they are broken or cut off."""

import gzip
import json

import pyarrow
import pytest

from cme.errors import DatasetError
from cme.files.compression import reading, writing_text
from cme.files.tables import format_of, is_table, open_table

ROWS = [{"prompt": f"Where is {i}?", "response": 'a "b", c\nd é' * (i % 3), "id": f"{i:03}"} for i in range(3000)]
TEXTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".ndjson": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": "\ufeff" + json.dumps(ROWS),
    ".csv": "prompt,response,id\n"
    + "".join(",".join(f'"{v.replace(chr(34), 2 * chr(34))}"' for v in row.values()) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("ending", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("suffix", TEXTS)
def test_a_compressed_table_has_the_rows_of_a_plain_one(tmp_path, suffix, ending):
    path = tmp_path / f"in{suffix}{ending}"
    with writing_text(path) as file:
        file.write(TEXTS[suffix])
    assert path.stat().st_size < len(TEXTS[suffix]) / 2
    table = open_table(path)
    assert (table.survey.rows, table.survey.columns) == (3000, ("prompt", "response", "id"))
    assert list(table.rows()) == ROWS
    assert format_of(path) == suffix
    assert is_table(str(path))


def test_other_programs_read_what_is_written_and_equal_texts_give_equal_bytes(tmp_path):
    for name in ("a.txt.gz", "b.txt.gz", "a.txt.zst", "b.txt.zst"):
        with writing_text(tmp_path / name) as file:
            file.write("é\ud83d\r\n" * 9999)
    want = ("é\\ud83d\r\n" * 9999).encode()
    assert gzip.decompress((tmp_path / "a.txt.gz").read_bytes()) == want
    assert pyarrow.input_stream(str(tmp_path / "a.txt.zst"), compression="zstd").read() == want
    for ending in ("gz", "zst"):
        assert (tmp_path / f"a.txt.{ending}").read_bytes() == (tmp_path / f"b.txt.{ending}").read_bytes()


def test_files_that_were_joined_are_read_to_the_end(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))
    assert list(open_table(path).rows()) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", TEXTS)
def test_a_file_that_was_cut_off_anywhere_is_named(tmp_path, suffix, ending):
    whole, path = tmp_path / f"whole{suffix}{ending}", tmp_path / f"in{suffix}{ending}"
    with writing_text(whole) as file:
        file.write(TEXTS[suffix])
    content = whole.read_bytes()
    for end in (1, 12, len(content) // 2, len(content) - 5, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(DatasetError, match=rf"in\{suffix}\{ending} can't be decompressed: it is .* cut off"):
            open_table(path)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_what_is_not_compressed_at_all_is_named(tmp_path, ending):
    path = tmp_path / f"in.jsonl{ending}"
    path.write_text('{"a": 1}\n')
    with pytest.raises(DatasetError, match=r"can't be decompressed: .* or no (gzip|zstd) file"):
        open_table(path)


def test_a_flipped_bit_in_gzip_is_named(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    content = bytearray(gzip.compress(TEXTS[".jsonl"].encode()))
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="can't be decompressed"), reading(path) as file:
        file.read()


def test_nothing_in_a_compressed_file_is_no_row(tmp_path):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DatasetError, match="is empty"):
        open_table(tmp_path / "in.jsonl.gz")


@pytest.mark.parametrize("name", ["in.parquet.gz", "in.gz", ".gz", "in.txt.zst", "in"])
def test_other_names_say_no_format(name, tmp_path):
    assert not is_table(name)
    (tmp_path / name).write_text("x")
    with pytest.raises(DatasetError, match=r"must end with .jsonl, .* or with .gz or .zst after one of these"):
        open_table(tmp_path / name)
