"""The policy's packed passes against TRL's own: log-probabilities, gradients, a training step, sampling."""

import contextlib
import copy
import json
import random

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from cme.engine.attention import IMPLEMENTATION
from cme.engine.plan import Bucket
from cme.errors import CMEError
from cme.evaluation.generate import Sampling, generate
from cme.train.prefill import add_packed_forward, add_shared_prefill
from cme.train.trainer import PackedGRPOTrainer, regroup
from cme.verifier import Verifier

PAD = 3
PROMPT, COMPLETION = 9, 6
IDS = {"eos_token_id": 2, "pad_token_id": PAD}
FAMILIES = {
    "llama": (LlamaConfig(**tiny.SMALL, **IDS), LlamaForCausalLM),
    "qwen3-tied": (Qwen3Config(**tiny.SMALL, **IDS, head_dim=16, tie_word_embeddings=True), Qwen3ForCausalLM),
    "gemma2": (
        Gemma2Config(
            **tiny.SMALL,
            **IDS,
            head_dim=16,
            sliding_window=6,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
            attn_implementation="eager",  # SDPA drops the softcap
        ),
        Gemma2ForCausalLM,
    ),
}
PROMPTS = [
    "What is the capital of France?",
    "The capital of France is",
    "Question: What is Paris? Answer:",
    "Paris?",
]


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 17 - len(ids)) for ids in completion_ids]


def make_trainer(cls, model, folder, peft_config=None, **options):
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": COMPLETION,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "seed": 5,
    }
    return cls(
        model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        processing_class=tiny.tokenizer(chat=False),
        peft_config=peft_config,
    )


def make_pair(model, folder, **options):
    """TRL's trainer and ours, on copies of one model, with the same adapter if there is one."""
    theirs = make_trainer(GRPOTrainer, copy.deepcopy(model), folder / "theirs", **options)
    ours = make_trainer(PackedGRPOTrainer, copy.deepcopy(model), folder / "ours", **options)
    ours.model.load_state_dict(theirs.model.state_dict())
    return theirs, ours


def make_batch(prompts=(5, 9, 5, 1, 9, 5, 2), equal=((0, 2, 5), (1, 4)), completions=(6, 3, 1, 4, 0, 6, 2)):
    """[B, PROMPT + COMPLETION] ids and mask: prompts of these lengths on the left, rows in `equal` with one prompt
    each, completions of these lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, tiny.VOCAB_SIZE, (len(prompts), PROMPT + COMPLETION), generator=generator)
    for first, *others in equal:
        ids[others, :PROMPT] = ids[first, :PROMPT]
    column = torch.arange(PROMPT + COMPLETION)
    start = PROMPT - torch.tensor(prompts).unsqueeze(1)
    stop = PROMPT + torch.tensor(completions).unsqueeze(1)
    mask = ((column >= start) & (column < stop)).long()
    return ids.masked_fill(mask == 0, PAD), mask


def evaluate(trainer, batch, batch_size=None):
    return trainer._get_per_token_logps_and_entropies(
        trainer.model, *batch, COMPLETION, batch_size, compute_entropy=True
    )[:2]


def evaluate_reference(trainer, batch):
    return trainer._get_per_token_logps_and_entropies(trainer.ref_model, *batch, COMPLETION)[:1]


def gradients(trainer, batch):
    """Of a loss in which each token's log-probability and entropy has a weight of its own."""
    trainer.model.zero_grad()
    logprob, entropy = evaluate(trainer, batch)
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, *logprob.shape, generator=generator)
    (a * logprob + b * entropy).sum().backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_values(theirs, ours):
    for a, b in zip(theirs, ours, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, atol=1e-4, rtol=0)


def assert_same_gradients(theirs, ours):
    assert theirs.keys() == ours.keys()
    total = torch.stack([g.norm() for g in theirs.values() if g is not None]).norm()
    assert total > 0.1
    for name, a in theirs.items():
        if a is None:  # the unused position of a padding token, say
            assert ours[name] is None
            continue
        difference = (ours[name] - a).norm()
        assert difference <= 1e-4 * a.norm() + 1e-6 * total, f"{name}: {difference / a.norm():.2g}"


@contextlib.contextmanager
def encoded_tokens(model):
    """List of how many tokens each forward pass of `model` embeds."""
    counts = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: counts.append(args[0].numel())
    )
    try:
        yield counts
    finally:
        hook.remove()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_entropies_and_gradients_equal_trls(family, temperature, tmp_path):
    theirs, ours = make_pair(tiny.build(*FAMILIES[family]), tmp_path, temperature=temperature)
    assert ours.packed
    batch = make_batch()
    expected = evaluate(theirs, batch)
    assert expected[0].std() > 1
    assert_same_values(expected, evaluate(ours, batch))
    assert_same_gradients(gradients(theirs, batch), gradients(ours, batch))


def test_learned_positions_do_not_count_the_padding_and_trls_do(tmp_path):
    config = GPT2Config(
        **IDS, vocab_size=tiny.VOCAB_SIZE, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3
    )
    model = tiny.build(config, GPT2LMHeadModel)
    theirs, ours = make_pair(model, tmp_path)
    assert ours.packed
    ids, mask = make_batch()
    expected = torch.zeros(len(ids), COMPLETION)
    for row, kept, values in zip(ids, mask.bool(), expected, strict=True):
        tokens, length = row[kept], int(kept[PROMPT:].sum())
        with torch.no_grad():
            logprob = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        values[:length] = logprob.gather(1, tokens[1:, None])[len(tokens) - 1 - length :, 0]
    assert_same_values([expected], evaluate(ours, (ids, mask))[:1])
    off = (evaluate(theirs, (ids, mask))[0] - expected).abs()[mask[:, PROMPT:] == 1]
    assert off.mean() > 1  # nats per token


def test_each_prompt_is_encoded_once(tmp_path):
    trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path)
    with encoded_tokens(trainer.model) as counts:
        evaluate(trainer, make_batch())
    # Prompts without their last tokens, then the completions; row 4's completion is empty
    assert counts == [(5 - 1) + (9 - 1) + (1 - 1) + (2 - 1) + (6 + 3 + 1 + 4 + 6 + 2)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_chunks_give_the_same_values_in_the_same_order(batch_size, tmp_path):
    trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path)
    batch = make_batch()
    with encoded_tokens(trainer.model) as counts:
        chunked = evaluate(trainer, batch, batch_size=batch_size)
    assert len(counts) == -(-7 // batch_size)
    assert_same_values(evaluate(trainer, batch), chunked)


def test_entropies_are_left_out_unless_asked_for(tmp_path):
    trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path)
    logprob, entropy, aux_loss = trainer._get_per_token_logps_and_entropies(
        trainer.model, *make_batch(), COMPLETION
    )
    assert entropy is None
    assert aux_loss is None
    torch.testing.assert_close(logprob, evaluate(trainer, make_batch())[0])


def test_masked_tokens_are_zero_whatever_their_ids(tmp_path):
    trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path)
    ids, mask = make_batch()
    values = evaluate(trainer, (ids, mask))
    for value in values:
        assert (value[mask[:, PROMPT:] == 0] == 0).all()
        assert (value[mask[:, PROMPT:] == 1] != 0).all()
    assert_same_values(values, evaluate(trainer, (ids.masked_fill(mask == 0, 77), mask)))


def test_a_batch_without_tokens_is_a_differentiable_zero_in_one_forward_pass(tmp_path):
    trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path)
    batch = make_batch(completions=(0,) * 7)
    with encoded_tokens(trainer.model) as counts:
        grads = gradients(trainer, batch)
    assert len(counts) == 1
    assert all(g is not None and not g.any() for g in grads.values())
    for value in evaluate(trainer, batch):
        assert value.shape == (7, COMPLETION)
        assert not value.any()


def test_gradient_checkpointing_recomputes_the_same_attention(tmp_path):
    theirs, ours = make_pair(tiny.llama(), tmp_path)
    ours.model.train()
    ours.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = ours.model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    batch = make_batch()
    grads = gradients(ours, batch)
    assert len(calls) == 2
    assert_same_gradients(gradients(theirs, batch), grads)


LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def test_lora_adapters_get_the_same_gradients(tmp_path):
    lora = LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs, ours = make_pair(tiny.llama(), tmp_path, peft_config=lora)
    assert ours.packed
    batch = make_batch()
    assert_same_values(evaluate(theirs, batch), evaluate(ours, batch))
    grads = gradients(ours, batch)
    assert len(grads) == 2 * 3 * 2
    assert_same_gradients(gradients(theirs, batch), grads)
    with ours.model.disable_adapter(), theirs.model.disable_adapter():
        reference = evaluate(theirs, batch)
        assert_same_values(reference, evaluate(ours, batch))
    assert (reference[0] - evaluate(ours, batch)[0]).abs().max() > 0.1


def test_the_reference_model_is_packed_too(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "start")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "start")
    theirs, ours = make_pair(model, tmp_path, beta=0.1)
    for trainer in theirs, ours:
        with torch.no_grad():
            trainer.model.model.norm.weight.mul_(1.3)  # the policy has moved away
    batch = make_batch()
    with encoded_tokens(ours.ref_model) as counts:
        reference = evaluate_reference(ours, batch)
    assert counts[0] < batch[1].sum()
    assert_same_values(evaluate_reference(theirs, batch), reference)
    assert (reference[0] - evaluate(ours, batch)[0]).abs().max() > 0.1


def train(cls, model, folder, max_steps=1, **options):
    trainer = make_trainer(cls, copy.deepcopy(model), folder, max_steps=max_steps, **options)
    trainer.train()
    return trainer, trainer.state.log_history[:max_steps]


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 16},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2, "loss_type": "grpo", "scale_rewards": "batch"},
        {"gradient_accumulation_steps": 2, "temperature": 0.6, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 16, "mask_truncated_completions": True, "entropy_coef": 0.1},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_a_training_step_is_trls(options, tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[4:60].mean(0)  # some completions end, some are cut off
    # Adam's first step is the sign of the gradient, which rounding decides where there is next to none
    options = {**options, "optim": "sgd", "learning_rate": 1.0}
    theirs, (expected,) = train(GRPOTrainer, model, tmp_path / "theirs", **options)
    ours, (logged,) = train(PackedGRPOTrainer, model, tmp_path / "ours", **options)
    assert expected["grad_norm"] > 0.01
    for key in ("reward", "completions/mean_length", "completions/clipped_ratio"):
        assert logged[key] == expected[key]
    assert logged["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert logged["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    if "gradient_accumulation_steps" not in options:  # TRL averages micro-batches' means, and ours hold other rows
        assert logged["entropy"] == pytest.approx(expected["entropy"], rel=1e-4)
    for (name, a), b in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_later_steps_with_a_reference_and_old_log_probabilities_are_trls(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "start")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "start")
    options = {"beta": 0.5, "num_iterations": 2, "per_device_train_batch_size": 16, "max_steps": 3}
    _, expected = train(GRPOTrainer, model, tmp_path / "theirs", **options)
    _, logged = train(PackedGRPOTrainer, model, tmp_path / "ours", **options)
    assert expected[1]["clip_ratio/region_mean"] > 0
    assert expected[2]["kl"] > 1e-4
    for a, b in zip(expected, logged, strict=True):
        assert a.get("reward") == b.get("reward")  # None where the samples are used again
        for key in ("clip_ratio/region_mean", "kl", "entropy", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key


def test_a_beta_of_almost_nothing_logs_kl_and_changes_nothing(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "start")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "start")
    options = {"per_device_train_batch_size": 16, "max_steps": 3, "optim": "sgd", "learning_rate": 1.0}
    plain, _ = train(PackedGRPOTrainer, model, tmp_path / "plain", **options)
    watched, logged = train(PackedGRPOTrainer, model, tmp_path / "watched", beta=1e-9, **options)
    assert logged[2]["kl"] > 1e-4
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0)


def test_micro_batches_hold_whole_groups_and_prompts_are_sampled_together(tmp_path):
    trainer = make_trainer(
        PackedGRPOTrainer, tiny.llama(), tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=4
    )
    trainer.model.train()
    rows = [{"prompt": p} for p in PROMPTS for _ in range(4)]
    batches = []
    with encoded_tokens(trainer.model) as counts:
        for _ in range(4):
            batches.append(trainer._prepare_inputs(rows))
            trainer._step += 1
    assert counts[0] == 4 * (batches[0]["prompt_ids"].shape[1] - 1)  # sampling encodes each prompt once too
    assert all(len(batch["prompt_ids"].unique(dim=0)) == 1 for batch in batches)
    assert len(torch.cat([batch["prompt_ids"] for batch in batches]).unique(dim=0)) == 4


SAMPLING = {
    "trl's options": {"temperature": 0.8, "top_p": 0.95, "top_k": 90, "min_p": 0.02, "repetition_penalty": 1.3},
    "options of transformers": {"generation_kwargs": {"typical_p": 0.9, "top_k": 60, "no_repeat_ngram_size": 1}},
    "none": {},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize(
    "own", [{}, {"min_p": 0.05, "suppress_tokens": [*range(150, 320)], "repetition_penalty": 9.0}]
)
def test_generate_can_sample_as_training_does(own, options, tmp_path):
    model = tiny.llama()
    model.generation_config.update(eos_token_id=list(range(4, 44)), **own)
    trainer = make_trainer(PackedGRPOTrainer, model, tmp_path, max_completion_length=12, **options)
    trainer.model.train()
    prompts = [PROMPTS[0]] * 8 + [PROMPTS[1]] * 8
    torch.manual_seed(3)
    drawn = trainer._generate_and_score_completions([{"prompt": p} for p in prompts])
    sampling = Sampling(samples=1, max_new_tokens=99, decoding=trainer.decoding())
    torch.manual_seed(3)
    responses = generate(model.eval(), tiny.tokenizer(), prompts, sampling)
    lengths = drawn["completion_mask"].sum(1).tolist()
    assert [r.length for r in responses] == lengths
    assert min(lengths) < 12
    assert [r.text for r in responses] == [
        tiny.tokenizer().decode(ids[:n], skip_special_tokens=True)
        for ids, n in zip(drawn["completion_ids"].tolist(), lengths, strict=True)
    ]
    assert len({r.text for r in responses}) > 10


def test_decoding_records_everything_that_bears_on_samples(tmp_path):
    model = tiny.llama()
    model.generation_config.update(typical_p=0.9, temperature=0.3)
    options = {"min_p": 0.1, "generation_kwargs": {"top_k": 5}}
    trainer = make_trainer(PackedGRPOTrainer, model, tmp_path, **options)
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0}
    given |= {"do_sample": True, "max_new_tokens": COMPLETION}
    assert trainer.decoding().items() >= {**given, "typical_p": 0.9}.items()
    trainer.use_vllm = True  # to which the model's generation config is nothing
    assert trainer.decoding() == given
    trainer.args.generation_kwargs = {"presence_penalty": 1.0}
    with pytest.raises(CMEError, match=r"transformers has no presence_penalty. .*--eval-prompts 0"):
        trainer.decoding()


def test_a_misspelt_option_of_transformers_is_named(tmp_path):
    trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path, generation_kwargs={"no_repeat_ngram": 2})
    with pytest.raises(CMEError, match="transformers has no no_repeat_ngram"):
        trainer.decoding()


class Rows(TrainerCallback):
    """The completions in each optimizer step and in each of its micro-batches."""

    def __init__(self, trainer):
        self.steps = [[]]
        compute = trainer._compute_loss

        def recorded(model, inputs):
            self.steps[-1].append([tuple(ids) for ids in inputs["completion_ids"].tolist()])
            return compute(model, inputs)

        trainer._compute_loss = recorded
        trainer.add_callback(self)

    def on_step_end(self, *args, **kwargs):
        self.steps.append([])


STEPS = {
    "a step has half a generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "a step has part of two generations": {"steps_per_generation": 2, "gradient_accumulation_steps": 3},
    "a step has two generations": {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
    "a step has one generation": {"gradient_accumulation_steps": 4},
    "a step is a micro-batch": {"steps_per_generation": 4},
    "rows are used twice": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
    "a step has part of two uses": {
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 3,
        "num_iterations": 2,
    },
    "a generation batch": {"generation_batch_size": 16, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_an_optimizer_step_has_the_rows_that_it_has_with_trl(options, tmp_path):
    # Without learning, so that a difference in rounding can't become another sample
    options = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "max_completion_length": 2,
        "max_steps": 4,
        **options,
    }
    seen = []
    for cls in GRPOTrainer, PackedGRPOTrainer:
        trainer = make_trainer(cls, tiny.llama(), tmp_path / cls.__name__, **options)
        rows = Rows(trainer)
        trainer.train()
        seen.append([sorted(row for batch in step for row in batch) for step in rows.steps])
    assert len(seen[0]) == 5
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.5}, {"entropy_coef": 0.5}],
    ids=lambda options: next(iter(options)),
)
def test_micro_batches_have_trls_rows_where_a_loss_depends_on_it(options, tmp_path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, **options}
    options |= {"optim": "sgd", "learning_rate": 1.0}
    model = tiny.llama()
    model.generation_config.eos_token_id = list(range(4, 84))  # completions of several lengths
    theirs, _ = train(GRPOTrainer, model, tmp_path / "theirs", **options)
    ours, _ = train(PackedGRPOTrainer, model, tmp_path / "ours", **options)
    for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0)


def test_regroup_keeps_rows_and_brings_groups_together():
    shuffled = random.Random(0)
    rows = [(group, completion) for group in range(5) for completion in range(4)]
    shuffled.shuffle(rows)
    groups, completions = (torch.tensor(column) for column in zip(*rows, strict=True))
    micro_batches = [
        {
            "prompt_ids": torch.stack([g, g % 2], dim=1),
            "completion_ids": (10 * g + c).unsqueeze(1),
            "advantages": 10.0 * g + c,
            "num_items_in_batch": torch.tensor(20.0),
            "images": None,
        }
        for g, c in zip(groups.split([8, 8, 4]), completions.split([8, 8, 4]), strict=True)
    ]
    out = regroup(micro_batches)
    assert [len(batch["advantages"]) for batch in out] == [8, 8, 4]
    prompts = torch.cat([batch["prompt_ids"] for batch in out])
    assert (prompts[:, 1] == prompts[:, 0] % 2).all()
    order_of_first_appearance = list(dict.fromkeys(groups.tolist()))
    assert prompts[:, 0].tolist() == [g for g in order_of_first_appearance for _ in range(4)]
    ids = torch.cat([batch["completion_ids"] for batch in out]).squeeze(1)
    assert (ids // 10).tolist() == prompts[:, 0].tolist()
    assert sorted(ids.tolist()) == sorted(10 * g + c for g, c in rows)
    assert torch.cat([batch["advantages"] for batch in out]).tolist() == ids.tolist()
    assert all(batch["num_items_in_batch"] == 20 and batch["images"] is None for batch in out)


def build_moe():
    config = Qwen3MoeConfig(
        **tiny.SMALL, **IDS, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    config.output_router_logits = True
    return tiny.build(config, Qwen3MoeForCausalLM)


class OtherHead(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden).square()


def build_other_head():
    model = tiny.llama()
    model.lm_head.__class__ = OtherHead
    return model


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (tiny.llama, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
        (build_other_head, {}, "leave the head out"),
        (
            tiny.llama,
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "prompt-learning",
        ),
        (build_moe, {}, "router loss"),
    ],
    ids=["fp32-head", "other-head", "prompt-tuning", "router-loss"],
)
def test_what_cannot_be_packed_takes_trls_path_with_a_warning(build, options, reason, tmp_path):
    model = build()
    theirs = make_trainer(GRPOTrainer, copy.deepcopy(model), tmp_path / "theirs", **options)
    with pytest.warns(UserWarning, match=reason):
        ours = make_trainer(PackedGRPOTrainer, model, tmp_path / "ours", **options)
    assert not ours.packed
    ours.model.load_state_dict(theirs.model.state_dict())
    batch = make_batch()
    assert_same_values(evaluate(theirs, batch), evaluate(ours, batch))


def test_an_adapter_on_the_head_is_refused_by_trl(tmp_path):
    lora = LoraConfig(**LORA, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path, peft_config=lora)


def test_an_adapter_that_was_loaded_frozen_is_refused(tmp_path):
    get_peft_model(tiny.llama(), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    with pytest.raises(CMEError, match=r"no parameter of the model takes a gradient.*is_trainable=True"):
        make_trainer(PackedGRPOTrainer, frozen, tmp_path)


def test_a_model_that_fails_the_self_check_takes_trls_path(tmp_path, monkeypatch):
    monkeypatch.setattr("cme.train.trainer.why_not_packed", lambda model, gradients: "it differs by 5")
    with pytest.warns(UserWarning, match="it differs by 5"):
        trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path)
    assert not trainer.packed


def test_a_model_that_is_not_packed_keeps_the_attention_that_it_had(tmp_path):
    tiny.build(DeepseekV4Config(**tiny.DEEPSEEK_V4, **IDS), DeepseekV4ForCausalLM).save_pretrained(
        tmp_path / "start"
    )
    model = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "start")
    theirs = make_trainer(GRPOTrainer, copy.deepcopy(model), tmp_path / "theirs", beta=0.1)
    with pytest.warns(UserWarning, match="TRL.s own log-probabilities are used"):
        ours = make_trainer(PackedGRPOTrainer, model, tmp_path / "ours", beta=0.1)
    for name in ("model", "ref_model"):
        expected = getattr(theirs, name).config._attn_implementation
        assert getattr(ours, name).config._attn_implementation == expected
    batch = make_batch()
    assert_same_values(evaluate(theirs, batch), evaluate(ours, batch))
    assert_same_values(evaluate_reference(theirs, batch), evaluate_reference(ours, batch))


def test_attention_that_is_wrong_only_with_gradients_fails_the_self_check(tmp_path, monkeypatch):
    def sees_all(bucket, window):
        return None if bucket.causal else torch.ones_like(right(bucket, window))

    right = Bucket.mask
    monkeypatch.setattr(Bucket, "mask", sees_all)
    model = tiny.llama()
    assert Verifier.of(copy.deepcopy(model), tiny.tokenizer()).packed
    with pytest.warns(UserWarning, match="with gradients on, a token's log-probability differs"):
        trainer = make_trainer(PackedGRPOTrainer, model, tmp_path)
    assert not trainer.packed


def test_a_resume_loads_its_weights_once(tmp_path, monkeypatch):
    first, _ = train(PackedGRPOTrainer, tiny.llama(), tmp_path, save_strategy="steps", save_steps=1)
    saved = tmp_path / "checkpoint-1"
    tiny.tokenizer(chat=False).save_pretrained(saved)
    other = make_trainer(PackedGRPOTrainer, tiny.llama(1), tmp_path, max_steps=1)
    loads = []
    load = type(other.model).load_state_dict
    monkeypatch.setattr(type(other.model), "load_state_dict", lambda *args: loads.append(args) or load(*args))
    other.train(str(saved))
    assert len(loads) == 1
    for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=0, rtol=0)


def test_the_saved_model_does_not_name_our_attention(tmp_path):
    trainer = make_trainer(PackedGRPOTrainer, tiny.llama(), tmp_path)
    trainer.save_model(tmp_path / "saved")
    assert trainer.model.config._attn_implementation == IMPLEMENTATION
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["hidden_size"] == 64
    assert not any(IMPLEMENTATION in f.read_text() for f in (tmp_path / "saved").glob("*.json"))
    assert LlamaForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation != IMPLEMENTATION


def test_the_forward_without_a_batch_is_the_original():
    model = tiny.llama()
    ids, mask = make_batch()
    expected = model(input_ids=ids, attention_mask=mask, labels=ids)
    add_packed_forward(model)
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert torch.equal(out.logits, expected.logits)
    assert out.loss == expected.loss


def sample(model, ids, mask, **options):
    torch.manual_seed(7)
    config = GenerationConfig(max_new_tokens=12, pad_token_id=PAD, eos_token_id=2, **options)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}


@pytest.mark.parametrize("options", [SAMPLED, {"do_sample": False}], ids=["sampled", "greedy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefill_draws_the_same_tokens(family, options):
    model = tiny.build(*FAMILIES[family])
    ids, mask = (x[:, :PROMPT] for x in make_batch())
    expected = sample(model, ids, mask, **options)
    assert len(expected.unique(dim=0)) == (7 if options["do_sample"] else 4)
    add_shared_prefill(model)
    with encoded_tokens(model) as counts:
        drawn = sample(model, ids, mask, **options)
    assert counts[:2] == [4 * (PROMPT - 1), 7]  # four distinct prompts, then each row's last token
    assert torch.equal(drawn, expected)


def test_sampling_without_duplicates_is_left_alone():
    model = tiny.llama()
    ids, mask = (x[:, :PROMPT] for x in make_batch(equal=()))
    expected = sample(model, ids, mask, **SAMPLED)
    add_shared_prefill(model)
    with encoded_tokens(model) as counts:
        drawn = sample(model, ids, mask, **SAMPLED)
    assert counts[0] == 7 * PROMPT
    assert torch.equal(drawn, expected)


def test_rows_that_differ_only_in_their_mask_are_not_shared():
    model = tiny.llama()
    ids = torch.full((4, 6), 50)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).repeat(2, 1)
    ids[:, 1] = 70
    expected = sample(model, ids, mask, do_sample=False)
    assert not torch.equal(expected[0], expected[1])
    add_shared_prefill(model)
    with encoded_tokens(model) as counts:
        drawn = sample(model, ids, mask, do_sample=False)
    assert counts[0] == 2 * 5
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_other_ways_to_generate_are_left_alone(where, options):
    model = tiny.llama()
    ids, mask = (x[:, :PROMPT] for x in make_batch())

    def draw():
        if where == "config":
            return sample(model, ids, mask, **options)
        torch.manual_seed(7)
        if where == "argument":
            return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, **options)
        model.generation_config.update(**options)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12)

    expected = draw()
    add_shared_prefill(model)
    assert torch.equal(draw(), expected)
