"""Rewards beside CME: each against its definition, with tiny models, and how often they ask the models."""

import json

import pytest
import tiny
import torch
from train_run import lines
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from cme.engine import forward
from cme.engine.attention import IMPLEMENTATION
from cme.errors import CMEError, ModelError
from cme.policy import Policy
from cme.reward import CMEReward
from cme.rewards.build import build_rewards
from cme.text.rendering import encode_prompt
from cme.train.__main__ import main
from cme.verifier import Verifier, random_verifier

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


def rewards_of(names, verifier, inputs, policy=None, load=Verifier.from_pretrained, prompt_column=None):
    """Values by name of what `--reward` calls `names`."""
    functions = build_rewards(names.split(), CMEReward(verifier, prompt_column=prompt_column), policy, load)
    return {function.__name__: function(**inputs) for function in functions}


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
def test_self_certainty_is_the_divergence_of_uniform_from_the_policy(verifier, build, packed):
    policy = policy_of(build(), packed)
    inputs = batch(policy)
    got = rewards_of("self-certainty", verifier, inputs, policy)["self_certainty"]
    for value, logprobs in zip(got, distributions(policy, inputs), strict=True):
        if not len(logprobs):
            assert value is None
            continue
        vocab = logprobs.shape[1]
        uniform = torch.full_like(logprobs, 1 / vocab)
        want = (uniform * (uniform.log() - logprobs)).sum(-1).mean()
        assert value == pytest.approx(float(want), abs=1e-4)


def test_capped_logits_have_no_self_certainty(verifier):
    model = tiny.build(Gemma2Config(**tiny.SMALL, final_logit_softcapping=5.0, head_dim=16), Gemma2ForCausalLM)
    policy = policy_of(model, packed=False)
    with pytest.raises(ModelError, match="this model caps them"):
        rewards_of("self-certainty", verifier, batch(policy), policy)


def test_entropy_is_that_of_the_policy_at_its_temperature_and_lower_is_better(verifier, policy):
    inputs = batch(policy)
    got = rewards_of("entropy", verifier, inputs, policy)["entropy"]
    for value, logprobs in zip(got, distributions(policy, inputs), strict=True):
        want = float((logprobs.exp() * logprobs).sum(-1).mean()) if len(logprobs) else None
        assert value == (None if want is None else pytest.approx(want, abs=1e-4))


def test_the_policy_is_scored_as_it_is_now_and_left_as_it_was(verifier):
    model = tiny.llama(0)
    policy = policy_of(model)
    model.train()
    (reward,) = build_rewards(["entropy"], CMEReward(verifier), policy)
    inputs = batch(policy)
    before = reward(**inputs)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert reward(**inputs)[0] > before[0] + 0.1
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_the_policy_keeps_of_a_pass_can_be_trained_with(verifier):
    kept = []
    policy = policy_of(tiny.llama(0))
    policy.model.model.embed_tokens.register_forward_hook(lambda module, args, output: kept.append(output))
    rewards_of("self-certainty", verifier, batch(policy), policy)
    assert kept
    assert not any(output.is_inference() or output.requires_grad for output in kept)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])  # the second has no role in the tokenizer
def test_log_ratio_is_a_token_s_share_of_the_difference_without_the_end_of_the_turn(verifier, policy, end):
    inputs = batch(policy)
    ended = batch(policy, end=[policy.tokenizer.convert_tokens_to_ids(end)])
    got = rewards_of("log-ratio", verifier, ended, policy)["log_ratio"]
    scores = verifier.score(PROMPTS, ANSWERS)
    for value, logprobs, ids, score in zip(
        got, distributions(policy, inputs), inputs["completion_ids"], scores, strict=True
    ):
        if not ids:
            assert value is None
            continue
        own = float(logprobs[range(len(ids)), ids].sum())
        assert value == pytest.approx((score.sum_logprob - own) / len(ids), abs=1e-4)


def test_a_vote_is_a_share_of_those_with_an_answer_to_the_same_prompt(verifier):
    def votes(prompts, answers):
        return rewards_of("majority", verifier, {"prompts": prompts, "completions": answers})["majority"]

    prompts = ["a"] * 5 + ["b"] * 2
    answers = ["Paris.", "paris", "Rome", "", "PARIS!", "Rome", "Rome"]
    assert votes(prompts, answers) == [0.75, 0.75, 0.25, None, 0.75, 1.0, 1.0]
    chat = [[{"role": "user", "content": p}] for p in prompts]
    assert votes(chat, answers)[2] == 0.25


def test_shorter_is_better(verifier):
    inputs = {"prompts": PROMPTS, "completions": ANSWERS, "completion_ids": [[1, 2], [1, 2, 3], [], [4]]}
    assert rewards_of("length", verifier, inputs) == {"length": [-2.0, -3.0, 0.0, -1.0]}


def test_entropy_of_the_verifier_is_negated(verifier):
    inputs = {"prompts": PROMPTS, "completions": ANSWERS}
    got = rewards_of("verifier-entropy", verifier, inputs)["verifier_entropy"]
    want = [s.mean_entropy for s in verifier.score(PROMPTS, ANSWERS, stats=("entropy",))]
    assert got == [None if w is None else -w for w in want]


def test_what_is_likely_without_the_question_is_subtracted(verifier):
    inputs = {"prompts": ["x"], "completions": ["In France."], "question": ["Where is Paris?"]}
    got = rewards_of("pmi:0.5", verifier, inputs, prompt_column="question")["pmi"]
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


def test_what_one_reward_cannot_score_has_none_at_all(verifier, policy):
    got = rewards_of("cme length", verifier, batch(policy))
    means = [score.mean_logprob for score in verifier.score(PROMPTS, ANSWERS)]
    assert means[2] is None
    assert got["cme"] == [None if x is None else pytest.approx(x, abs=1e-5) for x in means]
    lengths = [-len(ids) for ids in batch(policy)["completion_ids"]]
    assert got["length"] == [None if x is None else n for x, n in zip(means, lengths, strict=True)]


def test_of_several_verifiers_the_least_sure_counts_or_their_mean(verifier):
    loaded = []
    others = {"one": random_verifier(verifier, 5), "two": random_verifier(verifier, 6)}
    inputs = {"prompts": PROMPTS[:1], "completions": ANSWERS[:1]}
    got = rewards_of(
        "cme-min:one,two cme-mean:two", verifier, inputs, load=lambda n: loaded.append(n) or others[n]
    )
    assert loaded == ["one", "two"]
    bits = [v.score(PROMPTS, ANSWERS)[0].bits_per_byte for v in (verifier, *others.values())]
    assert len(set(bits)) == 3
    assert got["cme_min"] == [pytest.approx(-max(bits))]
    assert got["cme_mean"] == [pytest.approx(-(bits[0] + bits[2]) / 2)]


def test_a_reward_of_the_policy_needs_it(verifier):
    with pytest.raises(CMEError, match="'entropy' scores the model in training: give build_rewards its Policy"):
        build_rewards(["length", "entropy"], CMEReward(verifier))


@pytest.mark.parametrize("names", ["length", "length entropy"])
def test_cme_is_logged_beside_other_rewards(verifier, policy, names):
    metrics, columns = {}, {}
    inputs = batch(policy) | {"log_metric": metrics.__setitem__, "log_extra": columns.__setitem__}
    rewards_of(names, verifier, inputs, policy)
    known = [s.mean_logprob for s in verifier.score(PROMPTS, ANSWERS) if s.mean_logprob is not None]
    assert metrics["rewards/cme/mean"] == pytest.approx(sum(known) / len(known))
    assert "cme/prompt_copy_rate" in metrics
    assert "echo_rate" in columns


def test_cme_among_the_rewards_is_logged_by_trl(verifier, policy):
    metrics = {}
    rewards_of("cme length", verifier, batch(policy) | {"log_metric": metrics.__setitem__})
    assert "rewards/cme/mean" not in metrics
    assert "cme/prompt_copy_rate" in metrics


@pytest.mark.parametrize(
    ("names", "by_verifier", "by_policy"),
    [
        ("cme", 1, 0),
        ("length", 1, 0),
        ("cme length majority verifier-entropy", 1, 0),
        ("entropy", 1, 1),
        ("cme self-certainty entropy log-ratio", 1, 1),
        ("cme pmi random-verifier", 3, 0),  # pmi asks without the question, too
        ("cme-min:a cme-mean:a,b", 3, 0),
    ],
)
def test_each_model_scores_each_pair_once_per_step(monkeypatch, names, by_verifier, by_policy):
    passes = []
    original = forward.compute_requests

    def counted(model, requests, *args, **how):
        passes.append((model, len(requests)))
        return original(model, requests, *args, **how)

    monkeypatch.setattr(forward, "compute_requests", counted)
    monkeypatch.setattr("cme.policy.compute_requests", counted)
    verifier, policy = Verifier.of(tiny.llama(1), tiny.tokenizer(chat=False)), policy_of(tiny.llama(0))
    functions = build_rewards(names.split(), CMEReward(verifier), policy, lambda _: random_verifier(verifier))
    for step in (1, 2):
        inputs = batch(policy)
        for function in functions:
            function(**inputs)
        by_model = [model is policy.model for model, _ in passes]
        assert (by_model.count(False), by_model.count(True)) == (by_verifier * step, by_policy * step)
        assert {count for _, count in passes} == {3}  # one of the four responses is empty


def test_the_trainer_calls_them_with_the_policy_of_the_moment(options, tmp_path):
    args = [*options, "--max_steps", "2", "--eval_prompts", "0"]
    args += ["--reward", "log-ratio", "self-certainty", "--reward_weights", "1", "0.1"]
    assert main(args) == 0
    settings = json.loads((tmp_path / "run" / "summary.json").read_text())["settings"]
    assert settings["reward"] == "log-ratio self-certainty"
    assert settings["reward_weights"] == [1, 0.1]
    for record in lines(tmp_path / "run"):
        assert {"rewards/cme/mean", "cme/echo_rate"} <= record.keys()
        means = [record[f"rewards/{name}/mean"] for name in ("log_ratio", "self_certainty")]
        assert record["reward"] == pytest.approx(means[0] + 0.1 * means[1], abs=1e-4)
