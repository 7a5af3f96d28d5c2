"""One training run, from its options to its summary: GRPO on the Cross-Model Entropy reward, with TRL."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object
from trl import get_peft_config, get_quantization_config

from cme.engine.selfcheck import evaluating
from cme.evaluation.generate import Sampling, stop_token_ids
from cme.evaluation.held_out import Answer, answer_all, summarize
from cme.models import without_adapters
from cme.options import unescaped
from cme.policy import Policy
from cme.reward import CMEReward, verifier_prompts
from cme.rewards.build import build_rewards
from cme.rewards.dense import DenseCMEReward
from cme.rewards.names import DENSE
from cme.train.adapters import load_policy
from cme.train.alarms import build_alarms
from cme.train.callbacks import add_callbacks
from cme.train.config import CMEConfig, check, generator_kwargs
from cme.train.data import Prompts, load_prompts, prepare
from cme.train.folder import RunFolder, environment, sealed_step, settings_of
from cme.train.report import closing_words, differences, draw, stopping_alarm
from cme.train.trainer import PackedGRPOTrainer
from cme.verifier import Verifier

if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig


def train(cme: CMEConfig, model_config: ModelConfig, grpo: GRPOConfig) -> dict[str, Any]:
    """One run in the folder `grpo.output_dir` (see `cme.train.folder`); returns what summary.json holds.

    Raises CMEError for options that can't go together, before anything is loaded or written.
    """
    check(cme, model_config, grpo)
    folder = RunFolder(str(grpo.output_dir))
    with folder.locked() if grpo.process_index == 0 else nullcontext():
        return _train_in(folder, cme, model_config, grpo)


def _train_in(folder: RunFolder, cme: CMEConfig, model_config: ModelConfig, grpo: GRPOConfig) -> dict[str, Any]:
    is_main = grpo.process_index == 0  # of the processes that train together, the one that writes and speaks
    is_sharded = bool(grpo.fsdp or grpo.deepspeed)  # no process holds the whole policy

    def say(text: str) -> None:
        if is_main:
            print(text, flush=True)

    # 1. Open the folder: for a new run, for one to continue from a checkpoint, or for one with nothing left to do.
    alarms = build_alarms(cme, folder, can_roll_back=not is_sharded)
    settings = settings_of(cme, model_config, grpo)
    opened: list[Any] = [None, None]
    if is_main:
        opened = [*folder.open(settings, str(grpo.resume_from_checkpoint or ""), cme.overwrite)]
    checkpoint, finished = broadcast_object_list(opened)
    if finished is not None:
        end = "an alarm stopped it" if stopping_alarm(finished) else "raise --max-steps to train on"
        say(f"{folder.path} is finished, with {finished['steps']} steps: {end}")
        return dict(finished)
    start = time.monotonic() - folder.seconds()  # as if the sessions before this one had ended just now
    say(f"generator {settings['generator']}, verifier {settings['verifier']}, prompts {settings['dataset']}")
    if is_sharded:
        say("with FSDP and DeepSpeed there is no evaluation before and after, and no rollback after an alarm")

    # 2. Load the prompts, before any model: what is wrong with them is then known at once.
    prompts = load_prompts(
        str(cme.dataset_name),
        config=cme.dataset_config,
        train_split=cme.dataset_train_split,
        test_split=cme.dataset_test_split,
        prompt_column=cme.prompt_column,
        verifier_prompt_column=cme.verifier_prompt_column,
    )
    verifier_prompts((), prompts.train[:1], cme.verifier_prompt_column)  # raises if there is no such column

    # 3. Load the models: the generator, which is trained, and the verifier, which is frozen.
    def load_verifier(name: str, **options: Any) -> Verifier:
        return Verifier.from_pretrained(name, device=grpo.device, **cme.verifier_options(), **options)

    model, tokenizer = load_policy(
        str(model_config.model_name_or_path),
        model_config.use_peft,
        dtype=model_config.dtype,
        device="cpu",  # the trainer moves it
        revision=model_config.model_revision,
        quantization_config=get_quantization_config(model_config),
        trust_remote_code=grpo.trust_remote_code,
    )
    with grpo.main_process_first(desc="preparing the prompts"):
        loaded = len(prompts.train)
        prompts = prepare(prompts, tokenizer, cme.prompt_format, cme.max_prompt_tokens, generator_kwargs(grpo))
    if left_out := loaded - len(prompts.train):
        say(f"{left_out} prompts are left out: over {cme.max_prompt_tokens} tokens")
    verifier = load_verifier(
        str(cme.verifier),
        template=unescaped(cme.verifier_template),
        chat_template_kwargs=cme.chat_template_kwargs(),
    )

    # 4. Build the reward, and what is logged beside it: diagnostics, the share of right answers, the canary.
    base = without_adapters(model)  # adapters are put into this model, so it stays the policy
    judge = prompts.judge
    kind = partial(DenseCMEReward, tokenizer=tokenizer) if DENSE in cme.reward else CMEReward
    reward = kind(
        verifier,
        prompt_column=cme.verifier_prompt_column,
        measures=[] if judge is None else [lambda text, row: {"accuracy": float(judge(text, row))}],
        canary=load_verifier(cme.canary) if cme.canary else None,
        stop_token_ids=stop_token_ids(base, tokenizer) if cme.score_end_of_turn else (),
    )
    policy = Policy(base, tokenizer, grpo.temperature, chat_template_kwargs=generator_kwargs(grpo))

    # 5. Build the trainer, with what shows, records, seals and watches the run.
    trainer = PackedGRPOTrainer(
        model,
        reward_funcs=build_rewards(cme.reward, reward, policy, load_verifier),
        dense=reward if isinstance(reward, DenseCMEReward) else None,
        args=grpo,
        train_dataset=prompts.train,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )
    add_callbacks(trainer, folder, alarms, start)

    # 6. Evaluate the start model on held-out prompts.
    evaluates = prompts.held_out is not None and cme.eval_prompts > 0 and not is_sharded
    before = _evaluate("before", trainer, verifier, cme, prompts, folder) if evaluates else None

    # 7. Train, from the checkpoint if there is one. An alarm can go back as far as the start, which is kept first.
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    if alarms.rolls_back:
        alarms.resumed_from = checkpoint
        # As a call of the trainer's own, which does not push the untrained model to the hub
        alarms.keep_start(partial(trainer.save_model, _internal_call=True), is_main)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    # 8. Roll back if an alarm has stopped the run, and save the model.
    trainer.accelerator.wait_for_everyone()  # until the main process has written the weights that are kept
    model_step: int | None = trainer.state.global_step
    if (kept := alarms.kept_weights()) is not None:
        model_step = sealed_step(kept)
        trainer.load_weights(kept)
    elif is_main and alarms.rolls_back:
        alarms.forget_best()
    trainer.save_model(str(folder.model))

    # 9. Evaluate the trained model.
    after = _evaluate("after", trainer, verifier, cme, prompts, folder) if evaluates else None

    # 10. Sum up. summary.json is written last: a run that has one is finished.
    summary: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - start, 3),
        "alarms": alarms.history(),
        "model_step": model_step,
        "before": summarize(before) if before else None,
        "after": summarize(after) if after else None,
        "difference": differences(before, after) if before and after else None,
        "decoding": trainer.decoding() if evaluates else None,
        "settings": settings,
        "environment": environment(),
    }
    if is_main:
        draw(folder.history(), summary["before"], summary["after"], folder.picture, summary["alarms"])
        folder.write_json("summary.json", summary)
        print(closing_words(summary, before, after, folder.path))
    return summary


def _evaluate(
    name: str, trainer: PackedGRPOTrainer, verifier: Verifier, cme: CMEConfig, prompts: Prompts, folder: RunFolder
) -> list[Answer]:
    """The policy's answers to held-out prompts, in each process to a share. A resume reads those "before" back."""
    if name == "before" and (stored := folder.read_answers(name)) is not None:
        return stored
    grpo: Any = trainer.args
    held_out: Any = prompts.held_out
    mine = range(grpo.process_index, min(cme.eval_prompts, len(held_out)), grpo.world_size)
    rows = [held_out[i] for i in mine]
    column = cme.verifier_prompt_column
    tokenizer: Any = trainer.processing_class
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with evaluating(model):
        answers = answer_all(
            model,
            tokenizer,
            verifier,
            rows,
            Sampling(
                samples=cme.eval_samples,
                max_new_tokens=int(grpo.max_completion_length or 512),
                decoding=trainer.decoding(),
                chat_template_kwargs=generator_kwargs(grpo),
            ),
            verifier_prompts=None if column is None else [row[column] for row in rows],
            judge=prompts.judge,
            progress=None if grpo.disable_tqdm or grpo.process_index > 0 else f"held out, {name}",
            autocast=trainer.accelerator.autocast(),
        )
    every: list[Answer] = gather_object([answer.of_question(mine[answer.question]) for answer in answers])
    if grpo.process_index == 0:
        folder.write_answers(name, every)
    return every
