"""Values of one tokenizer's tokens on another's."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_run import lines

from cme.errors import CMEError, ModelError
from cme.rewards.dense import DenseCMEReward, decoded, spread
from cme.train.__main__ import main
from cme.train.config import check_reward
from cme.train.trainer import PackedGRPOTrainer, token_advantages
from cme.verifier import Verifier


def test_a_value_is_split_by_the_characters_in_common():
    # "Warsaw": War|saw onto W|arsaw
    assert spread([-3.0, -1.0], [(0, 3), (3, 6)], [(0, 1), (1, 6)]) == [-1.0, -3.0]
    assert spread([-3.0, -1.0], [(0, 3), (3, 6)], [(0, 3), (3, 6)]) == [-3.0, -1.0]


def test_what_overlaps_nothing_goes_to_the_nearest():
    assert spread([-1.0, -2.0], [(0, 0), (9, 9)], [(0, 4), (4, 8)]) == [-1.0, -2.0]
    with pytest.raises(ValueError, match="no tokens"):
        spread([-1.0], [(0, 1)], [])
    with pytest.raises(ValueError, match="2 values for 1 spans"):
        spread([-1.0, -2.0], [(0, 1)], [(0, 1)])
    assert spread([], [], []) == []


def spans(cuts):
    edges = [0, *sorted(cuts), 20]
    return list(pairwise(edges))


@given(
    st.lists(st.integers(0, 20), max_size=8),
    st.lists(st.integers(0, 20), max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_total_is_conserved_and_no_value_crosses_the_text(mine, theirs, random):
    source, onto = spans(mine), spans(theirs)
    values = [-random.random() for _ in source]
    got = spread(values, source, onto)
    assert math.isclose(sum(got), sum(values), abs_tol=1e-9)
    # A token gets nothing from tokens that end before it, up to a common boundary
    for j, (start, end) in enumerate(onto):
        touching = [v for v, (a, b) in zip(values, source, strict=True) if a <= end and b >= start]
        assert got[j] >= sum(touching) - 1e-9


@pytest.mark.parametrize("text", ["Paris is a city", " two  spaces ", "Malé 🙂 日本語"])
def test_tokens_are_found_in_what_they_decode_to(text):
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    found, spans = decoded(tokenizer, ids)
    assert found == text
    assert spans[-1] == (len(text), len(text))
    assert [spans[0][0], spans[-2][1]] == [0, len(text)]
    for (start, end), (following, _) in pairwise(spans):
        assert following in (start, end)  # a part of the same character, or what comes next
    for (start, end), token in zip(spans, ids, strict=True):
        piece = tokenizer.decode([token])
        assert piece == text[start:end] or "\ufffd" in piece or token == tokenizer.eos_token_id


def test_a_response_s_tokens_share_its_likelihood():
    verifier, policy = Verifier.of(tiny.llama(), tiny.tokenizer()), tiny.tokenizer(chat=False)
    texts = ["The capital of France is Paris.", "", "Paris"]
    ids = [[*policy.encode(texts[0]), policy.eos_token_id], [policy.eos_token_id], policy.encode("Rome")]
    dense = DenseCMEReward(verifier, policy)
    logged = {}
    rewards = dense(prompts=["Where?"] * 3, completions=texts, completion_ids=ids, log_metric=logged.__setitem__)
    assert logged["cme/dense_rate"] == 0.5
    scores = verifier.score(["Where?"] * 3, texts)
    assert rewards == [score.mean_logprob for score in scores]
    first, *others = dense.token_rewards
    assert others == [None, None]  # no reward; and tokens of another text
    assert len(first) == len(ids[0])
    assert sum(first) / len(first) == pytest.approx(rewards[0], rel=1e-6)
    assert first[-1] == pytest.approx(
        rewards[0]
    )  # the end of the turn is no better and no worse than the response
    parts = [value * scores[0].num_tokens / (len(ids[0]) - 1) for value in first[:-1]]
    assert parts == pytest.approx(scores[0].tokens.logprob.tolist(), rel=1e-5)  # one tokenizer: one to one


def test_a_run_in_which_no_response_has_token_rewards_is_ended():
    dense = DenseCMEReward(Verifier.of(tiny.llama(), tiny.tokenizer()), tiny.tokenizer(chat=False))
    with pytest.raises(ModelError, match="in none of the 2 responses of the first step are the tokens of"):
        dense(prompts=["Where?"] * 2, completions=["Paris", "Rome"], completion_ids=[[5, 6], [7]])


def test_the_mean_of_a_response_s_advantages_is_its_advantage():
    advantages = torch.tensor([1.0, -1.0, 0.5])
    rewards = [[-1.0, -3.0], [-2.0, -2.0, -5.0], None]
    found = token_advantages(advantages, rewards, 4)
    scale = math.sqrt((1 + 1 + 1 + 1 + 4) / 5) + 1e-4
    assert found[0].tolist() == pytest.approx([1 + 1 / scale, 1 - 1 / scale, 1, 1])
    assert found[1].tolist() == pytest.approx([-1 + 1 / scale, -1 + 1 / scale, -1 - 2 / scale, -1])
    assert found[2].tolist() == [0.5] * 4
    assert token_advantages(advantages, [None] * 3, 2).tolist() == [[1, 1], [-1, -1], [0.5, 0.5]]


def test_it_needs_offsets():
    slow, verifier = tiny.tokenizer(), Verifier.of(tiny.llama(), tiny.tokenizer())
    type(slow).is_fast, fast = False, type(slow).is_fast
    try:
        with pytest.raises(ModelError, match="not a fast tokenizer"):
            DenseCMEReward(verifier, slow)
    finally:
        type(slow).is_fast = fast


def test_training_gives_each_token_its_own_advantage(options, tmp_path, monkeypatch):
    seen = []
    original = PackedGRPOTrainer._compute_loss

    def recorded(self, model, inputs):
        seen.append((inputs["advantages"], inputs["completion_mask"].bool()))
        return original(self, model, inputs)

    monkeypatch.setattr(PackedGRPOTrainer, "_compute_loss", recorded)
    args = [*options, "--max_steps", "2", "--eval_prompts", "0", "--reward", "cme-dense"]
    assert main(args) == 0
    for advantages, mask in seen:
        assert advantages.shape == mask.shape
        assert (
            max(float(row[kept].std()) for row, kept in zip(advantages, mask, strict=True) if kept.sum() > 1) > 0.1
        )
        means = torch.stack([row[kept].mean() for row, kept in zip(advantages, mask, strict=True)])
        assert abs(float(means.sum())) < 1e-3  # of whole groups, as in GRPO
    assert all(math.isfinite(record["reward"]) for record in lines(tmp_path / "run"))


@pytest.mark.parametrize("reward", ["cme length", "cme-min:other", "cme-dense"])
def test_the_end_of_the_turn_is_of_cme_alone(reward):
    config = SimpleNamespace(reward=reward.split(), score_end_of_turn=True)
    with pytest.raises(CMEError, match="leave one of them out"):
        check_reward(config, SimpleNamespace(fsdp="", deepspeed=None, reward_weights=None))


@pytest.mark.parametrize("reward", ["cme log-ratio", "cme-dense"])
def test_rewards_that_set_tokens_beside_tokens_need_the_whole_response(reward):
    config = SimpleNamespace(reward=reward.split(), score_end_of_turn=False, score_thoughts=False)
    with pytest.raises(CMEError, match="leave out --score-thoughts false"):
        check_reward(config, SimpleNamespace(fsdp="", deepspeed=None, reward_weights=None))


def test_weights_are_as_many_as_rewards():
    config = SimpleNamespace(reward=["cme", "length"])
    with pytest.raises(
        CMEError, match="--reward-weights has 1 numbers: give one per reward of --reward cme length"
    ):
        check_reward(config, SimpleNamespace(reward_weights=[1.0]))
