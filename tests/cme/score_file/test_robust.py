"""`cme score` when something is wrong: the input, the model, the disk, or the process does not live to the end."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cme.cli import main
from cme.engine import forward
from cme.files.partial import Partial
from cme.fingerprint import fingerprint
from cme.text.rendering import Renderer
from cme.verifier import Verifier

WORDS = ["What", "is", "the", "capital", "of", "France", "Paris"]


@pytest.fixture(scope="module")
def many_rows():
    """Rows of varied lengths; prompts repeat, and some responses are empty."""
    return [
        {"id": i, "prompt": f"Where is {WORDS[i % 5]}?", "response": " ".join(WORDS[: i % 7]) + " é" * (i % 3)}
        for i in range(600)
    ]


@pytest.fixture
def command(tiny_models, tmp_path):
    """The arguments of a run of many chunks, on rows or on the bytes of a file."""

    def arguments(content, name="in.jsonl", output="out.jsonl", verifier=tiny_models["verifier"]):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        (tmp_path / name).write_bytes(content)
        files = [str(tmp_path / name), "-o", str(tmp_path / output)]
        return ["score", *files, "--verifier", verifier, "--chunk-rows", "4"]

    return arguments


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chunks(path):
    """Whole lines after the header."""
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def test_a_killed_run_resumes_to_the_same_bytes_and_one_output_has_one_writer(
    command, many_rows, tmp_path, capsys
):
    assert main(command(many_rows, output="whole.jsonl")) == 0
    arguments = command(many_rows)
    partial = tmp_path / "out.jsonl.partial"
    process = subprocess.Popen(
        [sys.executable, "-m", "cme", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while chunks(partial) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)  # so that it can't be done before the next lines are
        assert main(arguments) == 1
        assert "another process is writing" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = chunks(partial)
    assert 3 <= done < 150
    assert not (tmp_path / "out.jsonl").exists()
    with partial.open("ab") as file:
        file.write(b'[{"mean_logprob": -1')  # as a kill leaves a line

    assert main(arguments) == 0
    told = capsys.readouterr()
    assert f"{4 * done} of 600 rows were scored before; resuming" in told.err
    assert "600 rows, 600 responses" in told.out
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == list(range(600))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


@pytest.fixture
def interrupted(command, many_rows, monkeypatch):
    """Interrupts a run after two chunks; returns its arguments."""
    append = Partial.append

    def interrupt(self, rows):
        append(self, rows)
        if chunks(self.path) == 2:
            raise KeyboardInterrupt

    def run(**settings):
        arguments = command(many_rows, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(Partial, "append", interrupt)
            assert main(arguments) == 130
        return arguments

    return run


@pytest.fixture
def unfinished(interrupted):
    """Arguments of a run that was interrupted after two chunks."""
    return interrupted()


def test_an_interrupted_run_says_how_to_resume_it(interrupted, tmp_path, capsys):
    arguments = interrupted()
    told = capsys.readouterr().err
    assert "interrupted; the same command (without --overwrite) resumes where this one stopped" in told
    assert "rows were scored before" not in told
    assert main(arguments) == 0
    assert "8 of 600 rows were scored before; resuming" in capsys.readouterr().err
    assert len(lines(tmp_path / "out.jsonl")) == 600


def test_an_interruption_while_libraries_load_is_no_crash():
    # As Ctrl-C does it, in the first import that takes long
    code = (
        "import sys\n"
        "from cme.cli import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.exit(main(['score', 'a.jsonl', '-o', 'no-such.jsonl', '--verifier', 'm']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted; nothing had been scored\n")


def test_a_run_is_not_continued_with_other_options_input_or_verifier(unfinished, tiny_models, tmp_path, capsys):
    def refused(*changed):
        assert main([*unfinished, *changed]) == 1
        return capsys.readouterr().err

    assert "with template = 'auto', not '{prompt} {response}'" in refused("--template", "{prompt} {response}")
    assert "with chunk_rows = 4, not 5" in refused("--chunk-rows", "5")
    told = refused("--chat-template-kwargs", '{"thinking": false}')
    assert """with chat_template_kwargs = '{}', not '{"thinking": false}'""" in told
    assert "with other = None, not" in refused("--verifier", f"other={tiny_models['generator']}")
    source = tmp_path / "in.jsonl"
    content = source.read_bytes()
    source.write_bytes(content.replace(b"France", b"france", 1))
    assert "of an input with other contents" in refused()
    source.write_bytes(content)
    os.utime(source, (0, 0))  # a copy is the same input
    assert main(unfinished) == 0


def test_a_run_is_not_continued_with_other_weights_under_the_same_name(unfinished, tiny_models, capsys):
    weights = Path(tiny_models["verifier"]) / "model.safetensors"
    content = weights.read_bytes()
    tiny.llama(seed=9).save_pretrained(weights.parent)
    try:
        assert main(unfinished) == 1
    finally:
        weights.write_bytes(content)
    assert "is of a run of a verifier with other weights" in capsys.readouterr().err


def test_a_continued_run_makes_the_same_passes_however_much_memory_is_free(
    unfinished, tmp_path, capsys, monkeypatch
):
    header = json.loads((tmp_path / "out.jsonl.partial").read_text().splitlines()[0])
    budget = header["tokens_per_pass"]["verifier"]
    asked = []

    def score_requests(model, requests, *args, max_batch_tokens, **kwargs):
        asked.append(max_batch_tokens)
        return forward.score_requests(model, requests, *args, max_batch_tokens=max_batch_tokens, **kwargs)

    monkeypatch.setattr("cme.score_file.run.token_budget", lambda model: budget // 2)
    monkeypatch.setattr("cme.verifier.score_requests", score_requests)
    assert main(unfinished) == 0
    assert set(asked) == {budget}
    assert "resumes with" not in capsys.readouterr().err


def test_an_input_that_changes_under_way_ends_the_run(command, many_rows, tmp_path, monkeypatch, capsys):
    arguments, source = command(many_rows), tmp_path / "in.jsonl"
    content = source.read_bytes()
    append = Partial.append

    def edit(self, rows):
        append(self, rows)
        if chunks(self.path) == 2:
            source.write_bytes(b"".join(reversed(content.splitlines(keepends=True))))

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "append", edit)
        assert main(arguments) == 1
    assert "in.jsonl has been changed since the run began: restore it" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert main(arguments) == 1
    assert "of an input with other contents" in capsys.readouterr().err
    source.write_bytes(content)
    assert main(arguments) == 0
    assert "8 of 600 rows were scored before; resuming" in capsys.readouterr().err


def test_a_run_is_not_continued_with_another_configuration(unfinished, tiny_models, capsys):
    file = Path(tiny_models["verifier"]) / "config.json"
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"rms_norm_eps": 0.25}))
    try:
        assert main(unfinished) == 1
    finally:
        file.write_text(content)
    assert "is of a run of a verifier with another configuration" in capsys.readouterr().err


def test_responses_to_a_long_prompt_stay_in_one_chunk(command, monkeypatch):
    sizes = []
    append = Partial.append
    monkeypatch.setattr(Partial, "append", lambda self, rows: (sizes.append(len(rows)), append(self, rows)))
    monkeypatch.setattr("cme.score_file.job.MAX_CHUNK_CHARACTERS", 100)
    prompts = ["Where is Paris? " * 4] * 9 + ["Where is Rome? " * 4] * 3  # 64 and 60 characters
    rows = [{"prompt": prompt, "response": "Here"} for prompt in prompts]  # 64 + 9 * 4 characters
    assert main([*command(rows), "--chunk-rows", "50"]) == 0
    assert sizes == [9, 3]


def test_a_run_resumes_with_fewer_tokens_at_once(unfinished, tmp_path, capsys):
    assert main([*unfinished, "--max-batch-tokens", "32"]) == 0
    told = capsys.readouterr().err
    assert "8 of 600 rows were scored before; resuming" in told
    assert re.search(r"verifier began with \d+ tokens per pass and resumes with 32: the last digits", told)
    fewer = lines(tmp_path / "out.jsonl")
    assert main([*unfinished, "--overwrite"]) == 0
    assert "resumes with" not in capsys.readouterr().err
    for row, whole in zip(fewer, lines(tmp_path / "out.jsonl"), strict=True):
        assert row["mean_logprob"] == pytest.approx(whole["mean_logprob"], abs=1e-4)


TEMPLATE = tiny.CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        (TEMPLATE.replace("<|im_end|>", "<|{{ 'endoftext' if m.role == 'assistant' else 'im_end' }}|>"), {}),
        ("{% if messages[0].role == 'system' %}Rules: {% endif %}" + TEMPLATE, {}),
        (TEMPLATE.replace("{% endfor %}", "{% if not loop.last %}\n{% endif %}{% endfor %}"), {}),
        (TEMPLATE, {"enable_thinking": False}),
    ],
    ids=["end of turn", "system", "turns", "variables"],
)
def test_a_verifier_is_told_by_all_of_its_template(template, variables):
    # Each gives a single question the tokens that the usual template gives it
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    usual, other = (
        Verifier.of(tiny.llama(), tok, chat_template_kwargs=kwargs)
        for tok, kwargs in ((tiny.tokenizer(), {}), (tokenizer, variables))
    )
    assert other.renderer.prompt_ids("Hi") == usual.renderer.prompt_ids("Hi")
    assert fingerprint(other)["rendering"] != fingerprint(usual)["rendering"]
    assert fingerprint(usual) == fingerprint(Verifier.of(tiny.llama(), tiny.tokenizer()))


def test_a_template_that_writes_the_date_has_another_fingerprint_on_another_day():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%f') }}" + tokenizer.chat_template  # microseconds
    verifier = Verifier.of(tiny.llama(), tokenizer)
    assert len({fingerprint(verifier)["rendering"] for _ in range(5)}) == 1
    assert fingerprint(verifier.at(datetime(2026, 11, 29)))["rendering"] != fingerprint(verifier)["rendering"]


def test_a_run_keeps_the_date_that_it_began_with(interrupted, tmp_path, capsys):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d %f') }}" + tokenizer.chat_template  # microseconds
    tiny.llama().save_pretrained(tmp_path / "dated")
    tokenizer.save_pretrained(tmp_path / "dated")
    arguments = interrupted(verifier=str(tmp_path / "dated"))
    began = json.loads((tmp_path / "out.jsonl.partial").read_text().splitlines()[0])["began"]
    assert main(arguments) == 0
    assert "8 of 600 rows were scored before; resuming" in capsys.readouterr().err
    verifier = Verifier.from_pretrained(str(tmp_path / "dated"))
    for row in lines(tmp_path / "out.jsonl")[1:600:100]:
        (want,) = verifier.at(datetime.fromisoformat(began)).score([row["prompt"]], [row["response"]])
        assert row["mean_logprob"] == pytest.approx(want.mean_logprob, abs=1e-4)


def test_a_template_that_refuses_the_usual_question_has_a_fingerprint_too():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('x') }}{% endif %}" + TEMPLATE
    )
    assert fingerprint(Verifier(tiny.llama(), Renderer(tokenizer, None), True))["rendering"]


def test_a_verifier_is_the_same_wherever_its_weights_are(tiny_models, tmp_path):
    folder = tiny_models["verifier"]
    layers = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    whole = fingerprint(Verifier.from_pretrained(folder))
    for device_map in (layers, {"": "disk"}):
        spread = Verifier.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path))
        assert any(parameter.is_meta for parameter in spread.model.parameters())
        assert fingerprint(spread) == whole
    with torch.device("meta"):
        nowhere = tiny.llama()
    told = fingerprint(Verifier(nowhere, Renderer.of(tiny.tokenizer()), True))
    assert told["weights_sha256"] != whole["weights_sha256"]


def test_a_single_other_weight_is_another_verifier():
    verifier = Verifier.of(tiny.llama(), tiny.tokenizer())
    before = fingerprint(verifier)
    for parameter in verifier.model.parameters():
        place = parameter.data.flatten()[3:4]
        value = place.clone()
        place.add_(1)
        assert fingerprint(verifier)["weights_sha256"] != before["weights_sha256"]
        place.copy_(value)
    assert fingerprint(verifier) == before


def test_a_run_of_an_earlier_version_is_not_called_one_of_other_weights(unfinished, tmp_path, capsys):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(partial.read_text().replace('"weights_sha256": ', '"weights": ', 1))
    assert main(unfinished) == 1
    assert "is of a run of an earlier version of cme" in capsys.readouterr().err


def test_overwrite_starts_anew(unfinished, tmp_path, capsys):
    assert main([*unfinished, "--overwrite", "--template", "{prompt} {response}"]) == 0
    assert "scored before" not in capsys.readouterr().err
    assert main(unfinished) == 1
    assert "out.jsonl exists: name another file, or replace it with --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [lambda lines: [lines[0][:40]], lambda lines: [lines[0], b"5\n", *lines[1:]]])
def test_a_partial_file_cut_in_its_header_or_with_another_value_in_it_is_damaged(
    unfinished, tmp_path, capsys, cut
):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(b"".join(cut(partial.read_bytes().splitlines(keepends=True))))
    assert main(unfinished) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("of_header", "in_its_place"), [(b"}\n", b"}\n[{"), (b'"began": "20', b'"began": "2x')])
def test_a_damaged_partial_file_is_not_continued(unfinished, tmp_path, capsys, of_header, in_its_place):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes().replace(of_header, in_its_place, 1))
    assert main(unfinished) == 1
    assert re.search(r"is damaged.*: delete it to start anew", capsys.readouterr().err)
    assert main([*unfinished, "--overwrite"]) == 0


@pytest.mark.parametrize("room", [5_000, 150_000])
def test_a_full_disk_is_named_and_the_run_resumes_when_there_is_room(command, many_rows, tmp_path, room, capsys):
    # bytes a file may have: too few for the finished chunks, or enough for them and too few for the output
    arguments = command([{**row, "ballast": "x" * 1000} for row in many_rows[:200]])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        assert main([*arguments, "--no-progress"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert f"error: could not write to {tmp_path}" in told
    assert "the same command (without --overwrite) resumes" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.partial"]
    assert main(arguments) == 0
    out = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in out] == list(range(200))
    assert all((row["mean_logprob"] is None) == (not row["response"]) for row in out)


def test_malformed_lines_are_reported_with_their_numbers_and_the_rest_is_scored(command, tmp_path, capsys):
    good = [json.dumps({"id": i, "prompt": "Hi", "response": "Paris"}).encode() for i in range(3)]
    content = [
        b'{"prompt": "a", ',
        good[0],
        b"",
        b"[1, 2]",
        b'{"prompt": "\xff"}',
        good[1],
        b"\xef\xbb\xbf{}",
        good[2],
    ]
    content += [b'{"id": 9, "prompt": "Hi", "response": "cut o']
    assert main(command(b"\xef\xbb\xbf" + b"\n".join(content))) == 3
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 1, 2]
    told = capsys.readouterr().out
    assert "8 rows, 3 responses, 3 scored" in told
    assert "5 malformed lines, which the output leaves out" in told
    for number, reason in ((1, "not JSON"), (4, "not a JSON object but list"), (5, "not UTF-8"), (9, "not JSON")):
        assert f"line {number}: {reason}" in told
    assert main(command(b"\n".join(content), output="out.parquet")) == 3
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == [0, 1, 2]


def test_malformed_csv_records_are_reported_with_their_lines(command, tmp_path, capsys):
    content = b'prompt,response\nHi,"Paris\nis"\nHi\nHi,"a"b\nHi,\xff\nHi,Rome\nHi,"never closed\nHi,lost\n'
    assert main(command(content, name="in.csv")) == 3
    assert [row["response"] for row in lines(tmp_path / "out.jsonl")] == ["Paris\nis", "Rome"]
    told = capsys.readouterr().out
    for number, reason in (
        (4, "1 fields where the header has 2"),
        (5, "not CSV"),
        (6, "not UTF-8"),
        (8, "not CSV"),
    ):
        assert f"line {number}: {reason}" in told


def test_a_line_with_half_a_surrogate_pair_is_kept_as_it_is(command, tmp_path):
    content = b'{"prompt": "Hi", "response": "\\ud83d"}\n{"prompt": "Hi", "response": "Paris"}\n'
    assert main(command(content)) == 0
    out = lines(tmp_path / "out.jsonl")
    assert out[0]["response"] == "\ud83d"
    assert "not valid Unicode" in out[0]["unscorable"]
    assert out[1]["mean_logprob"] is not None


def test_a_key_or_a_nesting_that_parquet_cannot_hold_is_named(command, tmp_path, capsys):
    good = {"prompt": "Hi", "response": "Paris"}
    deep = json.loads("[" * 60 + "]" * 60)
    for odd in ({"\ud83d": 1}, {"a": {"\ud83d": 1}}, {"deep": deep}):
        arguments = command([good, {**good, **odd}], output="out.parquet")
        assert main(arguments) == 1
        assert "do not fit into Parquet" in capsys.readouterr().err
        assert main(command([good, {**good, **odd}])) == 0
        assert lines(tmp_path / "out.jsonl")[1].items() >= odd.items()
        (tmp_path / "out.jsonl").unlink()


def test_what_json_has_no_number_for_is_null(command, tmp_path):
    rows = {"prompt": ["Hi"] * 2, "response": ["Paris"] * 2, "loss": [float("nan"), 1.5]}
    rows["each"] = [[{"a": float("inf")}], []]
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "nan.parquet")
    arguments = command([])
    arguments[1] = str(tmp_path / "nan.parquet")
    assert main(arguments) == 0
    text = (tmp_path / "out.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [(row["loss"], row["each"]) for row in lines(tmp_path / "out.jsonl")] == [
        (None, [{"a": None}]),
        (1.5, []),
    ]


def test_every_malformed_line_is_in_a_file_of_its_own(command, tmp_path, capsys):
    good = json.dumps({"prompt": "Hi", "response": "Paris"}).encode()
    content = b"".join((good if i % 2 else b'{"prompt": NaN}') + b"\n" for i in range(60))
    assert main(command(content)) == 3
    told = capsys.readouterr().out
    assert "and 10 more" in told
    assert f"all malformed lines are listed in {tmp_path / 'out.jsonl.malformed.jsonl'}" in told
    listed = lines(tmp_path / "out.jsonl.malformed.jsonl")
    assert [line["line"] for line in listed] == list(range(1, 60, 2))
    assert all("NaN is no number" in line["reason"] for line in listed)
    assert main([*command(good), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_file_with_the_name_of_the_list_matters_only_where_a_line_is_malformed(command, tmp_path, capsys):
    good = json.dumps({"prompt": "Hi", "response": "Paris"}).encode()
    mine = tmp_path / "out.jsonl.malformed.jsonl"
    mine.write_text("mine")
    assert main(command(good + b"\n{")) == 1
    assert "out.jsonl.malformed.jsonl exists: name another file" in capsys.readouterr().err
    assert main(command(good)) == 0
    assert mine.read_text() == "mine"
    (tmp_path / "out.jsonl").unlink()
    assert main([*command(good + b"\n{"), "--overwrite"]) == 3
    assert lines(mine)[0]["line"] == 2


def test_a_json_cell_of_a_csv_that_is_refused_is_that_rows_problem(command, tmp_path):
    cells = ["[" * 100_000 + "]" * 100_000, '["Paris", NaN]', '["Paris", "Rome"]', "not a list"]
    content = "prompt,responses\n" + "".join('Hi,"' + cell.replace('"', '""') + '"\n' for cell in cells)
    assert main(command(content.encode(), name="in.csv")) == 0
    reasons = [row["unscorable"] for row in lines(tmp_path / "out.jsonl")]
    assert reasons == [
        ["the column 'responses': nested more than 100 deep"],
        ["the column 'responses': NaN is no number in JSON (null is for what has no value)"],
        [None, None],
        ["there is no list of responses, unlike in other rows"],
    ]


def test_huge_responses_are_counted_and_the_rest_is_scored(command, tmp_path, capsys):
    rows = [{"prompt": "Hi", "response": r} for r in ("x" * 10**6, "Paris", "Where? " * 200, "é" * 10**6, "Rome")]
    assert main(command(rows)) == 0
    out = lines(tmp_path / "out.jsonl")
    assert [row["mean_logprob"] is not None for row in out] == [False, True, False, False, True]
    told = capsys.readouterr().out
    assert "2 not scored: the response's N characters exceed the verifier's context of N" in told
    assert "1 not scored: the prompt's N and the response's N tokens exceed" in told


def test_a_run_without_a_single_score_is_no_success(command, capsys):
    assert main(command([{"prompt": "Hi", "response": ""}])) == 3
    assert "1 rows, 1 responses, 0 scored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b"", "is empty: it has no rows"),
        ("in.jsonl", b"\n\n", "is empty: it has no rows"),
        ("in.csv", b"prompt,response\n", "is empty: it has no rows"),
        ("in.csv", b"prompt,prompt\na,b\n", "two columns called 'prompt'"),
        ("in.parquet", b"PAR1 no more", "is not a Parquet file"),
        ("in.txt", b"x", "its name must end with .jsonl, .ndjson, .json, .csv, .parquet"),
        ("in.jsonl", b"not JSON\n", "can be read; line 1: not JSON"),
    ],
)
def test_inputs_that_cannot_be_read_are_named(command, tmp_path, name, content, message, capsys):
    assert main(command(content, name=name)) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_and_folders_that_do_not_exist_are_named(command, tmp_path, capsys):
    arguments = command([{"prompt": "Hi", "response": "Paris"}])

    def refused(index, value):
        changed = [*arguments]
        changed[index] = str(value)
        assert main(changed) == 1
        return capsys.readouterr().err

    assert "there is no file" in refused(1, tmp_path / "none.jsonl")
    assert "there is no folder" in refused(3, tmp_path / "none" / "out.jsonl")
    assert "its name must end with" in refused(3, tmp_path / "out.xlsx")
    assert "its name must end with .jsonl, .ndjson, .csv, .parquet" in refused(3, tmp_path / "out.json")
    assert "would replace the input" in refused(3, tmp_path / "in.jsonl")
    (tmp_path / "out.jsonl.malformed.jsonl").hardlink_to(tmp_path / "in.jsonl")
    assert "would replace the input" in refused(3, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.malformed.jsonl").unlink()
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder" in refused(3, tmp_path / "folder.jsonl")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--chunk-rows", "0"])
    assert stop.value.code == 2


def test_an_output_that_is_a_link_is_written_where_it_leads_to(command, tmp_path, capsys):
    arguments = command([{"prompt": "Hi", "response": "Paris"}])
    (tmp_path / "data").mkdir()
    (tmp_path / "out.jsonl").symlink_to("data/real.jsonl")
    for more in ([], ["--overwrite"]):
        assert main([*arguments, *more]) == 0
        assert (tmp_path / "out.jsonl").is_symlink()
        assert lines(tmp_path / "data" / "real.jsonl")[0]["response"] == "Paris"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["real.jsonl"]
    (tmp_path / "lost.jsonl").symlink_to("no-such-folder/real.jsonl")
    assert main([*arguments, "-o", str(tmp_path / "lost.jsonl")]) == 1
    assert f"there is no folder '{tmp_path / 'no-such-folder'}'" in capsys.readouterr().err


def test_a_users_own_files_beside_the_output_are_left_alone(command, tmp_path, capsys):
    arguments = command([{"prompt": "Hi", "response": "Paris"}])
    for name in ("out.jsonl.tmp", "out.jsonl.lock"):
        (tmp_path / name).write_text("mine")
    assert main(arguments) == 0
    partial = tmp_path / "out.jsonl.partial"
    for content in ("mine", '{"prompt": "mine"}\n'):
        partial.write_text(content)
        assert main([*arguments, "--overwrite"]) == 1
        assert "out.jsonl.partial is not of an unfinished run: move it away" in capsys.readouterr().err
        assert partial.read_text() == content
    partial.unlink()
    partial.mkdir()
    assert main([*arguments, "--overwrite"]) == 1
    assert "out.jsonl.partial can't be read (Is a directory): move it away" in capsys.readouterr().err
    assert [(tmp_path / f"out.jsonl.{name}").read_text() for name in ("tmp", "lock")] == ["mine", "mine"]


def test_a_checkpoint_that_gives_nan_for_some_tokens_spoils_those_responses_alone(command, tmp_path, capsys):
    options = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
    model = tiny.build(GPT2Config(vocab_size=320, tie_word_embeddings=False, **options), GPT2LMHeadModel)
    (broken,) = tiny.tokenizer()(" Paris")["input_ids"]  # among the last ids, which the self-check leaves out
    with torch.no_grad():
        model.transformer.wte.weight[broken] = 3e38  # finite, and its layer norm is not
    model.save_pretrained(tmp_path / "broken")
    tiny.tokenizer(chat=False).save_pretrained(tmp_path / "broken")
    responses = ["Rome", "In Paris.", "Where?", "To Paris, I think", "In France"]
    rows = [{"prompt": "Hi", "response": response} for response in responses]
    assert main(command(rows, verifier=str(tmp_path / "broken"))) == 0
    out = lines(tmp_path / "out.jsonl")
    assert [row["unscorable"] for row in out] == [
        "the verifier's log-probabilities are not finite" if " Paris" in r else None for r in responses
    ]
    assert "2 not scored: the verifier's log-probabilities are not finite" in capsys.readouterr().out


def test_a_broken_checkpoint_and_a_foreign_tokenizer_are_refused(command, tmp_path, capsys):
    rows = [{"prompt": "Hi", "response": "Paris"}]
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "infinite")
    tiny.tokenizer().save_pretrained(tmp_path / "infinite")
    assert main(command(rows, verifier=str(tmp_path / "infinite"))) == 1
    assert "NaN or infinite values in lm_head.weight" in capsys.readouterr().err
    tiny.llama(vocab_size=280).save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    assert main(command(rows, verifier=str(tmp_path / "small"))) == 1
    assert "303 tokens and the model only 280: it does not belong to this model" in capsys.readouterr().err


def test_scores_worse_than_chance_are_pointed_out(command, capsys):
    # A random model is wrong about everything, as one with the tokenizer of another is
    assert main(command([{"prompt": "Hi", "response": "The capital of France"}])) == 0
    assert "less likely than random tokens" in capsys.readouterr().err


def test_code_in_a_models_repository_runs_only_if_asked(command, tmp_path, capsys):
    folder = tmp_path / "coded"
    model = tiny.llama()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "class Config(LlamaConfig):\n    model_type = 'coded'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "coded", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    arguments = command([{"prompt": "Hi", "response": "Paris"}], verifier=str(folder))
    assert main(arguments) == 1
    assert "could not load the verifier" in (told := capsys.readouterr().err)
    assert "trust_remote_code" in told or "custom code" in told
    assert not marker.exists()
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert marker.exists()


LIMITED = """
import json, resource, sys
from cme.cli import main

warm_up, *commands = json.loads(sys.argv[1])
assert main(warm_up) == 0  # libraries take what they need
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20), resource.RLIM_INFINITY))
print("codes", [main(command) for command in commands])
"""


@pytest.fixture(scope="module")
def hungry(tmp_path_factory):
    """A model that takes 32 KiB a token in each of four vectors alive at once: 512 MiB for 4096 tokens."""
    folder = tmp_path_factory.mktemp("model") / "hungry"
    sizes = {"head_dim": 2048, "num_hidden_layers": 1, "max_position_embeddings": 65536}
    tiny.llama(**sizes).save_pretrained(folder)
    tiny.tokenizer(chat=False).save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")
def test_out_of_memory_halves_the_batches_and_costs_only_responses_that_never_fit(command, hungry, tmp_path):
    def arguments(responses, name, *options):
        rows = [{"prompt": "Hi", "response": response} for response in responses]
        return [*command(rows, f"{name}.jsonl", f"{name}.out.jsonl", hungry), "--no-progress", *options]

    at_once = ["--max-batch-tokens", "4096"]  # more than there is room for
    long = arguments([f"{i} " + "Paris " * 800 for i in range(6)], "long", "--chunk-rows", "6", *at_once)
    huge = arguments([*WORDS, "Paris " * 6000, "Rome"], "huge", "--chunk-rows", "20", *at_once)
    commands = [arguments(["Paris"], "warm"), long, huge]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "codes [0, 0]" in done.stdout, done.stderr
    *others, last_but_one, last = lines(tmp_path / "huge.out.jsonl")
    assert "out of memory in a forward pass over this response alone, 60" in last_but_one["unscorable"]
    assert all(row["mean_logprob"] is not None for row in [*others, last])

    assert (
        main([*long, "--overwrite", "--output", str(tmp_path / "whole.jsonl"), "--max-batch-tokens", "900"]) == 0
    )
    for row, want in zip(lines(tmp_path / "long.out.jsonl"), lines(tmp_path / "whole.jsonl"), strict=True):
        assert row["mean_logprob"] == pytest.approx(want["mean_logprob"], abs=1e-4)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x: can't allocate memory: you tried\nto")])
def test_out_of_memory_elsewhere_says_what_to_lower(unfinished, monkeypatch, error, capsys):
    def fail(self, rows):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "append", fail)
        assert main([*unfinished, "--max-batch-tokens", "64"]) == 1
    told = capsys.readouterr().err
    assert "error: out of memory: " in told
    assert "Lower --max-batch-tokens (it is 64) or free memory; the same command" in told
