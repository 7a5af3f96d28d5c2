"""`python -m cme.train` with tiny models: what a run leaves behind, and how it goes wrong."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pandas
import pytest
import tiny
import torch
from safetensors.torch import load_file
from train_run import lines, options_for
from transformers import AutoModelForCausalLM

from cme.errors import CMEError
from cme.text.rendering import encode_prompt
from cme.train.__main__ import main
from cme.train.config import parse
from cme.train.run import train
from cme.train.trainer import PackedGRPOTrainer

STEPS = 4
WHEN = ("before", "after")


def assert_same_run(a, b):
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(1, STEPS + 1))
    for x, y in zip(a, b, strict=True):
        for name in ("reward", "loss", "grad_norm", "completions/mean_length"):
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-5), (x["step"], name)


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    args = options_for(tiny_models, run.parent)
    assert main([*args, "--max_steps", str(STEPS), "--save_total_limit", "2"]) == 0
    return run


def test_a_run_leaves_its_metrics_summary_picture_completions_and_model(finished):
    records = lines(finished)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    for name in ("rewards/cme/mean", "cme/accuracy", "cme/prompt_copy_rate", "cme/repeated_4gram_rate"):
        assert all(name in r for r in records)

    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["seconds"] > 0
    keys = {"reward", "accuracy_sampled", "accuracy_greedy", "mean_length", "finished_rate"}
    keys |= {"repeated_4gram_rate", "prompt_copy_rate"}
    for when in WHEN:
        assert keys <= summary[when].keys()
        assert all(summary[when][k] is not None for k in keys)
    low, high = summary["difference"]["reward"]["interval_95"]
    assert low <= summary["difference"]["reward"]["change"] <= high

    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    table = pandas.read_parquet(finished / "completions" / "completions_00004.parquet")
    assert len(table) == 16
    assert {"prompt", "completion", "cme", "advantage", "accuracy", "verifier_entropy"} <= set(table.columns)
    answers = json.loads((finished / "evaluation" / "after.json").read_text())
    assert len(answers) == 3 * (2 + 1)
    assert summary["after"]["reward"] == pytest.approx(
        sum(a["reward"] for a in answers if not a["greedy"]) / 6, abs=1e-9
    )


def test_held_out_answers_are_sampled_as_in_training_before_and_after(options, tmp_path):
    args = [
        *options,
        "--max_steps",
        "1",
        "--learning_rate",
        "0",
        "--bf16",
        "true",
        "--max_completion_length",
        "16",
    ]
    args += ["--temperature", "0.9", "--min_p", "0.02", "--repetition_penalty", "1.2"]
    assert main([*args, "--generation_kwargs", '{"typical_p": 0.95}']) == 0
    evaluation = tmp_path / "run" / "evaluation"
    before, after = (json.loads((evaluation / f"{when}.json").read_text()) for when in WHEN)
    assert before == after  # nothing was learned
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    given = {"temperature": 0.9, "top_p": 1.0, "top_k": 0, "min_p": 0.02, "repetition_penalty": 1.2}
    assert summary["settings"]["sampling"] == {**given, "generation_kwargs": {"typical_p": 0.95}}
    assert summary["decoding"].items() >= {**given, "typical_p": 0.95, "max_new_tokens": 16}.items()


def test_the_trained_model_loads_and_has_moved(finished, tiny_models):
    trained = AutoModelForCausalLM.from_pretrained(finished / "model")
    start = AutoModelForCausalLM.from_pretrained(tiny_models["generator"])
    assert not torch.equal(trained.model.norm.weight, start.model.norm.weight)
    assert "cme_packed" not in (finished / "model" / "config.json").read_text()


def test_the_policy_learns_what_the_verifier_finds_likely(tiny_models, tmp_path):
    args = options_for(tiny_models, tmp_path)
    assert (
        main([*args, "--max_steps", "60", "--learning_rate", "1e-2", "--eval_prompts", "0", "--on_alarm", "off"])
        == 0
    )
    records = lines(tmp_path / "run")
    first, last = (sum(r["reward"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last > first + 0.4  # a step's mean varies by 0.3


def test_a_live_run_is_left_alone_and_a_killed_one_resumes_from_its_newest_complete_checkpoint(
    finished, options, tmp_path, capsys
):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cme.train", *options, "--max_steps", "1000", "--save_total_limit", "99"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoint-2" / "cme-manifest.json").exists() or len(lines(run)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for other in ([], ["--overwrite"], ["--resume_from_checkpoint", "latest"]):
            assert main([*options, "--max_steps", "1000", *other]) == 1
            assert "another process is writing" in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for checkpoint in run.glob("checkpoint-*"):  # a fast machine may have got further than the comparison
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "model.safetensors").write_bytes(b"cut off")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')  # as a kill leaves a line

    assert main([*options, "--max_steps", str(STEPS), "--resume_from_checkpoint", "latest"]) == 0
    assert_same_run(lines(run), lines(finished))


def contents(run):
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_a_kill_of_its_end_costs_no_step_more(finished, options, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = contents(run)
    args = [*options, "--max_steps", str(STEPS), "--resume_from_checkpoint", "latest"]
    assert main(args) == 0
    assert "is finished, with 4 steps: raise --max-steps to train on" in capsys.readouterr().out
    assert contents(run) == before

    (run / "summary.json").unlink()
    (run / "evaluation" / "after.json").unlink()
    (run / "model" / "model.safetensors").write_bytes(b"cut off")
    assert main(args) == 0
    after = contents(run)
    changed = {name.rsplit("/", 1)[1] for name in before if after[name] != before[name]}
    assert changed <= {"summary.json", "training.png", "training_args.bin"}
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["model_step"]) == (4, 4)


def test_what_is_torn_is_passed_over_and_the_run_is_the_same(finished, options, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    optimizer = run / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    for name in ("metrics.jsonl", "alarms.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 1, "ru')
    (run / "best").mkdir()
    (run / "best" / "cme-manifest.json").write_text('{"st')
    assert main([*options, "--max_steps", str(STEPS), "--resume_from_checkpoint", "latest"]) == 0
    assert "checkpoint-4 is passed over: optimizer.pt is not as it was written" in capsys.readouterr().err
    assert_same_run(lines(run), lines(finished))
    assert (run / "alarms.jsonl").read_text() == ""


def test_an_interrupted_run_says_how_to_continue(options, tmp_path, monkeypatch, capsys):
    from cme.train.callbacks import Recorder

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "on_log", interrupt)
    assert main([*options, "--max_steps", "2", "--eval_prompts", "0"]) == 130
    assert "--resume-from-checkpoint latest" in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten_by_accident(finished, options, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    args = [*options, "--max_steps", "1", "--eval_prompts", "0"]
    assert main(args) == 1
    assert "holds a finished run" in capsys.readouterr().err
    assert len(lines(tmp_path / "run")) == 4
    assert main([*args, "--overwrite"]) == 0
    assert len(lines(tmp_path / "run")) == 1


def test_a_sharded_run_has_neither_evaluations_nor_rollbacks(options, tmp_path, capsys):
    args = ["--max_steps", "3", "--alarm_window", "1", "--stop_when", "num_tokens>0"]
    cme, model, grpo = parse([*options, *args])
    grpo.deepspeed = (
        "zero2.json"  # after the checks that want DeepSpeed installed: the run is told so, and no more
    )
    summary = train(cme, model, grpo)
    assert "there is no evaluation before and after, and no rollback after an alarm" in capsys.readouterr().out
    assert summary["before"] is summary["after"] is summary["decoding"] is None
    (alarm,) = summary["alarms"]
    assert alarm["action"] == "stop"
    assert summary["steps"] == summary["model_step"] == alarm["step"] == 1
    assert not {"best", "evaluation"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_a_resume_with_other_settings_is_refused(finished, options, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    args = [*options, "--max_steps", "6", "--resume_from_checkpoint"]
    assert main([*args, "latest", "--seed", "7"]) == 1
    assert "was started with seed = 42, not 7" in capsys.readouterr().err
    assert main([*args, "latest", "--temperature", "0.5"]) == 1
    assert "was started with sampling = {'temperature': 1.0, " in capsys.readouterr().err
    assert main([*args, "latest", "--learning_rate", "0.5"]) == 1
    assert "was started with learning_rate = " in capsys.readouterr().err
    assert main([*args, "latest", "--reward", "length"]) == 1
    assert "was started with reward = 'cme', not 'length'" in capsys.readouterr().err
    assert main([*args, "latest", "--chat_template_kwargs", '{"enable_thinking": false}']) == 1
    assert "was started with chat_template_kwargs = {}, not {'enable_thinking': False}" in capsys.readouterr().err
    assert main([*args, str(tmp_path)]) == 1
    assert "is not a complete checkpoint" in capsys.readouterr().err


def test_a_lora_adapter_trains_resumes_and_trains_further(options, tmp_path, capsys):
    args = [*options, "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--eval_prompts", "0"]
    args += ["--score_end_of_turn"]
    assert main([*args, "--max_steps", "2"]) == 0
    assert main([*args, "--max_steps", str(STEPS), "--resume_from_checkpoint", "latest"]) == 0
    records = lines(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    seconds = [r["seconds"] for r in records]  # of both sessions
    assert seconds == sorted(seconds)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] >= seconds[-1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["score_end_of_turn"] is True

    # and is trained further by its folder's name
    adapter = tmp_path / "run" / "model"
    shutil.copy(f"{options[1]}/config.json", adapter)  # as others save adapters
    args = [*options, "--eval_prompts", "0", "--max_steps", "1", "--output_dir", str(tmp_path / "further")]
    args += ["--model_name_or_path", str(adapter), "--save_steps", "1"]
    assert main(args) == 0
    start, end = (
        load_file(run / "adapter_model.safetensors") for run in (adapter, tmp_path / "further" / "model")
    )
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert not (tmp_path / "further" / "model" / "model.safetensors").exists()
    assert main([*args, "--use_peft", "--overwrite"]) == 1
    assert "is an adapter, and is trained further as it is: leave --use-peft out" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").write_bytes(b"cut off")
    assert main([*args, "--overwrite"]) == 1
    assert "could not load the adapter" in capsys.readouterr().err
    shutil.copy(f"{options[1]}/model.safetensors", adapter)
    assert main([*args, "--overwrite"]) == 1
    assert "holds a model and an adapter" in capsys.readouterr().err


def test_only_the_trained_model_is_pushed_to_the_hub(options, monkeypatch):
    pushed = []
    monkeypatch.setattr(PackedGRPOTrainer, "init_hf_repo", lambda trainer, **_: None)
    monkeypatch.setattr(
        PackedGRPOTrainer, "push_to_hub", lambda trainer, **_: pushed.append(trainer.state.global_step)
    )
    args = [*options, "--max_steps", "1", "--eval_prompts", "0"]
    assert main([*args, "--push_to_hub", "--hub_strategy", "end"]) == 0
    assert pushed == [1]


def test_a_run_that_diverges_stops_with_the_cause(options, capsys):
    assert main([*options, "--max_steps", "8", "--learning_rate", "1e30", "--eval_prompts", "0"]) == 1
    assert "lower --learning-rate" in capsys.readouterr().err


def test_a_full_disk_is_named(options, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes; less than the tiny model's weights

    done = subprocess.run(
        [sys.executable, "-m", "cme.train", *options, "--max_steps", "2", "--eval_prompts", "0"],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 1, done.stderr
    assert "error: could not write to" in done.stderr
    assert "a checkpoint holds the weights and twice their size" in done.stderr
    assert "--resume-from-checkpoint latest" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--verifier", "no-such-verifier"], "could not load the verifier 'no-such-verifier'"),
        (["--model_name_or_path", "no-such-model"], "could not load the generator 'no-such-model'"),
        (["--dataset_name", "no-such.jsonl"], "there is no file 'no-such.jsonl'"),
        (["--config", "no-such.yaml"], "could not read the configuration file"),
        (["--verifier_prompt_column", "text"], "no column 'text' for the verifier's prompt"),
        (["--verifier_template", "chat"], "has no chat template"),
    ],
)
def test_errors_name_the_bad_value(options, changed, message, capsys):
    assert main([*options, "--max_steps", "1", *changed]) == 1
    assert message in capsys.readouterr().err


def test_conversations_need_a_chat_template(options, tiny_models, capsys):
    assert main([*options, "--max_steps", "1", "--model_name_or_path", tiny_models["verifier"]]) == 1
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 of"),
        ("other.jsonl", '{"text": "a"}\n', "no column 'prompt', 'question' or 'instruction'; it has text"),
        ("empty.csv", 'prompt\nHi\n""\n', "has an empty prompt"),
    ],
)
def test_broken_datasets_are_named(options, tmp_path, name, content, message, capsys):
    (tmp_path / name).write_text(content)
    assert main([*options, "--dataset_name", str(tmp_path / name), "--max_steps", "1"]) == 1
    assert message in capsys.readouterr().err


def test_long_prompts_are_left_out_and_counted(options, tmp_path, capsys):
    prompts = ["short"] * 5 + ["a long one, " * 20] * 3
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    args = [*options, "--dataset_name", str(tmp_path / "p.jsonl"), "--max_steps", "1", "--overwrite"]
    args += ["--prompt_format", "text", "--max_prompt_tokens"]
    assert main([*args, "20"]) == 0
    assert "3 prompts are left out: over 20 tokens" in capsys.readouterr().out
    assert main([*args, "1"]) == 1
    assert "each of the 8 prompts has more than 1 tokens" in capsys.readouterr().err


def test_variables_of_the_generator_s_template_hold_wherever_it_is_asked(options, tiny_models, tmp_path, capsys):
    """A run with a variable is the run of a generator whose template always writes what the variable asks for."""
    prompts = ["Say it"] * 6 + ["Say it all"] * 3
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    said = "{% if quiet %}<think></think>{% endif %}"
    found = {}
    for name, template in (("asked", said), ("always", "{% set quiet = true %}" + said)):
        shutil.copytree(tiny_models["generator"], tmp_path / name)
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template += template
        tokenizer.save_pretrained(tmp_path / name)
        variables = {"quiet": True} if name == "asked" else {}
        most = len(encode_prompt(tokenizer, [{"role": "user", "content": "Say it"}], variables))
        args = [
            *options,
            "--model_name_or_path",
            str(tmp_path / name),
            "--output_dir",
            str(tmp_path / f"run-{name}"),
        ]
        args += ["--dataset_name", str(tmp_path / "p.jsonl"), "--dataset_test_split", "train"]
        args += ["--max_prompt_tokens", str(most), "--reward", "self-certainty", "--logging_steps", "1"]
        args += ["--chat_template_kwargs", json.dumps(variables), "--max_steps", "1"]
        assert main(args) == 0
        assert "3 prompts are left out" in capsys.readouterr().out
        (step,) = lines(tmp_path / f"run-{name}")
        found[name] = (step["reward"], (tmp_path / f"run-{name}" / "evaluation" / "before.json").read_text())
    assert found["asked"] == found["always"]


def test_a_file_of_plain_prompts_trains_without_the_demos_settings(options, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question": f"Tell me {i}"}) + "\n" for i in range(8)))
    args = [*options, "--dataset_name", str(tmp_path / "p.jsonl"), "--prompt_column", "question"]
    args += ["--logging_steps", "1", "--log_completions", "true"]
    assert main([*args, "--max_steps", "2", "--resume_from_checkpoint", "latest"]) == 0
    records = lines(tmp_path / "run")
    assert len(records) == 2
    assert "cme/accuracy" not in records[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] is None
    assert summary["settings"]["max_completion_length"] == 6
    table = pandas.read_parquet(tmp_path / "run" / "completions" / "completions_00002.parquet")
    assert table["prompt"][0][0]["role"] == "user"  # the generator has a chat template


def test_the_demo_applies_only_without_a_config_and_a_dataset(tmp_path):
    assert parse([])[0].verifier == "gemma-3-270m"
    assert parse(["--max_steps", "3"])[2].max_steps == 3
    assert parse(["--max_steps", "3"])[2].output_dir == "runs/demo"
    cme, model, grpo = parse(["--dataset-name", "x.jsonl"])
    assert (cme.verifier, model.model_name_or_path, grpo.output_dir) == (None, None, "runs/train")
    (tmp_path / "c.yaml").write_text("verifier: mine\nlearning_rate: 0.5\n")
    cme, _, grpo = parse([f"--config={tmp_path / 'c.yaml'}"])
    assert (cme.verifier, grpo.learning_rate, cme.dataset_name) == ("mine", 0.5, None)


def test_rewards_and_dashes_in_a_config_file(tmp_path):
    for text, want in (("cme", ["cme"]), ("cme length", ["cme", "length"]), ("[cme, length]", ["cme", "length"])):
        (tmp_path / "c.yaml").write_text(f"reward: {text}\nmax-steps: 7\n")
        cme, _, grpo = parse(["--config", str(tmp_path / "c.yaml"), "--reward-weights", "1", "0.5"])
        assert (cme.reward, grpo.max_steps, grpo.reward_weights) == (want, 7, [1.0, 0.5])
    (tmp_path / "c.yaml").write_text("max_step: 7\n")
    with pytest.raises(CMEError, match="has unknown options: --max_step"):
        parse(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(("value", "want"), [("off", "off"), ("warn", "warn")])
def test_off_is_a_word_in_a_config_file(tmp_path, value, want):
    (tmp_path / "c.yaml").write_text(f"on_alarm: {value}\n")
    assert parse(["--config", str(tmp_path / "c.yaml")])[0].on_alarm == want


@pytest.mark.parametrize(("option", "choices"), [("on_alarm", "rollback, stop"), ("prompt_format", "auto, chat")])
def test_choices_hold_in_a_config_file(tmp_path, option, choices, capsys):
    (tmp_path / "c.yaml").write_text(f"{option}: rolback\n")
    assert main(["--config", str(tmp_path / "c.yaml")]) == 1
    assert f"--{option.replace('_', '-')} 'rolback' is not a choice: give {choices}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must contain a YAML mapping"),
        ("5: a", "must contain a YAML mapping, from names of options"),
        ("verifier: [a]", "--verifier ['a'] is not str | None"),
        ("stop_when: kl>1", "--stop-when 'kl>1' is not list[str]"),
        ("eval_samples: null", "--eval-samples None is not int"),
        ("max_steps: [4]", "argument --max_steps/--max-steps: invalid int value: '[4]'"),
        ("logging_steps: [1]", "argument --logging_steps/--logging-steps: invalid float value: '[1]'"),
        ("output_dir: [a]", "wrong type"),
        ("\xff", "can't decode byte"),
    ],
)
def test_junk_in_a_config_file_is_named(tmp_path, text, message, capsys):
    (tmp_path / "c.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        sys.exit(main(["--config", str(tmp_path / "c.yaml")]))
    assert stop.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_a_config_option_without_a_file_is_named(capsys):
    assert main(["--config"]) == 1
    assert "--config needs the name of a file" in capsys.readouterr().err


def test_help_is_short_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--verifier" in text
    assert "--resume-from-checkpoint latest" in text
    assert len(text.splitlines()) < 130
    code = "import sys; from cme.train.__main__ import main\n"
    code += "try: main(['--help'])\nfinally: print({'torch', 'trl'} & sys.modules.keys(), file=sys.stderr)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "set()\n"


@pytest.mark.skipif(not shutil.which("trl"), reason="TRL's command is not on the path")
def test_trls_own_command_line_takes_the_reward_by_its_import_path(tiny_models, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(f'{{"prompt": "Tell me {i}"}}\n' for i in range(8)))
    command = ["trl", "grpo", "--model_name_or_path", tiny_models["generator"]]
    command += ["--reward_funcs", "cme.reward.cme", "--dataset_name", str(tmp_path / "data")]
    command += ["--use_cpu", "true", "--bf16", "false", "--max_steps", "1", "--logging_steps", "1"]
    command += ["--num_generations", "4", "--max_completion_length", "4", "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "CME_VERIFIER": tiny_models["verifier"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rewards/cme/mean" in done.stdout + done.stderr
