"""What a run's folder makes of kills, torn files and other processes, without a training."""

import json
import multiprocessing

import pytest

from cme.errors import CMEError
from cme.files.atomic import LOCK
from cme.files.journal import Journal
from cme.train.alarms import Alarms
from cme.train.folder import RunFolder, damage, link_weights, seal, sealed_step

SETTINGS = dict.fromkeys(
    (
        *("generator", "chat_template_kwargs", "lora", "canary", "verifier", "verifier_template"),
        *("verifier_chat_template_kwargs", "score_end_of_turn", "reward", "dataset", "seed"),
        *("completions_per_step", "num_generations"),
    ),
    1,
) | {"max_steps": 4, "num_train_epochs": 3.0, "stop_when": ["default"], "on_alarm": "stop"}


def checkpoint(folder, step, sealed=True):
    path = folder / f"checkpoint-{step}"
    (path / "ref").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "ref/a.safetensors"):
        (path / name).write_text(f"{name} of {step}")
    if sealed:
        seal(path, step)
    return path


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints and four logged steps, killed before its end."""
    folder = RunFolder(tmp_path / "run")
    folder.start(SETTINGS, overwrite=False)
    for step in range(1, 5):
        folder.metrics.append({"step": step})
    checkpoint(folder.path, 2)
    checkpoint(folder.path, 4)
    return folder


def test_a_line_cut_off_anywhere_costs_that_line_and_no_other(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"step": 1})
    whole = journal.path.read_bytes()
    journal.append({"step": 2, "text": "é\n"})
    for end in range(len(whole), journal.path.stat().st_size):
        torn = Journal(tmp_path / f"{end}.jsonl")
        torn.path.write_bytes(journal.path.read_bytes()[:end])
        assert list(torn) == [{"step": 1}]
        torn.append({"step": 3})
        assert list(torn) == [{"step": 1}, {"step": 3}]


def test_a_damaged_line_between_others_is_named(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CMEError, match=r"line 2 of .*j.jsonl is damaged"):
        list(Journal(tmp_path / "j.jsonl"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(b"~" + path.read_bytes()[1:])


@pytest.mark.parametrize("harm", [cut, flip, lambda path: path.unlink()])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "ref/a.safetensors"]
)
def test_a_checkpoint_with_any_file_torn_changed_or_missing_is_passed_over_with_a_word(run, name, harm, capsys):
    harm(run.path / "checkpoint-4" / name)
    assert run.resume(SETTINGS, "latest") == run.path / "checkpoint-2"
    assert f"checkpoint-4 is passed over: {name} is" in capsys.readouterr().err
    assert [record["step"] for record in run.history()] == [1, 2]
    with pytest.raises(CMEError, match=f"checkpoint-4 is not a complete checkpoint: {name} is"):
        run.resume(SETTINGS, str(run.path / "checkpoint-4"))


def test_a_checkpoint_that_was_not_sealed_or_has_no_optimizer_is_passed_over(run, capsys):
    cut(run.path / "checkpoint-4" / "cme-manifest.json")
    checkpoint(run.path, 6, sealed=False)
    (checkpoint(run.path, 8, sealed=False) / "optimizer.pt").unlink()
    seal(run.path / "checkpoint-8", 8)
    assert run.resume(SETTINGS, "latest") == run.path / "checkpoint-2"
    assert "checkpoint-8 is passed over: it has no state of the optimizer" in (said := capsys.readouterr().err)
    assert "checkpoint-6 is passed over: it has no cme-manifest.json" in said


@pytest.mark.parametrize("name", ["model.safetensors", "cme-manifest.json"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_unasked(run, name):
    for step in (2, 4):
        cut(run.path / f"checkpoint-{step}" / name)
    with pytest.raises(CMEError, match=r"no checkpoint in .* is complete: start from the weights of one"):
        run.resume(SETTINGS, "latest")
    assert len(run.history()) == 4


def test_a_run_killed_in_its_first_checkpoint_begins_again(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start(SETTINGS, overwrite=False)
    folder.metrics.append({"step": 1})
    checkpoint(tmp_path, 1, sealed=False)
    assert folder.resume(SETTINGS, "latest") is None
    assert folder.history() == []
    folder.model.mkdir()  # a run that came to its end was not killed in its first checkpoint
    with pytest.raises(CMEError, match="is complete"):
        folder.resume(SETTINGS, "latest")


def test_a_checkpoint_is_not_continued_beside_later_ones(run):
    with pytest.raises(CMEError, match=r"checkpoint-4 would be mixed with the steps after .*checkpoint-2"):
        run.resume(SETTINGS, str(run.path / "checkpoint-2"))
    assert len(run.history()) == 4


def test_kept_weights_are_a_sealed_folder_without_the_optimizer_and_a_torn_one_is_none(run):
    link_weights(run.path / "checkpoint-4", run.best)
    assert (damage(run.best), sealed_step(run.best)) == (None, 4)
    assert {path.name for path in run.best.iterdir()} == {"model.safetensors", "ref", "cme-manifest.json"}
    alarms = Alarms(run, None, "rollback")
    alarms.resumed_from = run.path / "checkpoint-4"
    cut(run.best / "cme-manifest.json")
    assert alarms.best_step is None
    alarms.keep_start(lambda folder: run.best.mkdir())
    assert (damage(run.best), sealed_step(run.best)) == (None, 0)


@pytest.mark.parametrize(
    ("asked", "finished"),
    [
        ({}, True),
        ({"max_steps": 3}, True),
        ({"max_steps": 5}, False),
        ({"max_steps": -1}, False),
        ({"num_train_epochs": 4.0}, True),  # max_steps decides
    ],
)
def test_a_run_is_finished_until_another_end_is_asked_for(run, asked, finished):
    assert run.finished(SETTINGS | asked) is None  # it has no summary
    run.write_json("summary.json", {"steps": 4, "settings": SETTINGS})
    assert (run.finished(SETTINGS | asked) is not None) == finished


def test_a_run_that_an_alarm_stopped_is_finished_until_it_may_go_past_it(run):
    run.write_json("summary.json", {"steps": 3, "settings": SETTINGS})
    assert run.finished(SETTINGS) is not None
    assert run.finished(SETTINGS | {"on_alarm": "warn"}) is None


def test_a_start_that_came_to_nothing_holds_nobody_up(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.start(SETTINGS | {"seed": 2}, overwrite=False)
    folder.start(SETTINGS, overwrite=False)
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS
    folder.metrics.append({"step": 1})
    with pytest.raises(CMEError, match="holds a run that was interrupted"):
        folder.start(SETTINGS, overwrite=False)


def test_overwriting_deletes_the_run_and_leaves_the_lock(run):
    with run.locked():
        run.start(SETTINGS | {"seed": 2}, overwrite=True)
        assert {path.name for path in run.path.iterdir()} == {LOCK, "run.json"}
    assert json.loads((run.path / "run.json").read_text())["seed"] == 2
    assert {path.name for path in run.path.iterdir()} == {"run.json"}


def hold(path, entered):
    with RunFolder(path).locked():
        entered.set()
        multiprocessing.Event().wait()


def test_a_folder_is_closed_while_a_process_is_in_it_and_open_when_that_was_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=hold, args=(tmp_path, entered))
    process.start()
    try:
        assert entered.wait(60)
        with pytest.raises(CMEError, match="another process is writing"), RunFolder(tmp_path).locked():
            pass
    finally:
        process.kill()
        process.join()
    with RunFolder(tmp_path).locked():
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CMEError, match=r"can't write to '.*file'"), RunFolder(tmp_path / "file").locked():
        pass
