"""Scores of responses and of their tokens, as values and as tables, and several verifiers' scores combined."""

import math

import pandas
import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from cme import to_frame, tokens_to_frame
from cme.errors import ModelError
from cme.scores import SIGNAL_STATS, SIGNALS, ResponseScore, combine
from cme.verifier import Verifier
from cme_kernels import TokenStats


@pytest.fixture(scope="module")
def verifier():
    return Verifier.of(tiny.llama(), tiny.tokenizer())


class Straightening(PreTrainedTokenizerFast):
    """Changes the text before it tokenises it, which its tokenizer.json knows nothing of."""

    def __call__(self, text, **how):
        return super().__call__(text.replace("’", "'"), **how)


def test_a_response_that_is_not_found_in_its_tokens_is_scored_all_the_same():
    plain = tiny.tokenizer()
    tokenizer = Straightening(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token)
    scores = Verifier.of(tiny.llama(), tokenizer).score(["Hi"] * 2, ["It’s", "Paris"], token_spans=True)
    assert scores[0].mean_logprob is not None
    assert scores[0].alignment is None
    for asked in (scores[0].per_token, lambda: scores[0].within(0, 1)):
        with pytest.raises(ModelError, match="the tokens of the response 'It’s' can't be found in its text"):
            asked()
    assert [token.text for token in scores[1].per_token()]


def test_tokens_come_with_their_signals(verifier):
    (score,) = verifier.score(["Hi"], ["The é"], stats=SIGNAL_STATS, token_spans=True)
    tokens = score.per_token()
    assert [t.id for t in tokens] == list(score.token_ids)
    assert [(t.start, t.end) for t in tokens] == [(0, 3), (3, 4), (4, 5), (4, 5)]
    assert [t.text for t in tokens] == ["The", " ", "\ufffd", "\ufffd"]
    assert sum(t.logprob for t in tokens) == pytest.approx(score.sum_logprob)
    assert sum(t.entropy for t in tokens) / 4 == pytest.approx(score.mean_entropy)
    assert sum(t.top1 for t in tokens) / 4 == score.top1_rate
    with pytest.raises(ValueError, match="token_spans=True"):
        verifier.score(["Hi"], ["The"])[0].per_token()
    (plain,) = verifier.score(["Hi"], ["The"], token_spans=True)
    assert plain.per_token()[0].entropy is plain.per_token()[0].top1 is None


def test_a_first_choice_is_the_most_likely_token(verifier):
    letters = [chr(code) for code in range(ord("!"), ord("~"))]
    firsts = 0
    for prompt in ("Where?", "Hi", "What is it?", "Why", "When"):
        ids = torch.tensor([verifier.renderer.prompt_ids(prompt)])
        choice = int(verifier.model(ids).logits[0, -1].argmax())
        scores = verifier.score([prompt] * len(letters), letters, stats=SIGNAL_STATS, token_spans=True)
        for score in scores:
            (token,) = score.per_token()
            assert token.top1 == (token.id == choice)
            assert score.top1_rate == token.top1
            firsts += token.top1
    assert firsts > 0


def test_a_part_is_scored_by_the_tokens_that_overlap_it(verifier):
    text = "The capital is Paris, é."
    (score,) = verifier.score(["Where?"], [text], stats=SIGNAL_STATS, token_spans=True)
    start = text.index("Paris")
    part = score.within(start, start + 5)
    inside = [t for t in score.per_token() if t.start < start + 5 and t.end > start]
    assert part.per_token() == inside
    assert part.sum_logprob == pytest.approx(sum(t.logprob for t in inside))
    assert part.mean_entropy == pytest.approx(sum(t.entropy for t in inside) / len(inside))
    assert part.num_bytes == len(" Paris")  # the token holds the space
    assert score.within(22, 23).num_tokens == 2  # both bytes of é
    assert score.within(0, len(text)).as_dict() == score.as_dict()
    assert "not within the response's 24 characters" in score.within(20, 25).unscorable
    assert "not within" in score.within(3, 3).unscorable
    assert verifier.score(["Where?"], [""], token_spans=True)[0].within(0, 1).unscorable == "the response is empty"


def test_the_end_of_the_turn_is_scored_where_the_response_ended_by_itself(verifier):
    prompts, responses, finished = ["Hi"] * 3, ["Paris"] * 3, [True, False, None]
    scores = verifier.score(prompts, responses, finished=finished, score_end_of_turn=True, token_spans=True)
    plain = verifier.score(["Hi"], ["Paris"])[0]
    end = verifier.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert scores[0].token_ids == (*plain.token_ids, end)
    assert scores[1].token_ids == scores[2].token_ids == plain.token_ids
    ids = torch.tensor([[*verifier.renderer.prompt_ids("Hi"), *plain.token_ids]])
    want = verifier.model(ids).logits[0, -1].log_softmax(-1)[end]
    assert float(scores[0].tokens.logprob[-1]) == pytest.approx(float(want), abs=1e-5)
    assert (scores[0].per_token()[-1].start, scores[0].per_token()[-1].end) == (5, 5)
    assert [s.finished for s in scores] == finished
    assert verifier.score(prompts, responses, finished=finished)[0].token_ids == plain.token_ids
    assert verifier.score(["Hi"], [""], finished=[True], score_end_of_turn=True)[0].unscorable
    with pytest.raises(ValueError, match="1 values for 3 responses"):
        verifier.score(prompts, responses, finished=[True])


def test_scores_turn_into_tables(verifier):
    scores = verifier.score(
        ["Hi"] * 2, ["The é", ""], stats=SIGNAL_STATS, token_spans=True, finished=[False, None]
    )
    frame = to_frame(scores)
    assert list(frame.columns) == [*SIGNALS, "finished", "unscorable"]
    assert frame["mean_logprob"][0] == scores[0].mean_logprob
    assert math.isnan(frame["mean_logprob"][1])
    assert frame["unscorable"][1] == "the response is empty"
    tokens = tokens_to_frame(scores)
    assert list(tokens["response"]) == [0] * 4
    assert tokens["logprob"].sum() == pytest.approx(scores[0].sum_logprob)
    assert to_frame([]).empty
    assert isinstance(tokens_to_frame([]), pandas.DataFrame)


def test_a_perplexity_beyond_every_number_is_infinite():
    assert ResponseScore(TokenStats(torch.tensor([-1e4])), (1,), 1).perplexity == math.inf


def score(*logprobs, num_bytes=4):
    if not logprobs:
        return ResponseScore(None, (), 0, "the response is empty")
    return ResponseScore(TokenStats(torch.tensor(logprobs)), tuple(range(len(logprobs))), num_bytes)


SCORES = [
    [score(-1.0, -3.0), score(-4.0), score(-1.0)],
    [score(-1.0), score(-2.0, -1.0), score()],
]


def test_the_mean_and_the_extremes_of_each_response():
    assert combine(SCORES) == [-1.5, -2.75, None]
    assert combine(SCORES, "min") == [-2.0, -4.0, None]
    assert combine(SCORES, how="max", signal="sum_logprob") == [-1.0, -3.0, None]
    assert combine(SCORES[:1], "min") == [-2.0, -4.0, -1.0]
    assert combine(SCORES, "max", "bits_per_byte")[0] == pytest.approx(4 / (4 * 0.6931472))
    assert combine([[], []]) == combine([]) == []


def test_verifiers_must_have_scored_the_same_responses():
    with pytest.raises(ValueError, match=r"have scored \[3, 2\] responses"):
        combine([SCORES[0], SCORES[1][:2]])
    with pytest.raises(ValueError, match="how='median' is none of 'mean', 'min', 'max'"):
        combine(SCORES, "median")
