"""`python -m experiments.study` from a grid to its report, with tiny models."""

import json
import shutil

import pytest
import tiny
import yaml

from experiments.study import grid, report, store
from experiments.study.__main__ import DOCS, HERE, RESULTS, main

SETTINGS = {
    "verifier_prompt_column": "question",
    "dataset_test_split": "held_out",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_steps": 1,
    "eval_prompts": 2,
    "eval_samples": 2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two cells that was run; its arguments and its folder."""
    folder = tmp_path_factory.mktemp("study")
    for name, seed, chat in (("generator", 0, True), ("verifier", 1, False)):
        tiny.llama(seed).save_pretrained(folder / name)
        tiny.tokenizer(chat).save_pretrained(folder / name)
    config = {
        "common": {"model_name_or_path": str(folder / "generator"), **SETTINGS},
        "tasks": {"capitals": {"dataset_name": "capitals"}},
        "rewards": {
            "other": {"verifier": str(folder / "verifier")},
            "own": {"verifier": str(folder / "generator")},
        },
        "grid": [{"tasks": ["capitals"], "rewards": ["other", "own"], "seeds": [0]}],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(config))
    options = [
        *("--config", str(folder / "grid.yaml"), "--runs", str(folder / "runs")),
        *("--results", str(folder / "results"), "--report", str(folder / "docs" / "results.md")),
    ]
    assert main(options) == 0
    return options, folder


def test_each_cell_keeps_its_steps_and_answers(study):
    _, folder = study
    for name in ("capitals-other-0", "capitals-own-0"):
        cell = json.loads((folder / "results" / f"{name}.json").read_text())
        assert [step["step"] for step in cell["steps"]] == [1, 2]
        assert len(cell["before"]) == len(cell["after"]) == 2 * (2 + 1)
        assert all(answer["correct"] in (True, False) for answer in cell["after"])
        assert cell["settings"]["seed"] == 0


def test_the_report_has_a_row_per_reward_and_a_picture(study):
    _, folder = study
    text = (folder / "docs" / "results.md").read_text()
    assert "\n| other | 1 |" in text
    assert "\n| own | 1 |" in text
    assert "\nAll 2 cells of the grid have been run.\n" in text
    assert f"The verifier is `{folder / 'verifier'}` where nothing else is said." in text
    rows = [line for line in text.splitlines() if line.startswith(("| other | 1", "| own | 1"))]
    assert [f"under `{folder / 'generator'}` |" in row for row in rows] == [False, True]
    assert (folder / "docs" / "results" / "capitals.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_run_again(study, capsys):
    options, folder = study
    file = folder / "results" / "capitals-own-0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 7}))
    assert main(options) == 0
    assert json.loads(file.read_text())["seconds"] == 7
    assert main([*options, "--list"]) == 0
    assert "done  capitals-own-0" in capsys.readouterr().out


def test_a_finished_cell_leaves_no_weights_and_can_be_read_again(study):
    options, folder = study
    assert {path.name for path in (folder / "runs").iterdir() if path.is_dir()} == {
        "capitals-other-0",
        "capitals-own-0",
    }
    assert not list((folder / "runs").rglob("*.safetensors")) + list((folder / "runs").rglob("optimizer.pt"))
    file = folder / "results" / "capitals-other-0.json"
    before = file.read_text()
    file.unlink()
    assert main(options) == 0
    assert file.read_text() == before


@pytest.mark.parametrize("where", ["runs", "results"])
def test_numbers_of_other_settings_are_not_taken_for_the_grid_s(study, tmp_path, where, capsys):
    options, folder = study
    config = yaml.safe_load((folder / "grid.yaml").read_text())
    config["common"]["max_steps"] = 3
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(config))
    other = {"runs": "--results", "results": "--runs"}[where]
    args = [*options, "--config", str(tmp_path / "grid.yaml"), other, str(tmp_path / "new"), "--only", "own"]
    for _ in range(2):  # what is there stays as it is
        assert main(args) == 1
        assert "capitals-own-0" in (error := capsys.readouterr().err)
        assert "is of a run with max_steps = 2, not 3: delete it" in error


def test_a_cell_whose_training_fails_says_why(study, tmp_path, capsys):
    options, folder = study
    config = yaml.safe_load((folder / "grid.yaml").read_text())
    config["rewards"]["own"]["verifier"] = "no-such-model"
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(config))
    others = ["--config", str(tmp_path / "grid.yaml"), "--runs", str(tmp_path), "--results", str(tmp_path / "r")]
    assert main([*options, *others, "--only", "own"]) == 1
    error = capsys.readouterr().err
    assert "capitals-own-0 failed" in error
    assert "no-such-model" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": [{"tasks": ["capitols"], "rewards": ["own"], "seeds": [0]}]},
            "'capitols', which is not in its tasks",
        ),
        ({"gird": []}, "must have the keys"),
    ],
)
def test_what_a_grid_misnames_is_said(study, tmp_path, change, message, capsys):
    _, folder = study
    config = yaml.safe_load((folder / "grid.yaml").read_text()) | change
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", str(tmp_path / "grid.yaml")]) == 1
    assert message in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.yaml")]) == 1
    assert main(["--config", str(folder / "grid.yaml"), "--only", "nothing"]) == 1


def test_the_shipped_grid_names_what_it_has():
    cells = grid.load(HERE / "cpu.yaml")
    assert len(cells) == len({cell.name for cell in cells}) == 49
    assert {cell.seed for cell in cells} == {0, 1, 2}


def test_alarms_stand_beside_the_accuracy_of_each_quarter(study):
    _, folder = study
    text = (folder / "docs" / "results.md").read_text()
    cell = json.loads((folder / "results" / "capitals-other-0.json").read_text())
    accuracies = " / ".join(f"{100 * step['cme/accuracy']:.0f}" for step in cell["steps"])  # a step a quarter
    assert f"\n| other | 0 | none | {accuracies} |\n" in text
    cell["settings"]["max_steps"] = 8
    cell["steps"] = [{"step": i, "cme/accuracy": a} for i, a in ((1, 0.5), (2, 0.25), (3, 0.1), (8, 1.0))]
    cell["steps"].append({"step": 5})
    cell["steps"] += [{"step": 20 + i, "echo_rate": i / 10} for i in range(6)]
    assert report.alarms(cell) == {"echo_rate>start+0.2": 25}  # (0.3 + 0.4 + 0.5) / 3 > (0 + 0.1 + 0.2) / 3 + 0.2
    assert report.accuracy_by_quarter(cell) == pytest.approx([0.375, 0.1, 1.0])
    store.save(folder / "more", cell)
    report.write(folder / "more", folder / "more" / "results.md", ["capitals-other-0", "another"])
    text = (folder / "more" / "results.md").read_text()
    assert "\n1 of the grid's 2 cells have been run. These have not: `another`.\n" in text
    row = "| other | 0 | `echo_rate>start+0.2` at 25 | 38 / 10 / 100 |"
    assert row in text.splitlines()


def test_changes_are_of_questions_and_intervals_hold_them():
    def answer(question, greedy, correct):
        return {"question": question, "greedy": greedy, "correct": correct}

    cell = {
        "before": [
            answer(0, False, False),
            answer(0, False, True),
            answer(1, False, False),
            answer(1, True, True),
        ],
        "after": [answer(0, False, True), answer(0, False, True), answer(1, False, False), answer(1, True, False)],
    }
    assert report.changes(cell, lambda a: a["correct"], greedy=False) == {0: 0.5, 1: 0.0}
    assert report.changes(cell, lambda a: a["correct"], greedy=True) == {1: -1.0}
    assert report._change([{0: 0.5, 1: 0.0}, {0: 0.5, 1: 0.5}], 100) == "**+37.50** [+25.00, +50.00] (+25, +50)"


def test_curves_are_means_over_seeds_and_recent_steps():
    runs = [{"steps": [{"step": i, "entropy": float(i + seed)} for i in range(1, 8)]} for seed in (0, 2)]
    runs[1]["steps"][6] = {"step": 7}
    steps, means = report.curve(runs, "entropy")
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert means == pytest.approx([2, 2.5, 3, 3.5, 4, 5, (4 + 5 + 6 + 7 + 7) / 5])
    assert report.curve(runs, "kl") == ([], [])


def test_cme_is_compared_with_each_rival_on_the_seeds_that_both_have():
    def cell(reward, seed, *right):
        answers = [
            {"question": q, "greedy": greedy, "correct": r} for q, r in enumerate(right) for greedy in (0, 1)
        ]
        wrong = [answer | {"correct": False} for answer in answers]
        return {"reward": reward, "seed": seed, "before": wrong, "after": answers}

    cells = [cell("cme", 0, True, True), cell("cme", 1, True, False), cell("length", 0, True, False)]
    cells += [cell("length", 2, True, True), cell("entropy", 2, True, True)]
    *_, row = report._rivals_table(cells).splitlines()
    assert row == "| length | 1 | **+50.00** [+0.00, +100.00] (+50) | **+50.00** [+0.00, +100.00] (+50) |"
    assert report._rivals_table(cells[2:]) == ""


def test_an_archive_stands_for_the_files_and_new_files_are_added_to_it(study, tmp_path, capsys):
    options, folder = study
    shutil.copytree(folder / "results", tmp_path / "results")
    options = [*options, "--results", str(tmp_path / "results"), "--report", str(tmp_path / "docs" / "results.md")]
    before = store.read(tmp_path / "results")
    other = store.file_of(tmp_path / "results", "capitals-other-0")
    other.rename(tmp_path / "held back")
    assert main([*options, "--pack"]) == 0
    (tmp_path / "held back").rename(other)
    assert main([*options, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 2
    assert main([*options, "--pack"]) == 0
    assert not list((tmp_path / "results").iterdir())
    assert store.read(tmp_path / "results") == before
    assert main(options) == 0
    assert (tmp_path / "docs" / "results.md").read_text() == (folder / "docs" / "results.md").read_text()
    archive = store.archive_of(tmp_path / "results")
    archive.write_bytes(archive.read_bytes()[:-40])
    assert main(options) == 1
    assert f"could not read {archive}" in capsys.readouterr().err


def test_the_committed_report_is_of_the_committed_results(tmp_path, monkeypatch):
    planned = [cell.name for cell in grid.load(HERE / "cpu.yaml")]
    assert store.read(RESULTS / "study").keys() == set(planned)
    monkeypatch.setattr(report, "_draw", lambda cells, path: None)
    report.write(RESULTS / "study", tmp_path / "results.md", planned)
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
