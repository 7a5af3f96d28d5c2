"""Options of `python -m cme.train`: ours, TRL's, and the built-in demo's.

Their help is printed without torch and TRL, whose imports take seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from cme.errors import CMEError
from cme.options import parse_chat_template_kwargs
from cme.rewards.names import HELP as REWARDS_HELP
from cme.rewards.names import parse_rewards

if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig

DEMO = Path(str(files("cme.demo") / "demo.yaml"))

DEFAULT_RULES = (
    "echo_rate>start+0.2",
    "prompt_copy_rate>start+0.3",
    "repeated_4gram_rate>start+0.2",
    "entropy<start*0.25",
    "canary_gap>start+1",
    "canary<start-1",
)
"""Alarms that "default" stands for, chosen with the runs of the demo and the study in view; docs/training.md says
what they miss there."""

DESCRIPTION = """\
Train a language model with GRPO on the Cross-Model Entropy reward: the mean log-likelihood of its responses
under a frozen verifier.

Without --config and --dataset-name it is the built-in demo, which needs no GPU and no hub: SmolLM2-135M-Instruct
learns the capitals of the world from gemma-3-270m. Any option overrides the demo's."""

EPILOG = """\
Every option of TRL's GRPOConfig and ModelConfig works too; --help-all lists them. Most used:
  --model-name-or-path MODEL      the generator to train: hub id, local folder, or a demo model
  --output-dir DIR                the run's folder (demo: runs/demo)
  --max-steps N  --learning-rate X  --seed N
  --num-generations G             completions per prompt
  --per-device-train-batch-size B  --gradient-accumulation-steps A
                                  completions per forward pass, and passes per step
  --max-completion-length T       tokens
  --beta X                        weight of the KL divergence to the start model (default 0, which does
                                  not log it; 1e-9 logs it and penalises nothing)
  --chat-template-kwargs JSON     variables of the generator's chat template, such as '{"enable_thinking": false}'
  --use-peft --lora-r R           train a LoRA adapter instead of all parameters
  --use-vllm                      sample with vLLM
  --resume-from-checkpoint latest continue the run in --output-dir (or give a checkpoint's folder)

examples:
  python -m cme.train
  python -m cme.train --max-steps 40 --seed 1 --output-dir runs/demo-seed1
  python -m cme.train --resume-from-checkpoint latest
  python -m cme.train --canary smollm2-135m-instruct --stop-when default "entropy<0.3" --on-alarm stop
  python -m cme.train --model-name-or-path Qwen/Qwen3-0.6B --verifier google/gemma-3-1b-it \\
      --dataset-name prompts.jsonl --output-dir runs/mine
"""


def _option(default: Any, help: str, **how: Any) -> Any:
    """A field that HfArgumentParser makes an option of."""
    return field(default=default, metadata={"help": help, **how})


@dataclass
class CMEConfig:
    """The options that `python -m cme.train` has beside TRL's."""

    verifier: str | None = _option(None, "Frozen model that rewards: hub id, local folder, or a demo model.")
    reward: list[str] = field(default_factory=lambda: ["cme"], metadata={"help": REWARDS_HELP})
    verifier_dtype: str | None = _option(
        None, "float32, bfloat16 or float16. Default: the checkpoint's own; float32 on a CPU."
    )
    verifier_template: str = _option(
        "auto",
        "How the verifier sees a response: 'chat' (its chat template), a text with {prompt} and "
        "{response}, or 'auto': its chat template if it has one, else the plain text "
        "'Question: {prompt}\\nAnswer: {response}'.",
    )
    verifier_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Variables of the verifier's chat template: JSON such as '{\"enable_thinking\": false}', or a "
            "mapping in a --config file."
        },
    )
    verifier_prompt_column: str | None = _option(
        None, "Column that the verifier sees as the prompt. Default: the generator's prompt."
    )
    score_end_of_turn: bool = _option(
        False,
        "Also score the verifier's end-of-turn token in CME, where a response ended by itself. "
        "Held-out likelihoods stay those of the text.",
    )
    score_thoughts: bool = _option(
        True, "Score a response's thoughts (<think>...</think>), too; 'false': only what follows them."
    )
    verifier_max_batch_tokens: int | None = _option(
        None, "Most tokens in one forward pass of the verifier. Default: by the free memory."
    )
    dataset_name: str | None = _option(
        None,
        "Prompts: a task (capitals, the demo's; civics, symbols and others: see docs/evaluation.md), "
        "a file of any format that `cme score` reads, or a hub id. A prompt is a text or a list of messages.",
    )
    dataset_config: str | None = _option(None, "Configuration of a hub dataset.")
    dataset_train_split: str = _option("train", "Split to train on.")
    dataset_test_split: str | None = _option(
        None, "Split to evaluate before and after training. Default: no evaluation."
    )
    prompt_column: str | None = _option(
        None, "Column with the prompts. Default: the first there is of prompt, question, instruction."
    )
    prompt_format: str = _option(
        "auto",
        "What plain-text prompts become: 'chat' (a user's message), 'text' (as they are), or 'auto': "
        "chat if the generator has a chat template.",
        choices=["auto", "chat", "text"],
    )
    max_prompt_tokens: int | None = _option(None, "Leave out prompts with more tokens of the generator than this.")
    eval_prompts: int = _option(80, "Most held-out prompts in an evaluation; 0 for none.")
    eval_samples: int = _option(4, "Sampled responses per held-out prompt, besides one greedy response.")
    canary: str | None = _option(
        None,
        "A second frozen model, best of another family, that never enters the reward. Its likelihood "
        "is logged each step as cme/canary, and how far it is below the verifier's as cme/canary_gap. "
        "It sees responses as with --verifier-template auto.",
    )
    stop_when: list[str] = field(
        default_factory=lambda: ["default"],
        metadata={
            "help": "Alarms: METRIC>LIMIT or METRIC<LIMIT, any logged number (cme/ may be left out), the limit a "
            "number or start+X, start-X, start*X. 'default' is " + " ".join(DEFAULT_RULES) + "."
        },
    )
    on_alarm: str = _option(
        "rollback",
        "What an alarm does: 'rollback' stops, and the trained model is the newest checkpoint at "
        "which every metric was at most half its way to its limit, else the start model; 'stop' stops, and "
        "the trained model is the last one; 'warn' stops nothing; 'off'. alarms.jsonl says what fired when.",
        choices=["rollback", "stop", "warn", "off"],
    )
    alarm_window: int = _option(3, "Logged steps whose mean an alarm looks at; the start is the first as many.")
    overwrite: bool = _option(False, "Delete an earlier run in --output-dir.")

    def __post_init__(self) -> None:
        # Errors are worth knowing before models are loaded; argparse checks choices on the command line only
        self.chat_template_kwargs()
        if self.on_alarm is False:  # what YAML makes of off
            self.on_alarm = "off"
        if isinstance(self.reward, str):  # as one may stand in a file
            self.reward = self.reward.split()
        types = get_type_hints(CMEConfig)
        for option in fields(self):
            name = option.name.replace("_", "-")
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if not _is_of(value, types[option.name]):
                raise CMEError(f"--{name} {value!r} is not {CMEConfig.__annotations__[option.name]}")
            if choices and value not in choices:
                raise CMEError(f"--{name} {value!r} is not a choice: give {', '.join(choices)}")

    def chat_template_kwargs(self) -> dict[str, Any]:
        """Variables of the verifier's chat template. Raises TemplateError if they are not JSON."""
        return parse_chat_template_kwargs(self.verifier_chat_template_kwargs, "--verifier-chat-template-kwargs")

    def verifier_options(self) -> dict[str, Any]:
        """For `Verifier.from_pretrained`, of the verifier, the canary and those that a reward names."""
        return {
            "dtype": self.verifier_dtype,
            "score_thoughts": self.score_thoughts,
            "max_batch_tokens": self.verifier_max_batch_tokens or "auto",
        }


Options = tuple[CMEConfig, "ModelConfig", "GRPOConfig"]


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line, over those of a --config file or the demo, over defaults.

    Raises CMEError for a missing or malformed file, and exits like argparse on unknown options.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        _print_help(CMEConfig)
    import torch
    from trl import GRPOConfig, ModelConfig, TrlParser

    if "--help_all" in arguments or "--help-all" in arguments:
        _print_help(CMEConfig, ModelConfig, GRPOConfig)
    config, arguments = _take_config(arguments)
    if config is None and not any(a.split("=")[0].replace("-", "_") == "__dataset_name" for a in arguments):
        config = DEMO
    kinds: Any = (CMEConfig, ModelConfig, GRPOConfig)
    parser = TrlParser(kinds, prog="python -m cme.train", allow_abbrev=False)
    parser.set_defaults(output_dir="runs/train", disable_tqdm=False)
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False)  # GRPOConfig's default, bfloat16, is refused without a GPU
    try:
        if config is not None:
            _set_defaults(parser, config)
        cme, model, grpo = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        raise CMEError(str(error)) from error
    except (TypeError, ImportError) as error:  # from TRL's own checks
        raise CMEError(f"an option has a value of the wrong type, or needs another package: {error}") from error
    return cme, model, grpo


def generator_kwargs(grpo: GRPOConfig) -> dict[str, Any]:
    """Variables of the generator's chat template. Raises TemplateError if they are not JSON."""
    return parse_chat_template_kwargs(grpo.chat_template_kwargs, "--chat-template-kwargs")


def check(cme: CMEConfig, model: ModelConfig, grpo: GRPOConfig) -> None:
    """Raise CMEError for options that are missing or exclude each other."""
    for option, value in (
        ("--model-name-or-path", model.model_name_or_path),
        ("--verifier", cme.verifier),
        ("--dataset-name", cme.dataset_name),
    ):
        if not value:
            raise CMEError(f"{option} is missing: give it on the command line or in the --config file")
    check_reward(cme, grpo)


def check_reward(cme: CMEConfig, grpo: GRPOConfig) -> None:
    """Raise CMEError for options that a reward can't go with."""
    rewards, given = parse_rewards(cme.reward), f"--reward {' '.join(cme.reward)}"
    if grpo.reward_weights is not None and len(grpo.reward_weights) != len(rewards):
        raise CMEError(f"--reward-weights has {len(grpo.reward_weights)} numbers: give one per reward of {given}")
    needs_policy = [reward.name for reward in rewards if reward.needs_policy]
    if needs_policy and (grpo.fsdp or grpo.deepspeed):
        raise CMEError(
            f"--reward {needs_policy[0]} scores the policy between steps, when FSDP and DeepSpeed keep its "
            "weights in pieces: train without them, or with another reward"
        )
    if cme.score_end_of_turn and [reward.name for reward in rewards] != ["cme"]:
        raise CMEError(
            f"--score-end-of-turn goes with --reward cme alone, and {given} scores texts: leave one of them out"
        )
    needs_all = [reward.name for reward in rewards if reward.needs_whole_response]
    if needs_all and not cme.score_thoughts:
        raise CMEError(
            f"--reward {needs_all[0]} sets the verifier's tokens beside all of the generator's: leave out "
            "--score-thoughts false, or take another reward"
        )


def _is_of(value: Any, kind: Any) -> bool:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not isinstance(value, tuple(get_origin(k) or k for k in kinds)):
        return False
    return not isinstance(value, list) or all(isinstance(item, get_args(kind)) for item in value)


def _take_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that --config names, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    found, others = parser.parse_known_args(arguments)
    if found.config == "":
        raise CMEError("--config needs the name of a file")
    return None if found.config is None else Path(found.config), others


def _set_defaults(parser: Any, path: Path) -> None:
    """Make a YAML file's values the defaults of `parser`, and its `env` variables of the environment."""
    import yaml
    from transformers.hf_argparser import string_to_bool

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CMEError(f"could not read the configuration file: {error}") from error
    except yaml.YAMLError as error:
        raise CMEError(f"the configuration file is not valid YAML: {error}") from error
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise CMEError(
            f"the configuration file {path} must contain a YAML mapping, from names of options to values"
        )
    config = {name.replace("-", "_"): value for name, value in config.items()}
    os.environ.update({str(name): str(value) for name, value in (config.pop("env", None) or {}).items()})
    for action in parser._actions:
        # argparse checks texts only: numbers and switches become texts, so that what is none is an error
        if config.get(action.dest) is not None and action.type in (int, float, string_to_bool):
            config[action.dest] = str(config[action.dest])
    if unknown := parser.set_defaults_with_config(**config):
        raise CMEError(f"the configuration file {path} has unknown options: {', '.join(unknown[::2])}")


def _print_help(*kinds: Any) -> None:
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(
        kinds,
        prog="python -m cme.train",
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for action in parser._actions:  # each with dashes and with underscores, of which one is enough to read
        action.option_strings = [name for name in action.option_strings if "_" not in name]
        if action.option_strings[0].startswith("--no-"):  # of a switch whose help says how it is turned off
            action.help = argparse.SUPPRESS
    parser.print_help()
    raise SystemExit(0)
