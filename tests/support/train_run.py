"""Options of a training run with tiny models, and its files, read back."""

import json


def lines(run):
    """The logged steps of the run in the folder `run`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def options_for(tiny_models, folder):
    """The demo with tiny models, all but the number of steps; the run is `folder`/run."""
    return [
        *("--model_name_or_path", tiny_models["generator"], "--verifier", tiny_models["verifier"]),
        *("--output_dir", str(folder / "run"), "--eval_prompts", "3", "--eval_samples", "2"),
        *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"),
        *("--num_generations", "4", "--max_completion_length", "6"),
        *("--learning_rate", "1e-3", "--save_steps", "2"),
    ]
