"""Alarms: over the numbers of real runs of the demo, and in a run with tiny models."""

import json
import shutil

import pytest
import tiny
import torch
from train_run import lines, options_for
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerControl, TrainerState

from cme.errors import CMEError
from cme.train.__main__ import main
from cme.train.alarms import Alarms, Rule, Watch, parse_rules
from cme.train.config import DEFAULT_RULES
from cme.train.folder import RunFolder, seal

# Every second step of two runs of the demo with --verifier_template auto, 3e-6 and 5e-6: one kept its accuracy
HEALTHY = {
    "echo_rate": [0.03, 0, 0, 0, 0, 0.12, 0, 0, 0.09, 0, 0, 0, 0.12, 0.03, 0.12],
    "prompt_copy_rate": [0.65, 0.61, 0.7, 0.74, 0.78, 0.78, 0.77, 0.76, 0.78, 0.81, 0.75, 0.79, 0.81, 0.79, 0.77],
    "entropy": [1.76, 1.83, 1.15, 1.4, 1.18, 1.05, 0.92, 1.11, 0.91, 0.49, 1.07, 0.95, 0.83, 0.96, 0.83],
}
GAMED = {
    "echo_rate": [0, 0, 0.12, 0, 0.12, 0.03, 0.12, 0.41, 0.59, 0.59, 0.81, 1, 0.94, 0.88, 0.94],
    "prompt_copy_rate": [0.57, 0.67, 0.75, 0.72, 0.74, 0.72, 0.77, 0.87, 0.89, 0.9, 0.97, 1, 0.98, 0.96, 0.99],
    "entropy": [1.9, 1.4, 1.33, 1.39, 1.1, 0.93, 0.77, 0.53, 0.66, 0.27, 0.13, 0.07, 0.11, 0.16, 0.14],
}


def steps(run):
    """Logged steps 1, 2, ... of a table of metrics, under the names that training gives them."""
    names = [name if name == "entropy" else f"cme/{name}" for name in run]
    return [
        (i, {"loss": 0.0, **dict(zip(names, row, strict=True))})
        for i, row in enumerate(zip(*run.values(), strict=True), 1)
    ]


def play(alarms, run, save_every=2, start=0):
    """The trainer's calls to the callback until it stops the run; returns the last step."""
    state, control = TrainerState(is_world_process_zero=True, global_step=start), TrainerControl()
    alarms.on_train_begin(None, state, control)
    for step, logs in steps(run)[start:]:
        state.global_step = step
        alarms.on_log(None, state, control, logs=dict(logs))
        alarms._folder.metrics.append({"step": step, **logs})
        if step % save_every == 0:
            checkpoint_at(alarms._folder.path, step)
            alarms.on_save(None, state, control)
            shutil.rmtree(alarms._folder.path / f"checkpoint-{step - save_every}", ignore_errors=True)
        if control.should_training_stop:
            break
    return state.global_step


def alarms_in(path, action="rollback", rules=DEFAULT_RULES):
    path.mkdir(exist_ok=True)
    return Alarms(RunFolder(path), Watch(parse_rules(rules)), action)


def test_the_default_rules_pass_over_a_healthy_run_and_stop_a_gamed_one(tmp_path):
    healthy, gamed = alarms_in(tmp_path / "healthy"), alarms_in(tmp_path / "gamed")
    assert play(healthy, HEALTHY) == 15
    assert healthy.stopped is None
    assert healthy.history() == []
    stopped_at = play(gamed, GAMED)
    assert stopped_at == 9  # echoes: 0.12, 0.41, 0.59
    (record,) = gamed.history()
    assert record["step"] == 9
    assert record["rule"] == "echo_rate>start+0.2"
    assert record["value"] == pytest.approx((0.12 + 0.41 + 0.59) / 3)
    assert record["start"] == pytest.approx(0.04)
    assert record["limit"] == pytest.approx(0.24)
    assert record["kept_step"] == 6


def test_the_weights_kept_are_the_newest_that_no_rule_strained_and_outlive_their_checkpoint(tmp_path):
    alarms = alarms_in(tmp_path)
    alarms.keep_start(lambda folder: (tmp_path / "best").mkdir())
    assert alarms.best_step == 0
    play(alarms, GAMED)
    # At step 8 echo_rate is 0.187, three quarters of its way; at 6 no metric is past half
    assert alarms.best_step == 6
    assert not (tmp_path / "checkpoint-6").exists()
    assert (alarms.best / "model.safetensors").read_text() == "weights 6"
    assert not (alarms.best / "optimizer.pt").exists()


def test_without_a_clean_checkpoint_the_start_is_kept(tmp_path):
    alarms = alarms_in(tmp_path, rules=["echo_rate>0.05"])
    alarms.keep_start(lambda folder: (tmp_path / "best").mkdir())
    assert play(alarms, GAMED, save_every=100) == 5  # 0.12, 0, 0.12
    assert alarms.best_step == 0


def test_a_warning_comes_once_a_rule_and_stops_nothing(tmp_path):
    alarms = alarms_in(tmp_path, "warn")
    assert play(alarms, GAMED) == 15
    assert [r["rule"] for r in alarms.history()] == [
        "echo_rate>start+0.2",
        "entropy<start*0.25",
        "prompt_copy_rate>start+0.3",
    ]
    assert alarms.stopped is None


def test_a_resumed_run_knows_its_start_and_fires_again(tmp_path):
    assert play(alarms_in(tmp_path), GAMED) == 9
    folder = RunFolder(tmp_path)
    kept = [r for r in folder.history() if r["step"] <= 8]  # as a resume from checkpoint-8 leaves it
    folder.metrics.replace(kept)
    again = alarms_in(tmp_path)
    assert play(again, GAMED, start=8) == 9
    (record,) = again.history()  # the first one is forgotten: its step ran again
    assert record["start"] == pytest.approx(0.04)
    assert again.best_step == 6


def checkpoint_at(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "model.safetensors").write_text(f"weights {step}")
    (checkpoint / "optimizer.pt").write_text("large")
    seal(checkpoint, step)
    return checkpoint


def resumed(path, checkpoint):
    alarms = alarms_in(path)
    alarms.resumed_from = checkpoint
    alarms.keep_start(lambda folder: (path / "best").mkdir())
    return alarms


@pytest.mark.parametrize(("step", "kept"), [(6, 6), (8, 0)])  # at step 8 echo_rate is past half its way
def test_a_resumed_run_that_kept_nothing_keeps_its_checkpoint_if_that_is_clean_else_the_start(
    tmp_path, step, kept
):
    play(alarms_in(tmp_path, "warn"), {name: row[:step] for name, row in GAMED.items()})
    alarms = resumed(tmp_path, checkpoint_at(tmp_path, step))
    alarms.on_train_begin(None, TrainerState(is_world_process_zero=True, global_step=step), TrainerControl())
    assert alarms.best_step == kept


def test_weights_kept_after_the_checkpoint_to_resume_from_are_forgotten(tmp_path):
    play(alarms_in(tmp_path), GAMED)  # keeps step 6
    assert resumed(tmp_path, checkpoint_at(tmp_path, 8)).best_step == 6
    assert resumed(tmp_path, checkpoint_at(tmp_path, 4)).best_step == 0


def test_a_run_can_resume_from_a_checkpoint_of_another_folder(tmp_path):
    alarms = resumed(tmp_path / "here", checkpoint_at(tmp_path / "there", 4))
    alarms.on_train_begin(None, TrainerState(is_world_process_zero=True, global_step=4), TrainerControl())
    assert alarms.best_step == 4
    assert (alarms.best / "model.safetensors").read_text() == "weights 4"


def test_a_step_that_lacks_a_metric_is_neither_an_error_nor_clean(tmp_path):
    rules = parse_rules(["echo_rate>1"])
    alarms = Alarms(RunFolder(tmp_path), Watch(rules, 1), "rollback", given=rules)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    for step, logs in enumerate([{"cme/echo_rate": 0.0}, {"cme/echo_rate": 0.9}, {}], 1):
        state.global_step = step
        alarms.on_log(None, state, control, logs={"loss": 0.0, **logs})
        checkpoint_at(tmp_path, step)
        alarms.on_save(None, state, control)
    assert alarms.best_step == 1


def test_rules_compare_with_a_number_or_with_the_start():
    assert Rule.parse("kl>2") == Rule("kl>2", "kl", True, None, 2.0)
    assert Rule.parse(" entropy < start * 0.5 ").limit(4.0) == 2.0
    assert Rule.parse("reward<start-1").limit(4.0) == 3.0
    assert Rule.parse("x>start+1e-2").limit(1.0) == 1.01
    assert Rule.parse("completions/mean_length<-.5").metric == "completions/mean_length"
    assert [r.text for r in parse_rules(["default", "kl>2"])] == [*DEFAULT_RULES, "kl>2"]
    assert [r.text for r in parse_rules(["default", DEFAULT_RULES[0]])] == [*DEFAULT_RULES]  # read once per step


@pytest.mark.parametrize("text", ["", "kl", "kl=2", "kl>two", "kl>start", "kl>start/2", ">2", "kl>1.2.3"])
def test_what_is_no_rule_is_named(text):
    with pytest.raises(CMEError, match="is not a rule: write METRIC>NUMBER"):
        Rule.parse(text)


def test_steps_without_a_number_are_passed_over():
    watch = Watch(parse_rules(["kl>1"]), window=2)
    values = [0.5, None, float("nan"), 0.7, 2.0]
    fired = [any(r.fired for r in watch.add(i, {"kl": v})) for i, v in enumerate(values)]
    assert fired == [False, False, False, False, True]
    with pytest.raises(CMEError, match="at least 1 logged step, not 0"):
        Watch((), 0)


@pytest.fixture(scope="module")
def alarmed(tiny_models, tmp_path_factory):
    run = tmp_path_factory.mktemp("alarmed") / "run"
    args = [*options_for(tiny_models, run.parent), "--canary", tiny_models["generator"]]
    args += ["--max_steps", "8", "--save_steps", "1", "--save_total_limit", "1", "--eval_prompts", "0"]
    args += ["--alarm_window", "1", "--seed", "3"]
    return run, args


def test_an_alarm_in_a_run_leaves_the_best_checkpoint_as_the_model(alarmed, tiny_models, capsys):
    run, args = alarmed
    assert main([*args, "--stop_when", "num_tokens>start*4.5"]) == 0  # grows by about its first value each step
    assert "stopped by the alarm num_tokens>start*4.5 at step" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    (record,) = summary["alarms"]
    assert summary["steps"] == record["step"] == len(lines(run)) < 8
    assert 0 < summary["model_step"] == record["kept_step"] < record["step"] - 1
    assert all("cme/canary" in r and "cme/canary_gap" in r for r in lines(run))
    trained = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    best = AutoModelForCausalLM.from_pretrained(run / "best").state_dict()
    last = AutoModelForCausalLM.from_pretrained(run / f"checkpoint-{record['step']}").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_models["generator"]).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(trained[k], best[k]) for k in trained)
    assert not torch.equal(trained[name], last[name])
    assert not torch.equal(trained[name], start[name])

    # a kill of the end that followed costs no step more
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    assert main([*args, "--stop_when", "num_tokens>start*4.5", "--resume_from_checkpoint", "latest"]) == 0
    again = json.loads((run / "summary.json").read_text())
    assert [again[key] for key in ("steps", "alarms", "model_step")] == [
        summary[key] for key in ("steps", "alarms", "model_step")
    ]
    weights = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert all(torch.equal(weights[k], best[k]) for k in weights)

    # and the run can continue past it
    assert main([*args, "--on_alarm", "warn", "--resume_from_checkpoint", "latest"]) == 0
    assert [r["step"] for r in lines(run)] == list(range(1, 9))
    assert json.loads((run / "summary.json").read_text())["model_step"] == 8

    # also in another folder
    other = [*args, "--output_dir", str(run.parent / "other"), "--max_steps", "9", "--stop_when", "echo_rate>2"]
    assert main([*other, "--resume_from_checkpoint", str(run / "checkpoint-8")]) == 0
    assert json.loads((run.parent / "other" / "summary.json").read_text())["model_step"] == 9


def test_experts_go_back_and_on_too(alarmed, tmp_path):
    """Checkpoints have them under other names than the model's own, and apart."""
    config = Qwen3MoeConfig(
        **{**tiny.SMALL, "max_position_embeddings": 64},
        **{"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )
    tiny.build(config, Qwen3MoeForCausalLM).save_pretrained(tmp_path / "moe")
    tiny.tokenizer().save_pretrained(tmp_path / "moe")
    args = [*alarmed[1], "--model_name_or_path", str(tmp_path / "moe"), "--output_dir", str(tmp_path / "run")]
    assert main([*args, "--max_steps", "2", "--stop_when", "num_tokens>start*1.5"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["model_step"] == 1

    def weights(name):
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    start, trained, best, last = (weights(name) for name in ("moe", "run/model", "run/best", "run/checkpoint-2"))
    assert all(torch.equal(trained[k], best[k]) for k in trained)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(trained[name], last[name])

    # and a resumed run has those of its checkpoint
    assert main([*args, "--max_steps", "3", "--resume_from_checkpoint", "latest"]) == 0
    trained = weights("run/model")
    assert (trained[name] - last[name]).abs().mean() < (trained[name] - start[name]).abs().mean()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("copying", "'copying' is not a rule"),
        (
            "kl>1",
            "needs 'kl', which is not logged (kl is logged with --beta above 0, and 1e-9 penalises nothing); "
            "there are",
        ),
        ("canary_gap>1", "canary is logged with --canary"),
    ],
)
def test_rules_that_cannot_work_are_errors(options, rule, message, capsys):
    assert main([*options, "--max_steps", "1", "--eval_prompts", "0", "--stop_when", rule]) == 1
    assert message in capsys.readouterr().err
