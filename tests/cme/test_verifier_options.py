"""What a verifier is loaded with where it is not loaded in Python: by the environment, and by a training run."""

import pytest
import tiny
import torch

from cme import reward as reward_module
from cme.errors import CMEError
from cme.train.__main__ import main
from cme.train.config import parse
from cme.verifier import Verifier

BRIEF = "{% if add_generation_prompt and brief %}In short: {% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template += BRIEF
    tiny.llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def environment(monkeypatch, folder):
    """Sets variables of the environment that the module-level reward reads, after CME_VERIFIER."""
    reward_module._from_environment.cache_clear()
    monkeypatch.setenv("CME_VERIFIER", folder)
    yield lambda name, value: monkeypatch.setenv(f"CME_{name}", value)
    reward_module._from_environment.cache_clear()


def test_the_environment_says_how_the_verifier_is_loaded(environment, folder):
    environment("CHAT_TEMPLATE_KWARGS", '{"brief": true}')
    environment("DTYPE", "bfloat16")
    environment("MAX_BATCH_TOKENS", "64")
    got = reward_module.cme(prompts=["Where?"], completions=["Here"])
    verifier = reward_module._from_environment().verifier
    assert (verifier.max_batch_tokens, verifier.model.dtype) == (64, torch.bfloat16)
    want = Verifier.from_pretrained(folder, dtype="bfloat16", chat_template_kwargs={"brief": True})
    assert got == pytest.approx([want.score(["Where?"], ["Here"])[0].mean_logprob])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CHAT_TEMPLATE_KWARGS", "brief", "CME_CHAT_TEMPLATE_KWARGS 'brief' is not JSON"),
        ("MAX_BATCH_TOKENS", "4k", "CME_MAX_BATCH_TOKENS='4k' is neither a positive whole number nor 'auto'"),
        ("DTYPE", "half", "there is no dtype 'half'"),
    ],
)
def test_the_variable_that_makes_no_sense_is_named(environment, name, value, message):
    environment(name, value)
    with pytest.raises(CMEError, match=message):
        reward_module.cme(prompts=["Where?"], completions=["Here"])


def test_training_takes_variables_of_the_chat_template(tmp_path):
    text = ["--dataset_name", "x", "--verifier_chat_template_kwargs", '{"brief": true}']
    (tmp_path / "c.yaml").write_text("verifier_chat_template_kwargs:\n  brief: true\n")
    for arguments in (text, ["--config", str(tmp_path / "c.yaml")]):
        assert parse(arguments)[0].chat_template_kwargs() == {"brief": True}
    assert parse(["--dataset_name", "x"])[0].chat_template_kwargs() == {}
    with pytest.raises(CMEError, match="--verifier-chat-template-kwargs 'brief' is not JSON"):
        parse([*text, "--verifier_chat_template_kwargs", "brief"])


def test_a_training_run_renders_with_them(folder, tmp_path, monkeypatch):
    loaded = []
    original = Verifier.from_pretrained
    monkeypatch.setattr(
        Verifier, "from_pretrained", lambda *args, **how: loaded.append(original(*args, **how)) or loaded[-1]
    )
    options = ["--model_name_or_path", folder, "--verifier", folder, "--verifier_template", "chat"]
    options += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--eval_prompts", "0"]
    options += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    options += ["--num_generations", "4", "--max_completion_length", "4"]
    assert main([*options, "--verifier_chat_template_kwargs", '{"brief": true}']) == 0
    assert loaded[0].renderer.chat_template_kwargs == {"brief": True}
