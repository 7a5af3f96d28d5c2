"""The end of a run for a person: its table, its picture, its last words."""

from cme.evaluation.held_out import Answer, summarize
from cme.train.report import differences, draw, stopping_alarm, table


def answer(question, correct, reward=-1.0):
    return Answer(question, False, "x", reward, 3, True, correct, 0.0, 0.5, 0.0)


def test_questions_without_a_value_afterwards_make_no_gain():
    before = [answer(0, False, reward=-1.0), answer(1, False, reward=-3.0)]
    after = [answer(0, False, reward=-1.0), answer(1, False, reward=None)]  # unscorable
    assert differences(before, after)["reward"] == {"change": 0.0, "interval_95": (0.0, 0.0), "questions": 1}
    shown = " ".join(table(before, after).split())
    assert "+0.000 [+0.000, +0.000] 1 of 2 questions have it both times" in shown


def test_the_report_shows_what_was_measured(tmp_path):
    before, after = [answer(0, False)], [answer(0, True, reward=-0.5)]
    text = table(before, after)
    assert "+100.0 %" in text
    assert "verifier_logprob" in text
    assert "accuracy_greedy" not in text  # nothing was decoded greedily
    history = [{"step": 1, "rewards/cme/mean": -3.0, "cme/accuracy": 0.5}, {"step": 2, "rewards/cme/mean": None}]
    draw(history, summarize(before), summarize(after), tmp_path / "x.png")
    alarms = [{"step": 2, "rule": "entropy<1"}]
    draw(history, summarize(before), summarize(after), tmp_path / "alarm.png", alarms)
    assert (tmp_path / "alarm.png").read_bytes() != (tmp_path / "x.png").read_bytes()
    draw([], None, None, tmp_path / "empty.png")
    assert (tmp_path / "x.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 1000


def test_a_run_that_was_resumed_past_an_alarm_was_not_stopped_by_it():
    alarms = [{"step": 5, "action": "stop", "rule": "a"}, {"step": 5, "action": "stop", "rule": "b"}]
    assert stopping_alarm({"steps": 5, "alarms": alarms})["rule"] == "a"
    assert stopping_alarm({"steps": 8, "alarms": [*alarms, {"step": 8, "action": "warn"}]}) is None
