"""Options of `python -m cme.train`: ours, TRL's, and the built-in demo's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from trl import GRPOConfig, ModelConfig, TrlParser

from cme.errors import CMEError
from cme.options import parse_chat_template_kwargs
from cme.rewards.names import HELP as REWARDS_HELP
from cme.train.alarms import DEFAULT_RULES

DEMO = Path(str(files("cme.demo") / "demo.yaml"))

DESCRIPTION = """\
Train a language model with GRPO on the Cross-Model Entropy reward: the mean log-likelihood of its responses
under a frozen verifier.

Without --config and --dataset_name it is the built-in demo, which needs no GPU and no hub: SmolLM2-135M-Instruct
learns the capitals of the world from gemma-3-270m. Any option overrides the demo's."""

EPILOG = """\
Every option of TRL's GRPOConfig and ModelConfig works too; --help_all lists them. Most used:
  --model_name_or_path MODEL      the generator to train: hub id, local folder, or a demo model
  --output_dir DIR                the run's folder (demo: runs/demo)
  --max_steps N  --learning_rate X  --seed N
  --num_generations G             completions per prompt
  --per_device_train_batch_size B  --gradient_accumulation_steps A
                                  completions per forward pass, and passes per step
  --max_completion_length T       tokens
  --beta X                        weight of the KL divergence to the start model (default 0, which does
                                  not log it; 1e-9 logs it and penalises nothing)
  --chat_template_kwargs JSON     variables of the generator's chat template, such as '{"enable_thinking": false}'
  --use_peft --lora_r R           train a LoRA adapter instead of all parameters
  --use_vllm                      sample with vLLM
  --resume_from_checkpoint latest continue the run in --output_dir (or give a checkpoint's folder)

examples:
  python -m cme.train
  python -m cme.train --max_steps 40 --seed 1 --output_dir runs/demo-seed1
  python -m cme.train --resume_from_checkpoint latest
  python -m cme.train --canary smollm2-135m-instruct --stop_when default "entropy<0.3" --on_alarm stop
  python -m cme.train --model_name_or_path Qwen/Qwen3-0.6B --verifier google/gemma-3-1b-it \\
      --dataset_name prompts.jsonl --output_dir runs/mine
"""


@dataclass
class CMEConfig:
    """What `python -m cme.train` adds to TRL's options."""

    verifier: str | None = field(
        default=None, metadata={"help": "Frozen model that rewards: hub id, local folder, or a demo model."}
    )
    reward: list[str] = field(default_factory=lambda: ["cme"], metadata={"help": REWARDS_HELP})
    verifier_dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16 or float16. Default: the checkpoint's own; float32 on a CPU."},
    )
    verifier_template: str = field(
        default="auto",
        metadata={
            "help": "How the verifier sees a response: 'chat' (its chat template), a text with {prompt} and "
            "{response}, or 'auto': its chat template if it has one, else the plain text "
            "'Question: {prompt}\\nAnswer: {response}'."
        },
    )
    verifier_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Variables of the verifier's chat template: JSON such as '{\"enable_thinking\": false}', or a "
            "mapping in a --config file."
        },
    )
    verifier_prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column that the verifier sees as the prompt. Default: the generator's prompt."},
    )
    score_end_of_turn: bool = field(
        default=False,
        metadata={
            "help": "Also score the verifier's end-of-turn token in CME, where a response ended by itself. "
            "Held-out likelihoods stay those of the text."
        },
    )
    score_thoughts: bool = field(
        default=True,
        metadata={
            "help": "Score a response's thoughts (<think>...</think>), too; 'false': only what follows them."
        },
    )
    verifier_max_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens in one forward pass of the verifier. Default: by the free memory."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a task (capitals, the demo's; civics, symbols and others: see docs/evaluation.md), "
            "a .jsonl, .json, .csv or .parquet file, or a hub id. "
            "Needs a column 'prompt', a text or a list of messages."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate before and after training. Default: no evaluation."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the dataset that holds the prompt."})
    prompt_format: str = field(
        default="auto",
        metadata={
            "help": "What plain-text prompts become: 'chat' (a user's message), 'text' (as they are), or 'auto': "
            "chat if the generator has a chat template.",
            "choices": ["auto", "chat", "text"],
        },
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Leave out prompts with more tokens of the generator than this."}
    )
    eval_prompts: int = field(default=80, metadata={"help": "Most held-out prompts in an evaluation; 0 for none."})
    eval_samples: int = field(
        default=4, metadata={"help": "Sampled responses per held-out prompt, besides one greedy response."}
    )
    canary: str | None = field(
        default=None,
        metadata={
            "help": "A second frozen model, best of another family, that never enters the reward. Its likelihood "
            "is logged each step as cme/canary, and how far it is below the verifier's as cme/canary_gap. "
            "It sees responses as with --verifier_template auto."
        },
    )
    stop_when: list[str] = field(
        default_factory=lambda: ["default"],
        metadata={
            "help": "Alarms: METRIC>LIMIT or METRIC<LIMIT, any logged number (cme/ may be left out), the limit a "
            "number or start+X, start-X, start*X. 'default' is " + " ".join(DEFAULT_RULES) + "."
        },
    )
    on_alarm: str = field(
        default="rollback",
        metadata={
            "help": "What an alarm does: 'rollback' stops, and the trained model is the newest checkpoint at "
            "which every metric was at most half its way to its limit, else the start model; 'stop' stops, and "
            "the trained model is the last one; 'warn' goes on; 'off'. alarms.jsonl says what fired when.",
            "choices": ["rollback", "stop", "warn", "off"],
        },
    )
    alarm_window: int = field(
        default=3, metadata={"help": "Logged steps whose mean an alarm looks at; the start is the first as many."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete an earlier run in --output_dir."})

    def __post_init__(self) -> None:
        # Errors are worth knowing before models are loaded; argparse checks choices on the command line only
        self.chat_template_kwargs()
        if self.on_alarm is False:  # what YAML makes of off
            self.on_alarm = "off"
        if isinstance(self.reward, str):  # as one may stand in a file
            self.reward = self.reward.split()
        types = get_type_hints(CMEConfig)
        for option in fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if not _is_of(value, types[option.name]):
                raise CMEError(f"--{option.name} {value!r} is not {CMEConfig.__annotations__[option.name]}")
            if choices and value not in choices:
                raise CMEError(f"--{option.name} {value!r} is not a choice: give {', '.join(choices)}")

    def chat_template_kwargs(self) -> dict[str, Any]:
        """Variables of the verifier's chat template. Raises TemplateError if they are not JSON."""
        return parse_chat_template_kwargs(self.verifier_chat_template_kwargs, "--verifier_chat_template_kwargs")


Options = tuple[CMEConfig, ModelConfig, GRPOConfig]


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line, over those of a --config file or the demo, over defaults.

    Raises CMEError for a missing or malformed file, and exits like argparse on unknown options.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(args):
        _help_parser(CMEConfig).print_help()
        raise SystemExit(0)
    if "--help_all" in args:
        _help_parser(CMEConfig, ModelConfig, GRPOConfig).print_help()
        raise SystemExit(0)
    types: Any = (CMEConfig, ModelConfig, GRPOConfig)
    parser = _Parser(types, prog="python -m cme.train", allow_abbrev=False)
    parser.set_defaults(output_dir="runs/train", disable_tqdm=False)
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False)  # GRPOConfig's default, bfloat16, is refused without a GPU
    named = {a.split("=")[0].replace("-", "_") for a in args}
    if not named & {"__config", "__dataset_name"}:
        args = ["--config", str(DEMO), *args]
    try:
        cme, model, grpo = parser.parse_args_and_config(_split_config(args))
    except OSError as error:
        raise CMEError(f"could not read the configuration file: {error}") from error
    except yaml.YAMLError as error:
        raise CMEError(f"the configuration file is not valid YAML: {error}") from error
    except ValueError as error:
        raise CMEError(str(error)) from error
    except (TypeError, ImportError) as error:  # from TRL's own checks
        raise CMEError(f"an option has a value of the wrong type, or needs another package: {error}") from error
    return cme, model, grpo


def _is_of(value: Any, kind: Any) -> bool:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not isinstance(value, tuple(get_origin(k) or k for k in kinds)):
        return False
    return not isinstance(value, list) or all(isinstance(item, get_args(kind)) for item in value)


class _Parser(TrlParser):
    """Reads numbers and switches of a file as those of the command line: what is none is an error."""

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        for action in self._actions:
            if config.get(action.dest) is not None and action.type in (int, float, string_to_bool):
                config[action.dest] = str(config[action.dest])
        unknown: list[str] = super().set_defaults_with_config(**config)
        return unknown


def _split_config(args: list[str]) -> list[str]:
    # TrlParser knows `--config FILE` only
    split = [part for a in args for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if split[-1] == "--config":
        raise CMEError("--config needs the name of a file")
    return split


def _help_parser(*types: Any) -> argparse.ArgumentParser:
    return HfArgumentParser(
        types,
        prog="python -m cme.train",
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
