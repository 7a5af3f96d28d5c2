"""The scripts in examples/, with tiny models."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_score_prints_a_number_or_a_reason_per_response(tiny_models):
    first, second, empty = run("score.py", tiny_models["verifier"]).splitlines()
    assert [float(line.rpartition(":")[2]) < 0 for line in (first, second)] == [True, True]
    assert empty == "'': the response is empty"


def test_trl_grpo_trains_and_saves(tiny_models, tmp_path):
    options = "--max-steps 1 --per-device-train-batch-size 4 --num-generations 4 --max-completion-length 4 "
    options += "--use-cpu --bf16 False --report-to none"
    run("trl_grpo.py", *tiny_models.values(), str(tmp_path), *options.split())
    assert (tmp_path / "model.safetensors").exists()


def test_examples_are_short():
    assert all(len(file.read_text().splitlines()) < 20 for file in EXAMPLES.glob("*.py"))
