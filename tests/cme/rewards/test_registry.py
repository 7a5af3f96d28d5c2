"""The rivals of CMEReward: each against its definition, with tiny models."""

import json
import math

import pytest
import tiny
import torch
from train_run import lines
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from cme.engine.attention import IMPLEMENTATION
from cme.errors import CMEError, ModelError
from cme.reward import CMEReward
from cme.rewards import (
    Combined,
    Length,
    Likelihood,
    LogRatio,
    MajorityVote,
    Policy,
    SelfCertainty,
    TokenEntropy,
    VerifierEntropy,
    WithoutQuestion,
    random_verifier,
)
from cme.rewards.registry import Parts, Term, build_reward, parse_reward
from cme.text.rendering import encode_prompt
from cme.train.run import main
from cme.verifier import Verifier

PROMPTS = ["Where is Paris?", "Where is Paris?", "Hi", "Hi"]
ANSWERS = ["In France.", "The capital of France is Paris.", "", "Hello"]
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def verifier():
    return Verifier.of(tiny.llama(1), tiny.tokenizer(chat=False))


def policy_of(model, packed=True):
    if packed:
        model.set_attn_implementation(IMPLEMENTATION)
    return Policy(model, tiny.tokenizer(), TEMPERATURE)


@pytest.fixture(scope="module")
def policy():
    return policy_of(tiny.llama(0))


def batch(policy, end=()):
    ids = [[*policy.tokenizer(a)["input_ids"], *(end if a else ())] for a in ANSWERS]
    return {"prompts": PROMPTS, "completions": ANSWERS, "completion_ids": ids}


@torch.no_grad()
def distributions(policy, batch):
    """log p [T, V] in float64 of each response's tokens, from plain forward passes."""
    for prompt, ids in zip(batch["prompts"], batch["completion_ids"], strict=True):
        before = encode_prompt(policy.tokenizer, prompt)
        logits = policy.model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double() / TEMPERATURE
        yield logits[: len(ids)].log_softmax(-1)


def cohere():
    return tiny.build(CohereConfig(**tiny.SMALL, logit_scale=0.3), CohereForCausalLM)


def with_bias():
    model = tiny.llama(3)
    head = torch.nn.Linear(64, tiny.VOCAB_SIZE)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


@pytest.mark.parametrize("build", [tiny.llama, cohere, with_bias])
@pytest.mark.parametrize("packed", [True, False])
def test_self_certainty_is_the_divergence_of_uniform_from_the_policy(build, packed):
    policy = policy_of(build(), packed)
    inputs = batch(policy)
    got = SelfCertainty(policy)(**inputs)
    for value, logprobs in zip(got, distributions(policy, inputs), strict=True):
        if not len(logprobs):
            assert value is None
            continue
        vocab = logprobs.shape[1]
        uniform = torch.full_like(logprobs, 1 / vocab)
        want = (uniform * (uniform.log() - logprobs)).sum(-1).mean()
        assert value == pytest.approx(float(want), abs=1e-4)


def test_capped_logits_have_no_self_certainty():
    model = tiny.build(Gemma2Config(**tiny.SMALL, final_logit_softcapping=5.0, head_dim=16), Gemma2ForCausalLM)
    policy = policy_of(model, packed=False)
    with pytest.raises(ModelError, match="these are capped"):
        SelfCertainty(policy)(**batch(policy))


def test_entropy_is_that_of_the_policy_at_its_temperature_and_lower_is_better(policy):
    inputs = batch(policy)
    got = TokenEntropy(policy)(**inputs)
    for value, logprobs in zip(got, distributions(policy, inputs), strict=True):
        want = float((logprobs.exp() * logprobs).sum(-1).mean()) if len(logprobs) else None
        assert value == (None if want is None else pytest.approx(want, abs=1e-4))


def test_the_policy_is_scored_as_it_is_now_and_left_as_it_was():
    model = tiny.llama(0)
    policy = policy_of(model)
    model.train()
    before = TokenEntropy(policy)(**batch(policy))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert TokenEntropy(policy)(**batch(policy))[0] > before[0] + 0.1
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])  # the second has no role in the tokenizer
def test_log_ratio_is_a_token_s_share_of_the_difference_without_the_end_of_the_turn(verifier, policy, end):
    inputs = batch(policy)
    got = LogRatio(verifier, policy)(**batch(policy, end=[policy.tokenizer.convert_tokens_to_ids(end)]))
    scores = verifier.score(PROMPTS, ANSWERS)
    for value, logprobs, ids, score in zip(
        got, distributions(policy, inputs), inputs["completion_ids"], scores, strict=True
    ):
        if not ids:
            assert value is None
            continue
        own = float(logprobs[range(len(ids)), ids].sum())
        assert value == pytest.approx((score.sum_logprob - own) / len(ids), abs=1e-4)


def test_a_vote_is_a_share_of_those_with_an_answer_to_the_same_prompt():
    prompts = ["a"] * 5 + ["b"] * 2
    answers = ["Paris.", "paris", "Rome", "", "PARIS!", "Rome", "Rome"]
    assert MajorityVote()(prompts, answers) == [0.75, 0.75, 0.25, None, 0.75, 1.0, 1.0]
    chat = [[{"role": "user", "content": p}] for p in prompts]
    assert MajorityVote()(chat, answers)[2] == 0.25


def test_shorter_is_better(policy):
    assert Length()(PROMPTS, ANSWERS, [[1, 2], [1, 2, 3], [], [4]]) == [-2.0, -3.0, 0.0, -1.0]


def test_entropy_of_the_verifier_is_negated(verifier):
    got = VerifierEntropy(verifier)(PROMPTS, ANSWERS)
    want = [s.mean_entropy for s in verifier.score(PROMPTS, ANSWERS, stats=("entropy",))]
    assert got == [None if w is None else -w for w in want]


def test_what_is_likely_without_the_question_is_subtracted(verifier):
    got = WithoutQuestion(verifier, "question", 0.5)(["x"], ["In France."], question=["Where is Paris?"])
    with_it, without = verifier.score(["Where is Paris?", ""], ["In France."] * 2)
    assert got == [pytest.approx(with_it.mean_logprob - 0.5 * without.mean_logprob, abs=1e-5)]
    assert abs(without.mean_logprob - with_it.mean_logprob) > 0.01


def test_random_weights_keep_the_tokenizer_and_the_template_and_nothing_else(verifier):
    torch.manual_seed(9)
    want = torch.rand(1)
    torch.manual_seed(9)
    one, same, other = (random_verifier(verifier, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), want)
    scores = [v.score(PROMPTS[:1], ANSWERS[:1])[0] for v in (verifier, one, same, other)]
    assert len({s.token_ids for s in scores}) == 1
    assert scores[1].mean_logprob == scores[2].mean_logprob
    assert len({s.mean_logprob for s in scores}) == 3


def test_a_combination_needs_all_of_its_parts(verifier):
    first, second = Likelihood(verifier), VerifierEntropy(verifier)
    a, b = first(PROMPTS, ANSWERS), second(PROMPTS, ANSWERS)
    got = Combined([first, second], min, "least")(PROMPTS, ANSWERS)
    assert got == [None if x is None else min(x, y) for x, y in zip(a, b, strict=True)]


def parts(verifier, policy, load=lambda name: None):
    return Parts(CMEReward(verifier), policy, load)


def test_rewards_by_name(verifier, policy):
    inputs = batch(policy)
    likelihood, lengths = Likelihood(verifier)(PROMPTS, ANSWERS), [-len(i) for i in inputs["completion_ids"]]
    mixed = build_reward("2*cme+0.5*length", parts(verifier, policy))(**inputs)
    assert mixed == [
        None if x is None else pytest.approx(2 * x + 0.5 * n) for x, n in zip(likelihood, lengths, strict=True)
    ]
    assert build_reward("cme", parts(verifier, policy)).__name__ == "cme"
    loaded = []
    other = random_verifier(verifier)
    least = build_reward("cme-min:one,two", parts(verifier, policy, lambda n: loaded.append(n) or other))
    assert loaded == ["one", "two"]
    bits = [v.score(PROMPTS, ANSWERS)[0].bits_per_byte for v in (verifier, other)]
    assert bits[0] != bits[1]
    assert least(**inputs)[0] == -max(bits)
    assert parse_reward("-1*pmi:0.3+entropy") == [Term(-1.0, "pmi", "0.3"), Term(1.0, "entropy", "")]


def test_a_rival_is_logged_beside_cme(verifier, policy):
    metrics, columns = {}, {}
    build_reward("length", parts(verifier, policy))(
        **batch(policy), log_metric=metrics.__setitem__, log_extra=columns.__setitem__
    )
    known = [v for v in Likelihood(verifier)(PROMPTS, ANSWERS) if v is not None]
    assert metrics["rewards/cme/mean"] == pytest.approx(sum(known) / len(known))
    assert "cme/prompt_copy_rate" in metrics
    assert "echo_rate" in columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght", "'lenght' is not a reward; there are cme, cme-dense, length"),
        ("cme+", "'cme\\+' is not a reward"),
        ("cme-min", "name at least one verifier beside --verifier"),
        ("length+cme-mean:,", "name at least one verifier beside --verifier"),
        ("pmi:high", "could not convert string to float: 'high'"),
        ("pmi:nan", "must be a finite number"),
        ("cme+random-verifier:1.5", "invalid literal for int"),
        ("cme:google/gemma-3-1b-it", "--reward cme:google/gemma-3-1b-it: it takes no options"),
        ("cme+0.5*length:5", "--reward length:5: it takes no options"),
    ],
)
def test_what_is_no_reward_is_named_before_models_are_loaded(text, message):
    with pytest.raises(CMEError, match=message):
        parse_reward(text)


def test_the_trainer_calls_them_with_the_policy_of_the_moment(options, tmp_path):
    args = [*options, "--max_steps", "2", "--eval_prompts", "0", "--reward", "log-ratio+0.1*self-certainty"]
    assert main(args) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["settings"]["reward"] == args[-1]
    for record in lines(tmp_path / "run"):
        assert {"rewards/mixture/mean", "rewards/cme/mean", "cme/echo_rate"} <= record.keys()
        assert math.isfinite(record["reward"])
        assert record["reward"] != record["rewards/cme/mean"]
