import pytest
import tiny
import torch

from cme.evaluation.generate import Sampling
from cme.evaluation.held_out import Answer, Change, answer_all, change, summarize
from cme.verifier import Verifier

ROWS = [{"prompt": [{"role": "user", "content": f"Where is {c}?"}], "answer": c} for c in ("Paris", "Rome")]


def answer(question, correct, greedy=False, reward=-1.0, length=3):
    return Answer(question, greedy, "x", reward, length, True, correct, 0.0, 0.5, 0.0)


@pytest.fixture(scope="module")
def answers():
    verifier = Verifier.of(tiny.llama(1), tiny.tokenizer(chat=False))
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    sampling = Sampling(samples=3, max_new_tokens=5, batch_size=4)

    def run():
        return answer_all(
            model, tokenizer, verifier, ROWS, sampling, judge=lambda text, row: row["answer"] in text
        )

    return run


def test_every_question_is_sampled_and_decoded_greedily(answers):
    done = answers()
    assert sorted((a.question, a.greedy) for a in done) == sorted(
        [(0, True), (1, True)] + [(0, False)] * 3 + [(1, False)] * 3
    )
    for a in done:
        assert 1 <= a.length <= 5
        assert a.finished or a.length == 5
        assert a.correct is (ROWS[a.question]["answer"] in a.response)


def test_an_evaluation_repeats_itself_and_leaves_the_random_numbers_alone(answers):
    torch.manual_seed(5)
    first = answers()
    after_evaluation = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after_evaluation, torch.rand(1))
    assert answers() == first


def test_means_are_over_questions_and_over_sampled_answers():
    done = [answer(0, True), answer(0, False), answer(1, True), answer(0, False, greedy=True, reward=-9.0)]
    summary = summarize(done)
    assert summary["accuracy_sampled"] == 0.75
    assert summary["accuracy_greedy"] == 0.0
    assert summary["reward"] == -1.0
    assert summarize([answer(0, None)])["accuracy_sampled"] is None
    assert summarize([answer(0, True, reward=None)])["reward"] is None


def test_the_interval_pairs_questions():
    # Every question improves by the same amount, however different the questions are: no uncertainty
    before = [answer(q, False, reward=-float(q)) for q in range(9)]
    after = [answer(q, True, reward=0.5 - float(q)) for q in range(9)]
    assert change(before, after, "reward").interval == pytest.approx((0.5, 0.5))
    mixed = [answer(q, q % 2 == 0) for q in range(40)]
    low, high = change(before + [answer(q, False) for q in range(9, 40)], mixed, "accuracy_sampled").interval
    assert 0.3 < low < 0.5 < high < 0.7
    assert change(before, [], "reward") is None


def test_questions_without_a_value_afterwards_make_no_gain():
    before = [answer(0, False, reward=-1.0), answer(1, False, reward=-3.0)]
    after = [answer(0, False, reward=-1.0), answer(1, False, reward=None)]  # unscorable
    assert change(before, after, "reward") == Change(-1.0, -1.0, (0.0, 0.0), 1)
