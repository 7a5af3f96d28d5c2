"""`cme score` between other programs: standard input, standard output, and compressed files."""

import gzip
import io
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from cme.cli import main
from cme.files.partial import Partial
from cme.files.tables import open_table

ROWS = [{"id": i, "prompt": f"Where is {i}?", "response": "In Paris é" * (i % 4)} for i in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def score(tiny_models, tmp_path, monkeypatch):
    """Run the command with a text as its standard input; returns the exit code."""

    def run(source, output, *options, stdin=LINES):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(stdin.encode())))
        files = [str(source), "-o", str(output), "--chunk-rows", "4", "--no-progress"]
        return main(["score", *files, "--verifier", tiny_models["generator"], *options])

    return run


@pytest.fixture
def plain(score, tmp_path, capfd):
    """The bytes of the output for the rows."""
    (tmp_path / "plain.jsonl").write_text(LINES)
    assert score(tmp_path / "plain.jsonl", tmp_path / "plain.out.jsonl") == 0
    capfd.readouterr()
    return (tmp_path / "plain.out.jsonl").read_bytes()


def test_standard_output_has_the_rows_of_a_file_and_nothing_else(score, plain, tmp_path, capfd):
    before = sorted(tmp_path.iterdir())
    for source in ("-", tmp_path / "plain.jsonl"):
        assert score(source, "-") == 0
        told = capfd.readouterr()
        assert told.out.encode() == plain
        assert "30 rows, 30 responses, 22 scored" in told.err
        assert "mean_logprob" in told.err
        assert "response tokens in" in told.err
    assert sorted(tmp_path.iterdir()) == before


def test_standard_input_gives_the_same_file_and_an_interrupted_run_resumes(
    score, plain, tmp_path, capfd, monkeypatch
):
    append = Partial.append

    def interrupt(self, *args):
        append(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "append", interrupt)
        assert score("-", tmp_path / "out.jsonl") == 130
    assert score("-", tmp_path / "out.jsonl", stdin=LINES.replace("Paris", "Rome")) == 1
    assert "of an input with other contents" in capfd.readouterr().err
    assert score("-", tmp_path / "out.jsonl") == 0
    assert "4 of 30 rows were scored before; resuming" in capfd.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == plain


def test_malformed_lines_of_standard_input_are_named(score, capfd):
    assert score("-", "-", stdin=LINES + "{\n") == 3
    told = capfd.readouterr()
    assert len(told.out.splitlines()) == 30
    assert "line 31: not JSON" in told.err
    assert score("-", "-", stdin="") == 1
    assert "standard input is empty: it has no rows" in capfd.readouterr().err
    assert score("-", "-", stdin='{"text": 1}\n') == 1
    assert "standard input has no column 'prompt'" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.jsonl.zst", "out.csv.gz", "out.ndjson.zst"])
def test_a_compressed_output_has_what_a_plain_one_has_and_resumes_to_the_same_bytes(
    score, plain, tmp_path, name, monkeypatch
):
    bare = name.rpartition(".")[0]
    assert score(tmp_path / "plain.jsonl", tmp_path / bare) == 0
    assert score(tmp_path / "plain.jsonl", tmp_path / name) == 0
    whole = (tmp_path / name).read_bytes()
    assert list(open_table(tmp_path / name).rows()) == list(open_table(tmp_path / bare).rows())
    if name.endswith(".gz"):
        assert gzip.decompress(whole) == (tmp_path / bare).read_bytes()
    append = Partial.append

    def interrupt(self, *args):
        append(self, *args)
        raise KeyboardInterrupt

    (tmp_path / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "append", interrupt)
        assert score(tmp_path / "plain.jsonl", tmp_path / name) == 130
    assert score(tmp_path / "plain.jsonl", tmp_path / name) == 0
    assert (tmp_path / name).read_bytes() == whole


def test_a_compressed_input_that_was_cut_off_is_named(score, tmp_path, capsys):
    content = gzip.compress(LINES.encode())
    (tmp_path / "in.jsonl.gz").write_bytes(content[: len(content) // 2])
    assert score(tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl") == 1
    assert "in.jsonl.gz can't be decompressed: it is broken, cut off, or no gzip file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl.gz"]


@pytest.fixture
def piped(tiny_models):
    """The command in a process of its own, its standard output given."""

    def run(stdout):
        command = [sys.executable, "-m", "cme", "score", "-", "-o", "-", "--verifier", tiny_models["generator"]]
        return subprocess.Popen(
            [*command, "--chunk-rows", "1"], stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE
        )

    return run


def test_rows_come_while_others_are_scored_and_a_reader_that_leaves_ends_the_run(piped):
    process = piped(subprocess.PIPE)
    process.stdin.write(LINES.encode() * 400)
    process.stdin.close()
    assert json.loads(process.stdout.readline())["id"] == 0
    process.stdout.close()
    began = time.monotonic()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert b"error: whoever reads standard output has left" in told
    assert time.monotonic() - began < 20  # of minutes


def test_a_full_disk_behind_standard_output_is_an_error(piped):
    with open("/dev/full", "w") as full:
        process = piped(full)
        _, told = process.communicate(LINES.encode())
    assert process.returncode == 1
    assert b"error: could not write to standard output: [Errno 28] No space left on device" in told


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_closed_stream_is_named(tmp_path, monkeypatch, capfd, stream):
    monkeypatch.setattr(sys, stream, None)
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    words = ["-", "-o", str(tmp_path / "out.jsonl")] if stream == "stdin" else [str(path), "-o", "-"]
    assert main(["score", *words, "--verifier", "any"]) == 1
    assert "is closed" in capfd.readouterr().err
