import subprocess
import sys

import pytest
import tiny
from trl.chat_template_utils import parse_response, qwen3_template

from cme import reward as reward_module
from cme.diagnostics import diagnose, is_echo, prompt_copy_rate, repeated_ngram_rate
from cme.errors import CMEError
from cme.reward import CMEReward
from cme.verifier import Verifier


@pytest.fixture(scope="module")
def verifier():
    return Verifier.of(tiny.llama(), tiny.tokenizer())


def chat(text, role="user"):
    return [{"role": role, "content": text}]


def test_it_is_the_mean_log_likelihood_in_the_order_of_the_completions(verifier):
    prompts = [chat("Where is Paris?"), chat("Hi"), chat("Where is Paris?")]
    answers = ["France.", "Hello there", "In the capital"]
    got = CMEReward(verifier)(prompts=prompts, completions=[chat(a, "assistant") for a in answers])
    want = [verifier.score([p], [a])[0].mean_logprob for p, a in zip(prompts, answers, strict=True)]
    assert got == pytest.approx(want, abs=1e-5)
    assert len(set(got)) == 3


def test_what_cannot_be_scored_is_none_not_a_number(verifier):
    rewards = CMEReward(verifier)(prompts=["Hi", "Hi"], completions=["", "Paris"])
    assert rewards[0] is None
    assert isinstance(rewards[1], float)


def test_it_logs_columns_and_metrics(verifier):
    columns, metrics = {}, {}
    reward = CMEReward(verifier, measures=[lambda text, row: {"accuracy": float(row["answer"] in text)}])
    reward(
        prompts=["Where is Paris?"] * 2,
        completions=["Paris", ""],
        log_extra=columns.__setitem__,
        log_metric=metrics.__setitem__,
        answer=["Paris", "Rome"],
        trainer_state=None,
    )
    assert columns["accuracy"] == [1.0, 0.0]
    assert columns["prompt_copy_rate"] == [1.0, 0.0]
    assert columns["verifier_entropy"][1] is None
    assert metrics["cme/accuracy"] == 0.5
    assert metrics["cme/echo_rate"] == 0.5
    assert metrics["cme/unscorable_rate"] == 0.5
    assert metrics["cme/verifier_entropy"] == columns["verifier_entropy"][0]


def test_a_group_of_equal_texts_shows(verifier):
    metrics = {}
    texts = ["Paris Rome", "Paris Rome", "Oslo", ""]
    CMEReward(verifier)(prompts=["a", "a", "b", "b"], completions=texts, log_metric=metrics.__setitem__)
    assert metrics["cme/distinct_1"] == pytest.approx((2 / 4 + 1) / 2)
    assert metrics["cme/distinct_2"] == 1 / 2
    assert metrics["cme/empty_rate"] == 1 / 4


def test_another_script_shows_in_the_bytes(verifier):
    def divergence(*texts):
        metrics = {}
        prompts = ["Where does the river end?"] * len(texts)
        CMEReward(verifier)(prompts=prompts, completions=texts, log_metric=metrics.__setitem__)
        return metrics.get("cme/byte_divergence")

    english = divergence("The river ends in the sea.", "In the other river, there.")
    assert 0 < english < 0.2
    assert divergence("The river ends in the sea.", "Река впадает в море.") > english + 0.2
    assert divergence("Река впадает в море.", "Там, где море.") > 0.8
    assert divergence("Where does the river end?", "") == 0
    assert divergence("", "") is None


def test_the_end_of_the_turn_counts_where_a_response_ended_by_itself(verifier):
    prompts, texts, ids = ["Where is Paris?"] * 3, ["In France."] * 2 + [""], [[9, 2], [9, 9], [2]]
    reward = CMEReward(verifier, stop_token_ids={2})
    ended, cut, empty = reward(prompts=prompts, completions=texts, completion_ids=ids)
    want = verifier.score(prompts[:1], texts[:1], finished=[True], score_end_of_turn=True)[0]
    assert ended == pytest.approx(want.mean_logprob, abs=1e-5)
    assert cut == pytest.approx(CMEReward(verifier)(prompts=prompts[:1], completions=texts[:1])[0], abs=1e-5)
    assert abs(ended - cut) > 0.01
    assert empty is None
    metrics = {}
    reward = CMEReward(verifier, stop_token_ids={2}, canary=verifier)
    reward(prompts=prompts, completions=texts, completion_ids=ids, log_metric=metrics.__setitem__)
    assert metrics["cme/canary_gap"] == 0  # like is compared with like
    with pytest.raises(CMEError, match="needs `completion_ids`, which TRL passes"):
        reward(prompts=prompts, completions=texts)


def test_a_canary_is_logged_and_has_no_part_in_the_reward(verifier):
    metrics, columns = {}, {}
    canary = Verifier.of(tiny.llama(1), tiny.tokenizer(chat=False))
    prompts, texts = ["Where is Paris?"] * 2, ["In France.", ""]
    got = CMEReward(verifier, canary=canary)(
        prompts=prompts, completions=texts, log_metric=metrics.__setitem__, log_extra=columns.__setitem__
    )
    want = canary.score(prompts, texts)[0].mean_logprob
    assert got == CMEReward(verifier)(prompts=prompts, completions=texts)
    assert columns["canary"] == [want, None]
    assert metrics["cme/canary"] == want
    assert metrics["cme/canary_gap"] == got[0] - want


def test_the_verifier_can_see_another_prompt(verifier):
    reward = CMEReward(verifier, prompt_column="question")
    got = reward(prompts=["Be brief. Where?"], completions=["Here"], question=["Where?"])
    assert got == [verifier.score(["Where?"], ["Here"])[0].mean_logprob]
    with pytest.raises(CMEError, match=r"no column 'question' for the verifier's prompt; it has \['answer'\]"):
        reward(prompts=["Where?"], completions=["Here"], answer=["x"])


def test_trl_gets_a_name_for_it(verifier):
    assert CMEReward(verifier).__name__ == "cme"


def test_the_module_level_reward_reads_its_verifier_from_the_environment(tmp_path, monkeypatch, verifier):
    reward_module._from_environment.cache_clear()
    monkeypatch.delenv("CME_VERIFIER", raising=False)
    with pytest.raises(CMEError, match="set CME_VERIFIER"):
        reward_module.cme(prompts=["Hi"], completions=["Paris"])
    verifier.model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("CME_VERIFIER", str(tmp_path))
    got = reward_module.cme(prompts=["Hi"], completions=["Paris"], anything="else")
    assert got == pytest.approx([verifier.score(["Hi"], ["Paris"])[0].mean_logprob], abs=1e-5)
    reward_module._from_environment.cache_clear()
    monkeypatch.setenv("CME_SCORE_THOUGHTS", "false")
    thought = "<think>Hm</think>Paris"
    assert reward_module.cme(prompts=["Hi"], completions=[thought]) == pytest.approx(got, abs=1e-5)
    reward_module._from_environment.cache_clear()
    monkeypatch.setenv("CME_SCORE_THOUGHTS", "no")
    with pytest.raises(CMEError, match="neither 'true' nor 'false'"):
        reward_module.cme(prompts=["Hi"], completions=["Paris"])


def test_the_engine_imports_without_trl_and_cme_imports_without_transformers():
    code = (
        "import sys; import cme; assert 'transformers' not in sys.modules and 'torch' not in sys.modules;"
        "from cme import Verifier, CMEReward; assert 'trl' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_diagnostics():
    assert repeated_ngram_rate("a b c") == 0
    assert repeated_ngram_rate("a b c d a b c d") == pytest.approx(1 / 5)
    assert prompt_copy_rate("The capital of Poland is Warsaw.", "What is the capital of Poland?") == 5 / 6
    assert is_echo("The capital of Poland is Poland.", "What is the capital of Poland?")
    assert not is_echo("", "anything")
    assert diagnose("a", "b") == {"repeated_4gram_rate": 0.0, "prompt_copy_rate": 0.0, "echo_rate": 0.0}


def test_a_reward_that_never_scores_anything_says_so_at_once(verifier):
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]
    with pytest.raises(CMEError, match=r"none of the 2 responses of the first step could be scored: .*tool_calls"):
        CMEReward(verifier)(prompts=["Hi", "Hi"], completions=[calls, calls])
    reward = CMEReward(verifier)
    assert reward(prompts=["Hi", "Hi"], completions=["", ""]) == [None, None]
    assert reward(prompts=["Hi", "Hi"], completions=["Paris", calls])[1] is None
    assert reward(prompts=["Hi", "Hi"], completions=[calls, calls]) == [None, None]


def parsed(text):
    """A completion as TRL makes it of a generator's tokens, where its tokenizer parses responses."""
    tokenizer = tiny.tokenizer()
    tokenizer.response_template = qwen3_template
    prompt = tokenizer.apply_chat_template(chat("Hi"), add_generation_prompt=True, return_dict=False)
    return [parse_response(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], prefix=prompt)]


def test_thoughts_have_one_reward_in_a_field_and_in_the_text(verifier):
    thinking = Verifier.of(tiny.llama(), tiny.tokenizer(), score_thoughts=False)
    texts = ["<think>\nHm.\n</think>\n\nParis", "Paris", "<think>\nHm."]
    messages = [parsed(text) for text in texts]
    assert messages[0][0]["reasoning_content"] == messages[2][0]["reasoning_content"] == "Hm."
    for completions in (texts, messages):
        whole = CMEReward(verifier)(["Hi"] * 3, completions)
        assert whole == [s.mean_logprob for s in verifier.score(["Hi"] * 3, texts)]
        assert None not in whole
        assert CMEReward(thinking)(["Hi"] * 3, completions) == [pytest.approx(whole[1], abs=1e-5)] * 2 + [None]
    with pytest.raises(CMEError, match=r"let responses be longer .*--max-completion-length"):
        CMEReward(thinking)(["Hi"] * 2, messages[2:] * 2)


def test_what_a_tool_wrote_is_not_rewarded(verifier):
    used = [*chat("4", "assistant"), *chat("7 apples", "tool"), *chat("So 7.", "assistant")]
    columns = {}
    rewards = CMEReward(verifier)(["Hi"] * 2, [used, "Paris"], log_extra=columns.__setitem__)
    assert rewards[0] is None
    assert rewards[1] is not None


def test_nothing_at_all_is_an_empty_list(verifier):
    metrics, columns = {}, {}
    got = CMEReward(verifier)([], [], log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
    assert got == []
    assert metrics == columns == {}


@pytest.mark.parametrize(
    ("prompts", "completions"), [(["Hi", None], ["Paris"] * 2), (["Hi"] * 2, ["Paris", None])]
)
def test_none_has_no_reward(verifier, prompts, completions):
    metrics = {}
    first, second = CMEReward(verifier)(prompts, completions, log_metric=metrics.__setitem__)
    assert first is not None
    assert second is None
    assert metrics["cme/unscorable_rate"] == 0.5


def test_options_beside_a_loaded_verifier_are_refused(verifier):
    with pytest.raises(CMEError, match="score_thoughts: give a loaded verifier its options when you load it"):
        CMEReward(verifier, score_thoughts=False)
