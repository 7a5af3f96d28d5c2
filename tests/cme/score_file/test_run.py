"""`cme score`: what is read from each format and layout, and what is written."""

import csv
import io
import json
import random
import subprocess
import sys

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import tiny

from cme.cli import main
from cme.files.tables import Parquet, open_table
from cme.scores import SIGNAL_STATS, SIGNALS
from cme.verifier import Verifier

ROWS = [
    {"id": 7, "prompt": "Where is Paris?", "response": "In France.", "score": 0.5, "tags": ["a", "b"]},
    {"id": 8, "prompt": "Where is Rome?", "response": 'In Italy,\n"I think" é.', "score": None, "tags": []},
    {"id": 9, "prompt": "Where is Paris?", "response": "Not here", "score": 1e-3, "tags": ["日本"]},
]


def chat(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def chatty(tiny_models):
    return tiny_models["generator"]  # has a chat template


@pytest.fixture(scope="module")
def verifier(chatty):
    return Verifier.from_pretrained(chatty)


@pytest.fixture
def score(tmp_path, chatty):
    """Run the command on rows or on a file; returns its output as rows, and its exit code."""

    def run(rows, *options, output="out.jsonl", code=0, name="in.jsonl", models=(chatty,)):
        path = tmp_path / name
        if rows is not None:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        verifiers = [part for model in models for part in ("--verifier", model)]
        assert main(["score", str(path), "-o", str(tmp_path / output), *verifiers, *options]) == code
        return read(tmp_path / output) if code in (0, 3) else None

    return run


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return pyarrow.parquet.read_table(path).to_pylist()


def wanted(verifier, prompt, response, **options):
    return verifier.score([prompt], [response], stats=SIGNAL_STATS, **options)[0]


def assert_scores(row, score, prefix=""):
    for name in SIGNALS:
        assert row[prefix + name] == pytest.approx(getattr(score, name), abs=1e-4, rel=1e-4), name
    assert row[prefix + "unscorable"] is None


def test_rows_keep_their_columns_and_order_and_get_the_signals(score, verifier, capsys):
    out = score(ROWS)
    for row, before in zip(out, ROWS, strict=True):
        assert list(row) == [*before, *SIGNALS, "unscorable"]
        assert {name: row[name] for name in before} == before
        assert_scores(row, wanted(verifier, before["prompt"], before["response"]))
    told, notes = capsys.readouterr()
    assert "generator: float32 on cpu, its chat template" in notes
    assert "perplexity" not in told
    assert "3 rows, 3 responses, 3 scored" in told
    assert f"{sum(row['mean_logprob'] for row in out) / 3:.4f}" in told


@pytest.mark.parametrize("source", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("target", [".jsonl", ".csv", ".parquet"])
def test_every_format_can_be_read_and_written(score, tmp_path, source, target):
    frame = pandas.DataFrame(ROWS)
    path = tmp_path / f"table{source}"
    if source == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif source == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    out = score(None, name=path.name, output=f"out{target}")
    plain = score(ROWS, output="plain.jsonl")
    assert [row["response"] for row in out] == [row["response"] for row in ROWS]
    assert [float(row["mean_logprob"]) for row in out] == [row["mean_logprob"] for row in plain]
    assert [int(row["num_tokens"]) for row in out] == [row["num_tokens"] for row in plain]
    assert [str(row["id"]) for row in out] == ["7", "8", "9"]
    assert [row["unscorable"] or None for row in out] == [None] * 3


def test_a_conversation_has_one_score_in_every_format(score, tmp_path):
    tokenizer = tiny.tokenizer()
    calls = "{{ m.content or '' }}{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}"
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{{ m['content'] }}", calls)
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = []
    for arguments in ({"city": "Oslo"}, {"zone": "UTC", "at": {"day": 1}}, {"at": {"hour": 2}}, None):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        between = [] if arguments is None else [call, chat("tool", "4")]
        rows.append({"messages": [chat("user", "Hi"), *between, chat("assistant", "Paris")]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    plain, *others = (
        [
            row["mean_logprob"]
            for row in score(table, name=name, output=f"{name}.jsonl", models=(str(tmp_path / "model"),))
        ]
        for table, name in ((rows, "in.jsonl"), (None, "in.parquet"), (None, "in.csv"))
    )
    assert others == [plain, plain]
    assert len({*plain}) == len(rows)
    assert None not in plain


def test_a_lone_carriage_return_stays_in_its_field_of_csv(score, tmp_path):
    responses = ["10%\r20%\rdone", "plain", 'a "b", c\nd', "e\r\nf", "\r", "g\r"]
    rows = [{"prompt": "p\r", "res\rult": i, "response": text} for i, text in enumerate(responses)]
    score(rows, output="out.csv")
    table = open_table(tmp_path / "out.csv")
    assert [{name: row[name] for name in rows[0]} for row in table.rows()] == [
        {**row, "res\rult": str(row["res\rult"])} for row in rows
    ]
    assert list(pandas.read_csv(tmp_path / "out.csv")["response"]) == responses


def test_rows_of_csv_without_a_carriage_return_are_as_csv_writer_has_them(score, tmp_path):
    score([{"prompt": "", "response": text} for text in ("plain", 'a "b", c', "d\ne", "é")], output="out.csv")
    written = (tmp_path / "out.csv").read_bytes().decode()
    again = io.StringIO(newline="")
    csv.writer(again, lineterminator="\n").writerows(csv.reader(io.StringIO(written, newline="")))
    assert written == again.getvalue()


def test_parquet_keeps_the_types_of_parquet(score, tmp_path):
    table = pyarrow.table(
        {
            "prompt": ["Hi", "Ho"],
            "response": ["Paris", ""],
            "when": pyarrow.array([0, 1], pyarrow.timestamp("us")),
            "raw": pyarrow.array([b"\xff", None], pyarrow.binary()),
            "half": pyarrow.array([1, 2], pyarrow.int8()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    score(None, name="in.parquet", output="out.parquet")
    out = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert out.select(table.column_names).equals(table)
    assert out.schema.field("mean_logprob").type == pyarrow.float64()
    assert out.schema.field("num_tokens").type == pyarrow.int64()
    assert out["unscorable"].to_pylist() == [None, "the response is empty"]
    (first, _) = score(None, name="in.parquet", output="out.jsonl")
    assert (first["when"], first["raw"]) == ("1970-01-01T00:00:00", "ff")


def test_long_rows_come_in_row_groups_and_batches_of_bounded_size(score, tmp_path):
    rows = [{"prompt": "Hi", "response": "Paris", "text": "x" * 2**21, "id": i} for i in range(10)]
    score(rows, output="long.parquet")
    file = pyarrow.parquet.ParquetFile(tmp_path / "long.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    assert file.read()["id"].to_pylist() == list(range(10))

    draw = random.Random(0)
    texts = [draw.randbytes(2**20).hex() for _ in range(10)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "one-group.parquet", compression="none")
    batches = list(Parquet(tmp_path / "one-group.parquet").batches())
    assert max(batch.num_rows for batch in batches) < 5
    assert [text for batch in batches for text in batch["text"].to_pylist()] == texts


def test_short_rows_come_in_row_groups_of_1024(score, tmp_path):
    score([{"prompt": "Hi", "response": ""}] * 1500, output="out.parquet", code=3)
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1024, 476]


def test_messages_are_scored_by_their_last_one(score, verifier):
    turns = [chat("system", "Be brief."), chat("user", "Hi"), chat("assistant", "Yes?"), chat("user", "Where?")]
    rows = [{"messages": [*turns, chat("assistant", "Here.")]}, {"messages": turns}]
    rows += [{"messages": [chat("assistant", "Hello")]}, {"messages": [chat("user", "Hi"), chat("bot", "Ho")]}]
    rows += [{"messages": None}, {"messages": [chat("user", 3), chat("assistant", "Ho")]}]
    out = score(rows)
    assert_scores(out[0], wanted(verifier, turns, [chat("assistant", "Here.")]))
    assert [row["unscorable"] for row in out[1:]] == [
        "the last message is from 'user', not from 'assistant'",
        "no message comes before the response",
        "message 2 has the unknown role 'bot'; known are system, developer, user, assistant, tool",
        "the conversation is missing",
        "message 1: the content of a message is int '3', neither a text nor a list of parts",
    ]


def test_prompts_and_completions_may_be_messages_as_in_trl(score, verifier):
    rows = [{"prompt": [chat("user", "Where?")], "completion": [chat("assistant", "Here.")]}]
    rows += [{"prompt": [chat("user", "Where?")], "completion": [chat("assistant", "a"), chat("user", "b")]}]
    out = score(rows)
    assert_scores(out[0], wanted(verifier, "Where?", "Here."))
    assert out[1]["unscorable"] == "the response must be one message, from 'assistant'"


def test_many_responses_give_lists(score, verifier, tmp_path):
    rows = [
        {"prompt": "Where?", "responses": ["Here.", "", "There é"], "finished": [True, False, None]},
        {"prompt": "What?", "responses": [], "finished": []},
        {"prompt": None, "responses": ["a", "b"], "finished": [True, False]},
        {"prompt": "Who?", "responses": "me", "finished": None},
        {"prompt": "Why?", "responses": [None, [chat("assistant", "So.")]], "finished": ["stop"]},
    ]
    out = score(rows, "--score-end-of-turn")
    want = wanted(verifier, "Where?", "Here.", finished=[True], score_end_of_turn=True)
    assert out[0]["sum_logprob"] == pytest.approx([want.sum_logprob, None, out[0]["sum_logprob"][2]], abs=1e-4)
    assert out[0]["num_tokens"][:2] == [want.num_tokens, None]
    assert out[0]["unscorable"] == [None, "the response is empty", None]
    assert out[1]["mean_logprob"] == out[1]["unscorable"] == []
    assert out[2]["unscorable"] == ["the prompt is missing"] * 2
    assert out[3]["unscorable"] == ["there is no list of responses, unlike in other rows"]
    assert out[4]["unscorable"] == ["the response is missing", None]
    lists = [rows[0], rows[1], rows[2]]
    again = score(lists, "--score-end-of-turn", output="out.parquet")
    assert again[0]["mean_logprob"] == pytest.approx(out[0]["mean_logprob"], abs=1e-4)
    assert [row["unscorable"] for row in again] == [row["unscorable"] for row in out[:3]]
    frame = pandas.DataFrame([{**row, "responses": json.dumps(row["responses"])} for row in rows])
    frame.to_csv(tmp_path / "many.csv", index=False)
    texts = score(None, name="many.csv", output="out.csv")
    assert json.loads(texts[0]["unscorable"]) == out[0]["unscorable"]


PARTS = [{"type": "text", "text": "Here"}, {"type": "text", "text": "."}]
TURNS = [chat("assistant", "Here."), chat("tool", "3"), chat("assistant", "There")]


@pytest.mark.parametrize(
    "cell",
    ["Here.", chat("assistant", "Here."), [chat("assistant", "Here.")], chat("assistant", PARTS)],
    ids=["text", "message", "TRL", "parts"],
)
def test_one_response_is_a_text_or_a_message(score, verifier, cell):
    rows = [{"prompt": "Where?", "response": other} for other in (None, TURNS, cell, cell, ["a", "b"])]
    out = score(rows[:4])
    assert [row["unscorable"] for row in out[:2]] == [
        "the response is missing",
        "the response must be one message, from 'assistant'",
    ]
    for row in out[2:]:
        assert_scores(row, wanted(verifier, "Where?", "Here."))
    if not isinstance(cell, list):  # which by itself may be a list of one response
        odd = score(rows, output="odd.jsonl")[4]
        assert odd["unscorable"] == "there is a list of responses, unlike in other rows"


@pytest.mark.parametrize(
    "cell",
    [
        [chat("assistant", "Here."), chat("assistant", "There é")],
        ["Here.", chat("assistant", "There é")],
        [chat("assistant", PARTS), [chat("assistant", "There é")]],
    ],
    ids=["messages", "mixed", "parts"],
)
def test_many_responses_are_a_list_of_texts_and_messages(score, verifier, cell):
    one, turns = [chat("assistant", "Here.")], [*TURNS]
    out = score([{"prompt": "Where?", "response": other} for other in (one, cell, turns, one[0])])
    want = [wanted(verifier, "Where?", response).sum_logprob for response in ("Here.", "There é")]
    assert out[0]["sum_logprob"] == pytest.approx(want[:1], abs=1e-4)
    assert out[1]["sum_logprob"] == pytest.approx(want, abs=1e-4)
    for row in out[2:]:
        assert row["unscorable"] == ["there is no list of responses, unlike in other rows"]


def test_a_list_of_one_message_in_every_row_is_what_the_columns_name_says(score):
    cell = [chat("assistant", "Here.")]
    (one,) = score([{"prompt": "Where?", "completion": cell}], output="one.jsonl")
    (many,) = score([{"prompt": "Where?", "completions": cell}], output="many.jsonl")
    assert many["mean_logprob"] == [one["mean_logprob"]]


def test_parts_of_a_message_are_no_responses(score):
    (row,) = score([{"prompt": "Where?", "response": PARTS}], code=3)
    assert row["unscorable"].startswith("message 1 has the unknown role None")


def test_finish_reasons_say_what_is_cut_off(score):
    rows = [{"prompt": "Hi", "response": "Paris", "finish_reason": r} for r in ("stop", "length", None, "odd")]
    assert [row["finished"] for row in score(rows)] == [True, False, None, None]
    numbers = [{"prompt": "Hi", "response": "Paris", "finish_reason": r} for r in (1.0, 0.0, 1, 0.5)]  # of pandas
    assert [row["finished"] for row in score(numbers, output="numbers.jsonl")] == [True, False, True, None]
    out = score(rows, "--score-end-of-turn", output="ended.jsonl")
    assert [row["num_tokens"] for row in out] == [3, 2, 2, 2]
    out = score(rows, "--score-end-of-turn", "--all-finished", output="all.jsonl")
    assert [row["num_tokens"] for row in out] == [3] * 4
    mine = [{"prompt": "Hi", "response": "Paris", "finished": True}]
    assert list(score(mine, output="own.jsonl")[0])[:4] == ["prompt", "response", "finished", "mean_logprob"]


def test_a_part_of_the_response_is_scored_alone(score, verifier):
    text = "Paris is in France, Paris."
    spans = ["Paris", [20, 25], "Rome", [20, 99], None, {"at": 3}, ""]
    out = score([{"prompt": "Hi", "response": text, "answer": s} for s in spans], "--span-column", "answer")
    want = wanted(verifier, "Hi", text, token_spans=True)
    for row in out[:2]:
        assert_scores(row, want)
        assert_scores(row, want.within(20, 25), "span_")
    assert [row["span_unscorable"] for row in out[2:]] == [
        "the answer does not occur in the response",
        "the span [20, 99) is not within the response's 26 characters",
        "no span is given",
        "the span is neither a text nor [start, end)",
        "the answer does not occur in the response",
    ]
    assert all(row["mean_logprob"] for row in out)
    many = {"prompt": "Hi", "responses": [text, "Paris"], "answer": ["France", [0, 5]]}
    (row,) = score([many], "--span-column", "answer", output="many.jsonl")
    assert row["span_num_tokens"] == [want.within(12, 18).num_tokens, 2]
    both = {"prompt": "Hi", "responses": ["It is 3, so", "It is 7, so"], "answer": [3, 7]}
    (row,) = score([both], "--span-column", "answer", output="both.jsonl")
    assert (
        row["span_unscorable"] == ["[3, 7] may be a span or two answers: write texts, or a span per response"] * 2
    )


def test_reasoning_in_a_field_is_scored_as_it_was_written(score, verifier):
    message = {**chat("assistant", "In France."), "reasoning_content": "Hm, France?"}
    text = "<think>\nHm, France?\n</think>\n\nIn France."
    whole = wanted(verifier, "Where?", text, token_spans=True)
    for number, response in enumerate((message, text)):
        row = {"prompt": "Where?", "response": response, "part": "France"}
        (out,) = score([row], "--span-column", "part", output=f"{number}.jsonl")
        assert_scores(out, whole)
        assert_scores(out, whole.within(text.rindex("France"), len(text) - 1), "span_")
    call = {**chat("assistant", "Hm."), "tool_calls": [{"function": {"name": "f"}}]}
    (out,) = score([{"prompt": "Where?", "response": call}], output="call.jsonl", code=3)
    assert "has tool_calls besides its content" in out["unscorable"]


def test_tokens_are_listed_on_request(score, tmp_path):
    out = score([*ROWS, {"prompt": "Hi", "response": ""}], "--tokens")
    for row in out[:3]:
        tokens = row["tokens"]
        assert len(tokens) == row["num_tokens"]
        assert sum(t["logprob"] for t in tokens) == pytest.approx(row["sum_logprob"])
        assert tokens[0]["text"] == row["response"][tokens[0]["start"] : tokens[0]["end"]]
        assert list(tokens[0]) == ["id", "text", "start", "end", "logprob", "entropy", "top1"]
    assert out[3]["tokens"] is None
    assert [row["tokens"] for row in score(ROWS, "--tokens", output="o.parquet")] == [r["tokens"] for r in out[:3]]


def test_several_verifiers_are_named_and_joined(score, tiny_models, verifier):
    # The last one is too long in the chat template alone
    rows = [*ROWS, {"prompt": "Hi", "response": ""}, {"prompt": "Hi", "response": "z" * 240}]
    out = score(rows, models=(f"big={tiny_models['generator']}", tiny_models["verifier"]))
    other = Verifier.from_pretrained(tiny_models["verifier"])
    for row in out[:3]:
        a, b = (wanted(v, row["prompt"], row["response"]) for v in (verifier, other))
        assert_scores(row, a, "big/")
        assert_scores(row, b, "verifier/")
        assert row["mean_logprob_mean"] == pytest.approx((a.mean_logprob + b.mean_logprob) / 2, abs=1e-4)
        assert row["mean_logprob_min"] == pytest.approx(min(a.mean_logprob, b.mean_logprob), abs=1e-4)
        assert row["bits_per_byte_max"] == pytest.approx(max(a.bits_per_byte, b.bits_per_byte), abs=1e-4)
    assert out[3]["mean_logprob_mean"] is None
    assert out[3]["verifier/unscorable"] == "the response is empty"
    assert out[4]["verifier/mean_logprob"] is not None
    assert "exceed the verifier's context" in out[4]["big/unscorable"]
    assert out[4]["mean_logprob_mean"] is out[4]["mean_logprob_min"] is None


def test_two_verifiers_of_one_name_are_refused(score, chatty, capsys):
    score(ROWS, models=(chatty, chatty), code=1)
    assert "two verifiers are called 'generator': give them names" in capsys.readouterr().err


def test_variables_of_the_chat_template_reach_it(score, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt and brief %}In short: {% endif %}"
    tiny.llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (row,) = score(ROWS[:1], "--chat-template-kwargs", '{"brief": true}', models=(str(tmp_path / "model"),))
    brief = Verifier.of(tiny.llama(), tokenizer, chat_template_kwargs={"brief": True})
    assert_scores(row, wanted(brief, ROWS[0]["prompt"], ROWS[0]["response"]))
    (without,) = score(ROWS[:1], output="without.jsonl", models=(str(tmp_path / "model"),))
    assert abs(without["mean_logprob"] - row["mean_logprob"]) > 0.01


def test_a_verifier_can_be_spread_over_devices(score, chatty, monkeypatch):
    asked = []
    original = Verifier.from_pretrained
    monkeypatch.setattr(
        Verifier, "from_pretrained", lambda *args, **how: asked.append(how["device_map"]) or original(*args, **how)
    )
    spread = score(ROWS, "--device-map", "auto")
    assert asked == ["auto"]
    plain = score(ROWS, output="plain.jsonl")
    assert [row["mean_logprob"] for row in spread] == pytest.approx(
        [row["mean_logprob"] for row in plain], abs=1e-5
    )
    with pytest.raises(SystemExit) as stop:
        score(ROWS, "--device-map", "auto", "--device", "cpu")
    assert stop.value.code == 2


def test_columns_can_be_named(score, verifier):
    rows = [{"question": "Where?", "prompt": 3, "answer": "Here", "messages": 4}]
    (row,) = score(
        rows,
        "--prompt-column",
        "question",
        "--response-column",
        "answer",
        "--template",
        r"Q:\t{prompt}\nA: {response}",
    )
    other = Verifier.of(tiny.llama(), tiny.tokenizer(), template="Q:\t{prompt}\nA: {response}")
    assert_scores(row, wanted(other, "Where?", "Here"))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "a", "response": "b"},
            [],
            "has no column 'prompt', 'question' or 'instruction'; it has text, response. Name the right one",
        ),
        ({"prompt": "a", "text": "b"}, [], "'output' or 'outputs'; it has prompt, text"),
        (
            {"prompt": "a", "response": "b"},
            ["--messages-column", "chat"],
            "no column 'chat'; it has prompt, response",
        ),
        ({"prompt": "a", "response": "b"}, ["--span-column", "gold"], "no column 'gold'; it has prompt, response"),
        ({"prompt": "a", "response": "b"}, ["--score-end-of-turn"], "needs to know which responses ended"),
        ({"prompt": "a", "response": "b", "perplexity": 1}, [], "already has the columns perplexity: give"),
        ({"messages": 1}, ["--messages-column", "messages", "--prompt-column", "p"], "not both"),
        ({"prompt": "a", "response": "b"}, ["--template", "{prompt}"], "must contain {prompt} and {response}"),
        ({"prompt": "a", "response": "b"}, ["--device-map", "all"], "device_map='all' is not possible here"),
        ({"prompt": "a", "response": "b"}, ["--dtype", "fp16"], "there is no dtype 'fp16'"),
        (
            {"prompt": "a", "response": "b"},
            ["--verifier", "none=/no/such"],
            "could not load the verifier '/no/such'",
        ),
    ],
)
def test_errors_name_the_bad_value_and_what_there_is(score, tmp_path, row, options, message, capsys):
    score([row], *options, code=1)
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_variables_of_the_chat_template_that_are_no_json_are_named(score, capsys):
    with pytest.raises(SystemExit) as stop:
        score(ROWS, "--chat-template-kwargs", "{thinking: no}")
    assert stop.value.code == 2
    assert "--chat-template-kwargs: the value '{thinking: no}' is not JSON" in capsys.readouterr().err


def test_a_prefix_keeps_columns_apart(score):
    once = score(ROWS)
    twice = score(once, "--prefix", "again_", name="once.jsonl", output="twice.jsonl")
    for row, before in zip(twice, once, strict=True):
        assert row["again_mean_logprob"] == row["mean_logprob"] == before["mean_logprob"]


def test_what_parquet_cannot_hold_is_said_before_anything_is_scored(score, tmp_path, capsys):
    rows = [{"prompt": "a", "response": "b", "x": value} for value in (1, "one")]
    score(rows, output="out.parquet", code=1)
    assert "do not fit into Parquet (column 'x'" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    score([{"prompt": "a", "response": "b", "x": 2**80}], output="out.parquet", code=1)
    score([{"prompt": "a", "response": "b", "x": {}}], output="out.parquet", code=1)
    score([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", "x": 1}], output="out.parquet")


def test_help_is_fast_and_names_the_exit_codes():
    code = (
        "import sys; from cme.cli import main\n"
        "try: main(['score', '--help'])\n"
        "finally: assert not {'torch', 'transformers', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exit codes:" in done.stdout


def test_training_is_a_command_too(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "--resume-from-checkpoint" in capsys.readouterr().out


def test_cells_of_csv_that_look_like_json_values_are_texts(score, tmp_path):
    frame = pandas.DataFrame(
        {
            "prompt": ["How many?"] * 3,
            "response": ["It is 72", "It is true", "null and void"],
            "answer": ["72", "true", "null"],
        }
    )
    frame.to_csv(tmp_path / "in.csv", index=False)
    rows = score(None, "--span-column", "answer", name="in.csv")
    assert all(row["span_mean_logprob"] is not None for row in rows)
    (row,) = score(
        [{"prompt": "How many?", "response": "It is 72", "answer": 72}],
        "--span-column",
        "answer",
        output="2.jsonl",
    )
    assert row["span_mean_logprob"] == pytest.approx(rows[0]["span_mean_logprob"], abs=1e-5)


def test_lists_of_finished_flags_are_read_from_csv(score, tmp_path):
    row = {"prompt": "Where?", "responses": ["Here.", "There"], "finished": [True, False]}
    pandas.DataFrame(
        [{name: json.dumps(value) if name != "prompt" else value for name, value in row.items()}]
    ).to_csv(tmp_path / "in.csv", index=False)
    (from_csv,) = score(None, "--score-end-of-turn", name="in.csv")
    (want,) = score([row], "--score-end-of-turn", output="2.jsonl")
    assert from_csv["num_tokens"] == want["num_tokens"]
    assert from_csv["sum_logprob"] == pytest.approx(want["sum_logprob"], abs=1e-4)


def test_options_take_underscores_for_dashes(score):
    rows = [{"question": "Where?", "response": "Here"}]
    (plain,) = score(rows, "--prompt-column", "question")
    (same,) = score(rows, "--prompt_column", "question", "--chunk_rows=3", output="again.jsonl")
    assert same == plain
