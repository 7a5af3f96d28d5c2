"""The configuration for GPUs, as far as a CPU goes: a step of every family, with its settings, on tiny models."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import transformers as tf

from experiments.study import cells, grid
from experiments.study.__main__ import HERE

CELLS = {(cell.task, cell.reward): cell for cell in grid.load(HERE / "gpu.yaml") if cell.seed == 0}
CONFIGS = {
    "Qwen": tf.Qwen2Config,
    "meta-llama": tf.LlamaConfig,
    "google": tf.Gemma3TextConfig,
    "allenai": tf.Olmo2Config,
}
SHRUNK = {
    "max_steps": 1,
    "warmup_steps": 0,
    "save_steps": 1,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 6,
    "eval_prompts": 2,
    "bf16": False,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a tiny model for a name of the hub: of its family, with a chat template where it has one."""
    folder = tmp_path_factory.mktemp("models")

    def get(name):
        path = folder / name.replace("/", "--")
        if not path.exists():
            config = CONFIGS[name.partition("/")[0]](
                **tiny.SMALL,
                head_dim=16,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=3,
                tie_word_embeddings=False,  # else a random Gemma repeats the last token for ever
            )
            torch.manual_seed(0)
            tf.AutoModelForCausalLM.from_config(config).save_pretrained(path)
            tiny.tokenizer(chat=name.endswith(("Instruct", "SFT", "-it"))).save_pretrained(path)
        return str(path)

    return get


@pytest.mark.parametrize(
    ("task", "reward"),
    [
        ("qwen-pretrained", "cme"),
        ("llama-instruct", "random-verifier"),
        ("gemma-instruct", "self-certainty"),
        ("olmo-sft", "length"),
    ],
)
def test_a_step_of_every_family(task, reward, small, tmp_path):
    cell = CELLS[task, reward]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(8)))
    models = {name: small(cell.settings[name]) for name in ("model_name_or_path", "verifier", "canary")}
    local = {"dataset_name": str(prompts), "dataset_train_split": "train", "dataset_test_split": "train"}
    kept = cells.run(replace(cell, settings={**cell.settings, **models, **local, **SHRUNK}), tmp_path / "run")
    assert [step["step"] for step in kept["steps"]] == [1]
    assert kept["steps"][0]["grad_norm"] >= 0
    assert "cme/canary" in kept["steps"][0]
    assert len(kept["after"]) == 2 * (2 + 1)


def test_every_family_and_regime_is_there():
    models = {cell.settings["model_name_or_path"] for cell in CELLS.values()}
    assert {name.partition("/")[0] for name in models} == CONFIGS.keys()
    for cell in CELLS.values():
        families = [cell.settings[name].partition("/")[0] for name in ("model_name_or_path", "verifier", "canary")]
        assert len(set(families)) == 3
