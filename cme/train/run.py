"""`python -m cme.train`: GRPO on the Cross-Model Entropy reward, with TRL."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, ModelConfig, get_peft_config, get_quantization_config

from cme.adapters import load_policy, without_adapters
from cme.demo.models import local_path
from cme.errors import CMEError, is_disk_full
from cme.evaluation.generate import Sampling, stop_token_ids
from cme.evaluation.held_out import Answer, answer_all, summarize
from cme.files.atomic import sha256
from cme.models import load_model
from cme.options import parse_chat_template_kwargs
from cme.policy import Policy
from cme.reward import CMEReward, Measure, verifier_prompts
from cme.rewards.build import build_rewards
from cme.rewards.dense import DenseCMEReward
from cme.rewards.names import DENSE, parse_rewards
from cme.text.rendering import unescaped
from cme.train.alarms import Watch, parse_rules
from cme.train.callbacks import Alarms, Checkpoints, Progress, Recorder
from cme.train.config import CMEConfig, parse
from cme.train.data import Prompts, load_prompts, prepare
from cme.train.folder import RunFolder, is_latest
from cme.train.report import differences, draw, table
from cme.train.trainer import PackedGRPOTrainer
from cme.verifier import Verifier


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 after an error with a message, 130 after Ctrl-C."""
    _quiet()
    output_dir = None
    try:
        options = parse(argv)
        output_dir = str(options[2].output_dir)
        train(*options)
    except CMEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_continue(output_dir)}", file=sys.stderr)
        return 130
    except Exception as error:
        if output_dir is None or not is_disk_full(error):
            raise
        free = shutil.disk_usage(output_dir).free / 2**20
        print(
            f"error: could not write to {output_dir}: {error} ({free:,.0f} MiB free). "
            f"Make room (a checkpoint holds the weights and twice their size of optimizer state), then "
            f"{_how_to_continue(output_dir)}",
            file=sys.stderr,
        )
        return 1
    return 0


def train(cme: CMEConfig, model_config: ModelConfig, grpo: GRPOConfig) -> dict[str, Any]:
    """One run, from its options to its folder (see `cme.train.folder`); returns what summary.json holds."""
    _require(cme, model_config)
    _check_reward(cme, grpo)
    folder = RunFolder(str(grpo.output_dir))
    with folder.locked() if grpo.process_index == 0 else nullcontext():
        return _train_in(folder, cme, model_config, grpo)


def _train_in(folder: RunFolder, cme: CMEConfig, model_config: ModelConfig, grpo: GRPOConfig) -> dict[str, Any]:
    start = time.monotonic()
    alarms = _alarms(cme, grpo, folder)
    settings = _settings(cme, model_config, grpo)
    checkpoint, finished = _open(folder, settings, cme, grpo)
    if finished is not None:
        stopped = any(alarm["action"] != "warn" for alarm in finished["alarms"])
        end = "an alarm stopped it" if stopped else "raise --max_steps to train on"
        _say(grpo, f"{folder.path} is finished, with {finished['steps']} steps: {end}")
        return finished
    _say(
        grpo, f"generator {settings['generator']}, verifier {settings['verifier']}, prompts {settings['dataset']}"
    )

    prompts = load_prompts(
        str(cme.dataset_name),
        config=cme.dataset_config,
        train_split=cme.dataset_train_split,
        test_split=cme.dataset_test_split,
        prompt_column=cme.prompt_column,
        verifier_prompt_column=cme.verifier_prompt_column,
    )
    verifier_prompts((), prompts.train[:1], cme.verifier_prompt_column)  # raises before models are loaded
    trainer, reward, prompts = _build(cme, model_config, grpo, prompts, folder, alarms)
    held_out = _held_out(cme, grpo, prompts)
    before = _evaluate("before", trainer, reward, cme, held_out, prompts, folder)
    if checkpoint is not None:
        _say(grpo, f"continuing from {checkpoint}")
    if alarms is not None and alarms.rolls_back:
        alarms.resumed_from = checkpoint
        # As a call of the trainer's own, which does not push the untrained model to the hub
        alarms.keep_start(partial(trainer.save_model, _internal_call=True), trainer.is_world_process_zero())
    _run(trainer, checkpoint)
    kept_step = _roll_back(trainer, alarms)
    trainer.save_model(str(folder.model))
    after = _evaluate("after", trainer, reward, cme, held_out, prompts, folder)

    first, last = (summarize(answers) if answers else None for answers in (before, after))
    fired = alarms.history() if alarms else []
    summary = {
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - start, 1),
        "alarms": fired,
        "model_step": kept_step,
        "before": first,
        "after": last,
        "difference": differences(before, after) if before and after else None,
        "decoding": None if held_out is None else trainer.decoding(),
        "settings": settings,
        "environment": _environment(),
    }
    if trainer.is_world_process_zero():
        draw(folder.history(), first, last, folder.picture, fired)
        folder.write_json("summary.json", summary)
        if before and after:
            print(f"\n{table(before, after)}")
        if alarms is not None and alarms.stopped is not None:
            print(f"\nstopped by the alarm {alarms.stopped.rule.text} at step {alarms.stopped.step};", end=" ")
            print(f"model/ is that of step {kept_step}")
        print(f"\n{summary['steps']} steps in {summary['seconds']:.0f} s. {folder.path} holds metrics.jsonl,")
        rest = ("summary.json", "training.png", "completions/", "evaluation/")
        print(
            ", ".join(name for name in rest if (folder.path / name).exists()), "and the trained model in model/."
        )
    return summary


def _run(trainer: PackedGRPOTrainer, checkpoint: Path | None) -> None:
    grpo: Any = trainer.args
    if checkpoint is not None and not (grpo.fsdp or grpo.deepspeed or _has_adapters(trainer)):
        _load_weights(trainer, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise CMEError(
            f"the generator's probabilities became NaN after step {trainer.state.global_step}: "
            "start again with a lower --learning_rate, from the model or from a checkpoint (--model_name_or_path)"
        ) from error


def _alarms(cme: CMEConfig, grpo: GRPOConfig, folder: RunFolder) -> Alarms | None:
    rules = parse_rules(cme.stop_when)
    if cme.on_alarm == "off" or not rules:
        return None
    action = cme.on_alarm
    if action == "rollback" and (grpo.fsdp or grpo.deepspeed):
        _say(grpo, "an alarm stops the run, without rolling back: it is not available with FSDP and DeepSpeed")
        action = "stop"
    given = parse_rules([text for text in cme.stop_when if text.strip() != "default"])
    return Alarms(folder, Watch(rules, cme.alarm_window), action, given)


def _roll_back(trainer: PackedGRPOTrainer, alarms: Alarms | None) -> int:
    """Give the trainer the weights to keep after an alarm; returns the step that they are of."""
    step: int = trainer.state.global_step
    if alarms is None or not alarms.rolls_back:
        return step
    if alarms.stopped is None:
        if trainer.is_world_process_zero():
            alarms.forget_best()
        return step
    trainer.accelerator.wait_for_everyone()  # until the main process has written them
    if (best := alarms.best_step) is None:
        return step
    if _has_adapters(trainer):
        trainer.state.best_model_checkpoint = str(alarms.best)
        trainer._load_best_model()
    else:
        _load_weights(trainer, alarms.best)
    return best


def _load_weights(trainer: PackedGRPOTrainer, folder: Path) -> None:
    """Give the model in training those of `folder`, all of them. The trainer would pass over what has other names
    in files than in the model, such as experts."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    grpo: Any = trainer.args
    saved, _ = load_model(
        str(folder), "model", dtype=model.dtype, device="cpu", trust_remote_code=grpo.trust_remote_code
    )
    model.load_state_dict(saved.state_dict())


def _has_adapters(trainer: PackedGRPOTrainer) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


def _build(
    cme: CMEConfig,
    model_config: ModelConfig,
    grpo: GRPOConfig,
    prompts: Prompts,
    folder: RunFolder,
    alarms: Alarms | None,
) -> tuple[PackedGRPOTrainer, CMEReward, Prompts]:
    # One process downloads and converts; the others then find the cache
    with grpo.main_process_first(desc="loading the models"):
        generator_path, verifier_path = (
            local_path(str(name)) for name in (model_config.model_name_or_path, cme.verifier)
        )
    model, tokenizer = load_policy(
        generator_path,
        model_config.use_peft,
        dtype=model_config.dtype,
        device="cpu",  # the trainer moves it
        revision=model_config.model_revision,
        quantization_config=get_quantization_config(model_config),
        trust_remote_code=grpo.trust_remote_code,
    )
    base = without_adapters(model)
    prompts = _prepare(cme, grpo, prompts, tokenizer)
    verifier = Verifier.from_pretrained(
        verifier_path,
        dtype=cme.verifier_dtype,
        device=grpo.device,
        template=unescaped(cme.verifier_template),
        chat_template_kwargs=cme.chat_template_kwargs(),
        score_thoughts=cme.score_thoughts,
        max_batch_tokens=cme.verifier_max_batch_tokens or "auto",
    )
    canary = _other_verifier(cme.canary, cme, grpo) if cme.canary else None
    kind = partial(DenseCMEReward, tokenizer=tokenizer) if DENSE in cme.reward else CMEReward
    reward = kind(
        verifier,
        prompt_column=cme.verifier_prompt_column,
        measures=_measures(prompts),
        canary=canary,
        stop_token_ids=stop_token_ids(base, tokenizer) if cme.score_end_of_turn else (),
    )
    policy = Policy(  # adapters are put into this model
        base, tokenizer, grpo.temperature, chat_template_kwargs=_generator_kwargs(grpo)
    )
    limit, grpo.save_total_limit = grpo.save_total_limit, None
    trainer = PackedGRPOTrainer(
        model,
        reward_funcs=build_rewards(cme.reward, reward, policy, lambda name: _other_verifier(name, cme, grpo)),
        dense=reward if isinstance(reward, DenseCMEReward) else None,
        args=grpo,
        train_dataset=prompts.train,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[Recorder(folder), Checkpoints(limit), *([alarms] if alarms else [])],
    )
    if not grpo.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Progress())
    return trainer, reward, prompts


def _other_verifier(name: str, cme: CMEConfig, grpo: GRPOConfig) -> Verifier:
    with grpo.main_process_first(desc="loading a verifier"):
        path = local_path(name)
    return Verifier.from_pretrained(
        path,
        dtype=cme.verifier_dtype,
        device=grpo.device,
        score_thoughts=cme.score_thoughts,
        max_batch_tokens=cme.verifier_max_batch_tokens or "auto",
    )


def _prepare(cme: CMEConfig, grpo: GRPOConfig, prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    def prepared(dataset: Dataset) -> Dataset:
        return prepare(dataset, tokenizer, cme.prompt_format, cme.max_prompt_tokens, _generator_kwargs(grpo))

    with grpo.main_process_first(desc="preparing the prompts"):
        train, held_out = prepared(prompts.train), prompts.held_out and prepared(prompts.held_out)
    if len(train) < len(prompts.train):
        _say(grpo, f"{len(prompts.train) - len(train)} prompts are left out: over {cme.max_prompt_tokens} tokens")
    return replace(prompts, train=train, held_out=held_out)


def _measures(prompts: Prompts) -> list[Measure]:
    judge = prompts.judge
    return [] if judge is None else [lambda text, row: {"accuracy": float(judge(text, row))}]


def _held_out(cme: CMEConfig, grpo: GRPOConfig, prompts: Prompts) -> Dataset | None:
    if prompts.held_out is None or cme.eval_prompts == 0:
        return None
    if grpo.fsdp or grpo.deepspeed:
        _say(grpo, "no evaluation before and after: it is not available with FSDP and DeepSpeed")
        return None
    return prompts.held_out.select(range(min(cme.eval_prompts, len(prompts.held_out))))


def _evaluate(
    name: str,
    trainer: PackedGRPOTrainer,
    reward: CMEReward,
    cme: CMEConfig,
    held_out: Dataset | None,
    prompts: Prompts,
    folder: RunFolder,
) -> list[Answer] | None:
    """Answers of the policy as it is now, each process its share of the prompts; read back after a resume."""
    if held_out is None:
        return None
    stored = folder.read_answers(name) if name == "before" else None
    if stored is not None:
        return stored
    grpo: Any = trainer.args
    rank, world = grpo.process_index, grpo.world_size
    mine = range(rank, len(held_out), world)
    rows = [held_out[i] for i in mine]
    seen = None if cme.verifier_prompt_column is None else [row[cme.verifier_prompt_column] for row in rows]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    training = model.training
    model.eval()
    answers = answer_all(
        model,
        tokenizer,
        reward.verifier,
        rows,
        _sampling(cme, trainer),
        verifier_prompts=seen,
        judge=prompts.judge,
        progress=None if grpo.disable_tqdm or rank > 0 else f"held out, {name}",
        autocast=trainer.accelerator.autocast(),
    )
    model.train(training)
    own = [a.of_question(mine[a.question]) for a in answers]
    every: list[Answer] = gather_object(own) if world > 1 else own
    if rank == 0:
        folder.write_answers(name, every)
    return every


def _sampling(cme: CMEConfig, trainer: PackedGRPOTrainer) -> Sampling:
    grpo: Any = trainer.args
    return Sampling(
        samples=cme.eval_samples,
        max_new_tokens=int(grpo.max_completion_length or 512),
        decoding=trainer.decoding(),
        chat_template_kwargs=_generator_kwargs(grpo),
    )


def _generator_kwargs(grpo: GRPOConfig) -> dict[str, Any]:
    return parse_chat_template_kwargs(grpo.chat_template_kwargs, "--chat_template_kwargs")


def _require(cme: CMEConfig, model_config: ModelConfig) -> None:
    for option, value in (
        ("--model_name_or_path", model_config.model_name_or_path),
        ("--verifier", cme.verifier),
        ("--dataset_name", cme.dataset_name),
    ):
        if not value:
            raise CMEError(f"{option} is missing: give it on the command line or in the --config file")


def _check_reward(cme: CMEConfig, grpo: GRPOConfig) -> None:
    rewards, given = parse_rewards(cme.reward), f"--reward {' '.join(cme.reward)}"
    if grpo.reward_weights is not None and len(grpo.reward_weights) != len(rewards):
        raise CMEError(f"--reward_weights has {len(grpo.reward_weights)} numbers: give one per reward of {given}")
    needs_policy = [reward.name for reward in rewards if reward.needs_policy]
    if needs_policy and (grpo.fsdp or grpo.deepspeed):
        raise CMEError(
            f"--reward {needs_policy[0]} scores the policy between steps, when FSDP and DeepSpeed keep its "
            "weights in pieces: train without them, or with another reward"
        )
    if cme.score_end_of_turn and [reward.name for reward in rewards] != ["cme"]:
        raise CMEError(
            f"--score_end_of_turn goes with --reward cme alone, and {given} scores texts: leave one of them out"
        )
    needs_all = [reward.name for reward in rewards if reward.needs_whole_response]
    if needs_all and not cme.score_thoughts:
        raise CMEError(
            f"--reward {needs_all[0]} sets the verifier's tokens beside all of the generator's: leave out "
            "--score_thoughts false, or take another reward"
        )


def _open(
    folder: RunFolder, settings: Mapping[str, Any], cme: CMEConfig, grpo: GRPOConfig
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to continue from, if any, and the summary of a run that has nothing left to do."""
    opened: list[Any] = [None, None]
    given = str(grpo.resume_from_checkpoint or "")  # a file may say true
    if grpo.process_index == 0:
        if not given:
            folder.start(settings, cme.overwrite)
        else:
            folder.check(settings)
            opened[1] = folder.finished(settings) if is_latest(given) else None
            opened[0] = folder.resume(settings, given) if opened[1] is None else None
    if grpo.world_size > 1:
        broadcast_object_list(opened)
    checkpoint, finished = opened
    return checkpoint, finished


def _settings(cme: CMEConfig, model_config: ModelConfig, grpo: GRPOConfig) -> dict[str, Any]:
    return {
        "generator": model_config.model_name_or_path,
        "verifier": cme.verifier,
        "reward": " ".join(cme.reward),
        "reward_weights": grpo.reward_weights,
        "multi_objective_aggregation": grpo.multi_objective_aggregation,
        "dataset": cme.dataset_name,
        "dataset_sha256": sha256(file) if (file := Path(str(cme.dataset_name))).is_file() else None,
        "seed": grpo.seed,
        "max_steps": grpo.max_steps,
        "num_train_epochs": grpo.num_train_epochs,
        "num_generations": grpo.num_generations,
        "completions_per_step": grpo.per_device_train_batch_size
        * grpo.gradient_accumulation_steps
        * grpo.world_size,
        "max_completion_length": grpo.max_completion_length,
        "learning_rate": grpo.learning_rate,
        "lr_scheduler_type": str(getattr(grpo.lr_scheduler_type, "value", grpo.lr_scheduler_type)),
        "beta": grpo.beta,
        "loss_type": grpo.loss_type,
        "canary": cme.canary,
        "stop_when": cme.stop_when,
        "on_alarm": cme.on_alarm,
        "sampling": {
            name: getattr(grpo, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs")
        },
        "lora": model_config.use_peft
        and {name: value for name, value in vars(model_config).items() if name.startswith("lora_")},
        "chat_template_kwargs": _generator_kwargs(grpo),
        "verifier_template": cme.verifier_template,
        "score_end_of_turn": cme.score_end_of_turn,
        "score_thoughts": cme.score_thoughts,
        "verifier_chat_template_kwargs": cme.chat_template_kwargs(),
    }


def _environment() -> dict[str, Any]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "device": "cpu" if accelerator is None else torch.cuda.get_device_name(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }


def _how_to_continue(output_dir: str | None) -> str:
    if output_dir is None or not Path(output_dir).exists():
        return "nothing had been written"
    return f"continue with the same command and --resume_from_checkpoint latest (the run is in {output_dir})"


def _say(grpo: GRPOConfig, text: str) -> None:
    if grpo.process_index == 0:
        print(text, flush=True)


def _quiet() -> None:
    # What a user of this command can't act on
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
